"""One bucket's step as a fixed sequence of operations on the device: what a CUDA graph captures and replays.

Between the copy of its inputs and the event behind its answer the host does nothing: no shape, address or choice of
operation depends on what the step is. Without a graph the same operations are launched one by one.

Shapes: R requests of the bucket, N rows of each, T = R x N rows, L MoE layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..kernels.device import has_triton
from ..router.budgeted_choice import LayerRanks
from ..router.budgeted_selection import BudgetedSelection
from ..router.expert_budget import ExpertBudget
from .computed_step import ComputedStep
from .dispatch import CollectiveLog, both_crcs
from .expert_parallel import ExpertParallel
from .gpu_routing import LaunchedRouting, launched_routings
from .known_routers import KnownRouter
from .plan import Bucket, LayerCounts, RankPlan
from .rows import PackedRows, depths
from .static_rows import StaticRows
from .static_sampler import choose_tokens, samples_plainly
from .step_budget import kept_weights

if TYPE_CHECKING:
    from ..kernels.kv_moves import Pools

Forward = Callable[[PackedRows, Sequence[BudgetedSelection], Sequence[LaunchedRouting]], torch.Tensor]
"""From rows, and either the selections of all layers under a budget or all that follows routers' logits, to logits
[T, V]."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a sequence of operations is made for; steps of one shape share it."""

    bucket: Bucket
    budget: ExpertBudget | None
    """Without its number of experts, which is an input."""

    @classmethod
    def of(cls, bucket: Bucket, budget: ExpertBudget | None) -> StepShape:
        """Return the shape of a step."""
        return cls(bucket, budget if budget is None or budget.experts is None else replace(budget, experts=1))


@dataclass(frozen=True, slots=True)
class Answer:
    """What the host reads of a step that has ended."""

    tokens: np.ndarray
    """[R, N] the token that each row chooses, by temperature alone."""
    accepted: np.ndarray | None
    """[R, 2 N + 1] tokens that each request emits by those, the rows that yield them, and how many they are; None
    where the device does not walk along drafts."""
    experts: list[int]
    """Per layer, as in `LayerCounts`."""
    rows_sent: list[int]
    wire_bytes: list[int]
    kept: np.ndarray
    """[L, R, N] share of the weight that a budget left to each row."""
    num_collectives: int
    collectives_crc: int

    def computed(self, plan: RankPlan, logits: torch.Tensor, payload_bytes_per_row: int) -> ComputedStep:
        """Return what became of the rows of ``plan``, without the padding; ``logits`` [T, V]."""
        num_rows = [len(request.token_ids) for request in plan.requests]
        sampled = [
            (place, row)
            for place, r in enumerate(plan.requests)
            for row in range(r.first_sampled_row, len(r.token_ids))
        ]
        depth = [depths(request.parents) for request in plan.requests]
        rows = [place * self.tokens.shape[1] + row for place, row in sampled]
        counts = LayerCounts(
            rows=[sum(num_rows)] * len(self.experts),
            experts=self.experts,
            rows_sent=self.rows_sent,
            payload_bytes=[number * payload_bytes_per_row for number in self.rows_sent],
            wire_bytes=list(self.wire_bytes),
        )
        kept = [self.kept[:, place, :number] for place, number in enumerate(num_rows)]
        is_plain = samples_plainly(plan.requests)
        return ComputedStep(
            tokens=[int(self.tokens[where]) for where in sampled] if is_plain else None,
            accepted=self._accepted(plan) if is_plain and self.accepted is not None else None,
            logits_of=lambda: logits[torch.tensor(rows, dtype=torch.int64, device=logits.device)],
            positions=[plan.requests[place].committed_len + depth[place][row] for place, row in sampled],
            counts=counts,
            kept_weights=kept_weights(plan, np.concatenate(kept, axis=1).tolist(), counts) if kept else {},
            num_collectives=self.num_collectives,
            collectives_crc=self.collectives_crc,
        )

    def _accepted(self, plan: RankPlan) -> list[tuple[list[int], list[int]]]:
        assert self.accepted is not None, "the device has walked along drafts"
        width = self.tokens.shape[1]
        accepted = []
        for request, (*walk, number) in zip(plan.requests, self.accepted.tolist(), strict=False):
            known = list(range(min(request.first_sampled_row, len(request.token_ids))))
            accepted.append((walk[:number], known + walk[width : width + number]))
        return accepted


class StaticStep:
    """The step of one shape. `fill`, `run` and `answer` are one step.

    ``routers``: of all layers, where a kernel computes them. ``pools``: of the KV cache, in which a device that walks
    along drafts puts those that it accepts in order.
    """

    def __init__(
        self,
        shape: StepShape,
        rows: StaticRows,
        forward: Forward,
        experts: ExpertParallel,
        layers: Sequence[LayerRanks],
        log: CollectiveLog,
        routers: Sequence[KnownRouter] = (),
        pools: Sequence[torch.Tensor] = (),
    ) -> None:
        self.shape, self.rows, self._routers = shape, rows, routers
        self._forward, self._experts, self._layers, self._log = forward, experts, layers, log
        self._walks = has_triton(layers[0].owner.device)
        bucket = shape.bucket
        self._pools: Pools | None = None
        if self._walks and pools and bucket.num_rows > 2:  # what two rows accept is in order
            from ..kernels.kv_moves import Pools

            self._pools = Pools.of(pools)
        self._first_rows = torch.arange(0, bucket.total_rows, bucket.num_rows, device=layers[0].owner.device)
        self.logits: torch.Tensor | None = None
        """[T, V] of the latest run."""
        self._results: Sequence[torch.Tensor] = ()
        """int64: tokens [T], experts [L], rows sent [L], and where the device walks along drafts what requests emit
        [R], [R, N], [R, N]; f32: weight kept [L, T]."""
        self._copies: Sequence[torch.Tensor] = ()
        """The same on the host."""
        self._known: tuple[list[int], int, int] = ([], 0, 0)
        """Wire bytes per layer, number and checksum of collectives: the same whenever it runs."""
        self._before = (0, 0)
        """Number and checksum of the collectives that preceded it: moves of experts."""

    def fill(self, plan: RankPlan, tables: Mapping[int, np.ndarray]) -> None:
        """Write a step of this shape; the one before has been answered."""
        self._before = self._log.num_collectives, self._log.crc
        self.rows.fill(plan, tables)

    def rehearse(self) -> None:
        """Run as the step will, for what libraries and compilers do in first runs: it writes what the step will."""
        with self._experts.uncounted():
            self.run()

    def run(self) -> None:
        """Compute the step that `rows` hold; what a graph captures."""
        self._log.reset()
        layout = self.rows.layout()
        assert layout.valid is not None
        selections, routings = self._choices(layout.valid)
        self.logits = self._forward(layout, selections, routings)
        inputs, num_rows = self.rows.inputs, self.shape.bucket.num_rows
        temperatures, seeds, choices = (
            inputs[name].repeat_interleave(num_rows, dim=0, output_size=self.shape.bucket.total_rows)
            for name in ("temperatures", "seeds", "choices")
        )
        tokens = choose_tokens(self.logits, temperatures, seeds, choices, layout.positions + 1)
        self._known = self._experts.wire_bytes, self._log.num_collectives, self._log.crc
        kept = [selection.limits.kept for selection in selections if selection.limits is not None]
        if self.shape.budget is not None:
            kept += [routing.kept for routing in routings if routing.kept is not None]
        self._results = (
            torch.cat([tokens, self._experts.counts_on(tokens.device).flatten(), *self._accept(tokens)]),
            torch.stack(kept) if kept else tokens.new_zeros(0, len(tokens), dtype=torch.float32),
        )

    def _accept(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Return how many tokens requests emit [R], those [R x N], and their rows [R x N], if the device can tell."""
        if not self._walks:
            return []
        from ..kernels.tree_acceptance import DraftTrees, accept_trees

        inputs, bucket = self.rows.inputs, self.shape.bucket
        trees = DraftTrees(
            token_ids=inputs["token_ids"].flatten(),
            parents=inputs["parents"].flatten(),
            first_rows=self._first_rows,
            num_rows=inputs["num_rows"],
            first_sampled=inputs["first_sampled"],
            first_choices=self._first_rows,
            most_rows=bucket.num_rows,
        )
        accepted = accept_trees(trees, tokens)
        if self._pools is not None:
            from ..kernels.kv_moves import AcceptedRows, move_accepted

            found = accepted.path, accepted.num_tokens, inputs["committed"], inputs["tables"]
            move_accepted(self._pools, AcceptedRows(*found, self.rows.block_size))
        return [accepted.num_tokens, accepted.tokens.flatten(), accepted.path.flatten()]

    def _choices(self, valid: torch.Tensor) -> tuple[list[BudgetedSelection], list[LaunchedRouting]]:
        """Return what chooses experts beside the routers' own code: one of the two, or neither."""
        budget, rows = self.shape.budget, None
        if budget is not None:
            rows = self.rows.budgeted_rows(valid, per_request=budget.scope == "request")
        reduce = self._experts.dispatcher.sum_scores
        routings = launched_routings(self._routers, budget, rows, valid, self._layers, reduce)
        if routings or budget is None or rows is None:
            return [], routings
        return [BudgetedSelection(budget, rows, layer, reduce) for layer in self._layers], []

    def answer(self) -> Answer:
        """Return what the latest run found; waits for the device."""
        assert self._results, "it has run"
        if not self._copies:
            self._copies = [torch.empty_like(part, device="cpu", pin_memory=part.is_cuda) for part in self._results]
        for copy, part in zip(self._copies, self._results, strict=True):
            copy.copy_(part, non_blocking=True)
        if self._results[0].is_cuda:
            event = torch.cuda.Event()
            event.record()
            event.synchronize()
        bucket = self.shape.bucket
        numbers, kept = (copy.numpy() for copy in self._copies)
        num_layers = self._experts.num_layers
        ends = np.cumsum([bucket.total_rows, num_layers, num_layers, bucket.num_requests * self._walks])
        tokens, experts, rows_sent, num_emitted, walks = np.split(numbers, ends)
        accepted = None
        if self._walks:
            emitted, path = walks.reshape(2, bucket.num_requests, bucket.num_rows)
            accepted = np.concatenate([emitted, path, num_emitted[:, None]], axis=1)
        return Answer(
            tokens.reshape(bucket.num_requests, bucket.num_rows),
            accepted,
            experts.tolist(),
            rows_sent.tolist(),
            self._known[0],
            kept.reshape(-1, bucket.num_requests, bucket.num_rows),
            self._before[0] + self._known[1],
            both_crcs(self._before[1], self._known[2]),
        )
