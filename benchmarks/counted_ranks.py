"""One real rank that counts, for each request by itself, what its verifications read and would send.

Requests share steps, so that many are measured in little time; under a budget of scope ``request`` each gets the rows,
the experts and the tokens that it gets when it is served alone. Counts are those of a request served alone: its own
distinct experts per layer, and the other ranks that its rows visit if its home is one of many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ..cluster.engine.ranks import LocalRanks
from ..router.budgeted_choice import LayerRanks
from ..router.expert_budget import ExpertBudget
from ..workers.dispatch import LocalDispatcher, Received
from ..workers.plan import RankPlan, StepPlan, StepResult
from ..workers.runner import ModelRunner


class RecordingDispatcher(LocalDispatcher):
    """Keeps every layer's expert ids [T, K] of the step, as they were dispatched."""

    def __init__(self) -> None:
        self.ids: list[torch.Tensor] = []

    def dispatch(self, layer: int, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> Received:
        """Keep the ids; nothing moves."""
        self.ids.append(expert_ids)
        return super().dispatch(layer, hidden, expert_ids, weights)


@dataclass(slots=True)
class StepCounts:
    """What one request had in one of its steps after the prompt."""

    num_rows: int
    num_tokens: int
    experts: list[int]
    """Per layer, the distinct experts of its rows."""
    busiest_experts: int
    """Those of each layer's busiest rank, summed over layers."""
    visits: int
    """Other ranks visited, summed over its rows and all layers."""


@dataclass(slots=True)
class Counts:
    """Sums over requests and their steps after the prompt."""

    steps: list[StepCounts] = field(default_factory=list)
    shared_experts: list[float] = field(default_factory=list)
    """Per step without prompt rows: distinct experts that all its requests together computed per layer."""

    @property
    def num_tokens(self) -> int:
        """Tokens that those steps yielded, a request's first left out."""
        return sum(step.num_tokens for step in self.steps)

    @property
    def experts_per_layer(self) -> float:
        """Mean distinct experts of a layer and step."""
        return sum(sum(step.experts) / len(step.experts) for step in self.steps) / len(self.steps)

    @property
    def busiest_experts_per_layer(self) -> float:
        """Mean distinct experts that the busiest rank of a layer and step computes."""
        return sum(step.busiest_experts / len(step.experts) for step in self.steps) / len(self.steps)

    @property
    def shared_experts_per_layer(self) -> float:
        """Mean of ``shared_experts``."""
        return sum(self.shared_experts) / len(self.shared_experts)

    @property
    def visits_per_token(self) -> float:
        """Rows sent to other ranks, all layers, per output token."""
        return sum(step.visits for step in self.steps) / self.num_tokens

    def verifications(self) -> Counts:
        """Return those of steps that verified drafts."""
        return Counts([step for step in self.steps if step.num_rows > 1])


class CountedRanks(LocalRanks):
    """The rank. ``layers``: where the experts are taken to be, and the home of all requests; None for one rank."""

    def __init__(self, runner: ModelRunner, layers: Sequence[LayerRanks] | None = None) -> None:
        super().__init__(runner)
        self._dispatcher = RecordingDispatcher()
        runner.experts.dispatcher = self._dispatcher
        runner.layers = list(layers or (LayerRanks(layer.owner * 0, 1, 0) for layer in runner.layers))
        self._layers = runner.layers
        num_experts = len(self._layers[0].owner)
        # Behind the last expert the sentinel, which is at home
        self._owners = [torch.cat([layer.owner, torch.tensor([layer.home])]) for layer in self._layers]
        self._num_experts = num_experts
        self.counts = Counts()
        self.budget: ExpertBudget | None = None
        """Kept to by every verification, if the engine sends none: an engine of one rank limits no visits."""

    @property
    def step_ids(self) -> list[torch.Tensor]:
        """Per layer, the experts [T, K] that the latest step's rows were dispatched to."""
        return self._dispatcher.ids

    def step(self, plan: StepPlan) -> StepResult:
        """Run the step and count what it was to each decoding request."""
        self._dispatcher.ids.clear()
        if self.budget is not None:
            plan = replace(plan, ranks=[_budgeted(rank, self.budget) for rank in plan.ranks])
        result = super().step(plan)
        self._count(plan.ranks[0], result.ranks[0].token_ids)
        if all(request.first_sampled_row == 0 for request in plan.ranks[0].requests):
            experts = result.ranks[0].counts.experts
            self.counts.shared_experts.append(sum(experts) / len(experts))
        return result

    def _count(self, plan: RankPlan, token_ids: Sequence[Sequence[int]]) -> None:
        ids = torch.stack(self._dispatcher.ids)  # [L, T, K]
        visits = self._visits(ids)
        start = 0
        for request, tokens in zip(plan.requests, token_ids, strict=True):
            stop = start + len(request.token_ids)
            if request.first_sampled_row == 0 and tokens:  # decoding
                own = ids[:, start:stop].flatten(1)
                seen = torch.zeros(len(own), self._num_experts + 1, dtype=torch.bool).scatter_(1, own, value=True)
                experts = seen[:, : self._num_experts].sum(dim=1).tolist()
                busiest = sum(
                    int(layer.owner[own].bincount().max())
                    for layer, own in zip(self._layers, seen[:, : self._num_experts], strict=True)
                )
                sent = int(visits[start:stop].sum())
                self.counts.steps.append(StepCounts(stop - start, len(tokens), experts, busiest, sent))
            start = stop

    def _visits(self, ids: torch.Tensor) -> torch.Tensor:
        """Return [T]: the other ranks that each row visits, summed over layers."""
        total = torch.zeros(ids.shape[1], dtype=torch.int64)
        for layer, chosen, owner in zip(self._layers, ids, self._owners, strict=True):
            seen = torch.zeros(ids.shape[1], layer.num_ranks, dtype=torch.bool).scatter_(1, owner[chosen], value=True)
            seen[:, layer.home] = False
            total += seen.sum(dim=1)
        return total


def _budgeted(plan: RankPlan, budget: ExpertBudget) -> RankPlan:
    """Return the plan with a budget on all rows that verify drafts."""
    requests = [
        replace(request, first_budgeted_row=request.first_sampled_row) if request.num_sampled_rows > 1 else request
        for request in plan.requests
    ]
    return replace(plan, requests=requests, budget=budget)
