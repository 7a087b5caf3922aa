"""What the next step verifies: drafts, and the budget of experts that they keep to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...router.expert_budget import ExpertBudget
from ..speculation.batch import Batch, RequestView
from ..speculation.controller import Controller
from ..speculation.drafting import Drafting
from ..speculation.proposal import NOTHING
from .request import Request
from .scheduler import Scheduler


class Proposer:
    """Asks the controller about the requests that ``scheduler`` runs, and ``drafting`` for what it wants.

    ``budgets``: by the controller's levels.
    """

    def __init__(
        self,
        controller: Controller,
        drafting: Drafting,
        scheduler: Scheduler,
        budgets: Sequence[ExpertBudget],
        max_draft_len: int,
    ) -> None:
        self._controller, self._drafting, self._scheduler = controller, drafting, scheduler
        self._budgets, self._max_draft_len = budgets, max_draft_len

    def decoding(self) -> list[Request]:
        """Return the requests that have nothing but their last token to compute."""
        ranks = range(len(self._scheduler.pools))
        return [request for rank in ranks for request in self._scheduler.planned(rank) if request.is_decoding]

    def foresee(self) -> Batch | None:
        """Return the next step's requests if nothing is drafted for them, whatever the step that runs brings."""
        batch = self._batch_of(self.decoding())
        return batch if self._controller.rests(batch) else None

    def propose_nothing(self, batch: Batch) -> None:
        """Make the decision of a step that was foreseen, once the step before it has committed.

        It runs already, without drafts. Those that it might have verified teach their controller all the same.
        """
        self._index_prompts()
        live = {request.key: request for requests in self._scheduler.running for request in requests}
        if batch.requests and not any(view.key in live for view in batch.requests):
            return  # the controller has forgotten them all
        batch = replace(batch, is_sent=True)
        proposals = [
            self._drafting.propose(view.key, live[view.key].token_ids, most)
            if most > 0 and view.key in live
            else NOTHING
            for view, most in zip(batch.requests, self._controller.max_draft_lens(batch), strict=True)
        ]
        self._controller.draft_lens(batch, proposals)

    def _batch_of(self, decoding: Sequence[Request]) -> Batch:
        views = [
            RequestView(
                key=request.key,
                rank=request.rank,
                context_len=len(request.token_ids),
                max_draft_len=request.speculation.limit(self._max_draft_len, request.num_tokens_left),
                is_fixed=request.speculation.is_fixed,
                allows_budget=request.speculation.allows_budget,
            )
            for request in decoding
        ]
        return Batch(views, len(self._scheduler.pools), self._scheduler.prompt_rows())

    def propose(self) -> tuple[dict[int, Sequence[int]], ExpertBudget | None, dict[int, Sequence[float]]]:
        """Return the drafts to verify, by `Request.key`, under which budget, and how likely they are right if it asks.

        One decision over the requests of all ranks.
        """
        decoding = self.decoding()
        batch = self._batch_of(decoding)
        self._index_prompts()
        proposals = [
            self._drafting.propose(request.key, request.token_ids, most) if most > 0 else NOTHING
            for request, most in zip(decoding, self._controller.max_draft_lens(batch), strict=True)
        ]
        lengths = self._controller.draft_lens(batch, proposals)
        for request, proposal in zip(decoding, proposals, strict=True):
            request.draft_source = proposal.evidence.source
        drafted = [found for found in zip(decoding, proposals, lengths, strict=True) if found[2] > 0]
        drafts = {request.key: proposal.token_ids[:length] for request, proposal, length in drafted}
        level = self._controller.budget_level() if self._budgets else None
        budget = None if level is None else self._budgets[level]
        if budget is None or budget.score != "survival":
            return drafts, budget, {}
        return (
            drafts,
            budget,
            {
                request.key: self._controller.reach(request.key, proposal, length)
                for request, proposal, length in drafted
            },
        )

    def level_of(self, budget: ExpertBudget | None) -> int | None:
        """Return the level of a plan's budget, for a plan says what became of a decision."""
        return None if budget is None else self._budgets.index(budget)

    def _index_prompts(self) -> None:
        """Tell drafters of the chunks that ranks have computed: a long prompt at once would hold up a later step."""
        for request in (request for requests in self._scheduler.running for request in requests):
            may_draft = request.speculation.limit(self._max_draft_len, request.num_tokens_left) > 0
            if may_draft and request.committed_len and not request.is_decoding:
                self._drafting.index(request.key, request.token_ids[: request.committed_len])
