"""Decide which rows every rank runs next. State in, plan out: no clock, no processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...router.expert_budget import ExpertBudget
from ...workers.bucket import Padding
from ...workers.plan import RankPlan, RequestPlan, StepPlan
from ..speculation.prediction import PREDICTION
from .block_pool import BlockPool
from .fair_queue import FairQueue
from .request import Request


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a step shall verify, by ``Request.key``."""

    drafts: Mapping[int, Sequence[int]]
    budget: ExpertBudget | None
    reach: Mapping[int, Sequence[float]]

    def budget_of(self, request: Request, num_sampled: int) -> tuple[int | None, list[float]]:
        """Return the first of its ``num_sampled`` sampled rows that the budget acts on, and how likely those are used.

        Those that verify drafts, of a request that allows it; drafts from its own prediction are exact, since no budget
        was calibrated with such.
        """
        is_allowed = request.speculation.allows_budget and request.draft_source != PREDICTION
        if self.budget is None or num_sampled < 2 or not is_allowed:
            return None, []
        first = int(self.budget.protect_first_row)
        reach = self.reach.get(request.key)
        # The first row is reached for sure
        return first, [] if reach is None else [1.0, *reach][first:num_sampled]


_WATERMARK = 0.01
"""Share of a rank's blocks that stays free when a request joins others, for those to grow into (vLLM's value)."""


class Scheduler:
    """Continuous batching over several ranks: running requests first, then waiting ones as `FairQueue` orders them.

    A request takes the blocks of all its known tokens when it is admitted and further ones as it grows. When a rank has
    none left, its drafts go first, then the request that arrived last: it waits again, in its place by arrival, and is
    replayed as a prompt. So the oldest request of a rank always advances, and every request becomes the oldest. Prompts
    are computed in chunks within ``max_num_batched_tokens``; decoding requests (their last token and drafts) come
    first, so a long prompt never stalls them.

    Every pool must hold the longest request. ``padding``: what steps are padded to; None for ranks that run rows as
    they are.
    """

    def __init__(
        self,
        pools: Sequence[BlockPool],
        max_num_seqs: int,
        max_num_batched_tokens: int,
        padding: Padding | None = None,
    ) -> None:
        self.pools = list(pools)
        self.running: list[list[Request]] = [[] for _ in pools]
        self.waiting = FairQueue()
        self.num_admissions = 0
        self.num_preemptions = 0
        self.num_replays = 0
        """Times a running request lost its KV with its rank."""
        self._released: list[list[int]] = [[] for _ in pools]
        self._max_num_seqs, self._max_rows, self._padding = max_num_seqs, max_num_batched_tokens, padding

    @property
    def num_running(self) -> int:
        """Requests that hold KV."""
        return sum(map(len, self.running))

    @property
    def num_open(self) -> int:
        """Requests that could start besides those that run, right after ``admit``; none while others wait."""
        if self.waiting:
            return 0
        # One that the others go on without has no blocks
        there = [requests for pool, requests in zip(self.pools, self.running, strict=True) if pool.num_blocks]
        return sum(self._max_num_seqs - len(requests) for requests in there)

    def planned(self, rank: int) -> list[Request]:
        """Return the requests of ``rank`` that have rows in the next step, if there is room for all."""
        return [request for request in self.running[rank] if not request.has_last_rows]

    def can_grow(self) -> bool:
        """Whether every running request can hold its known tokens with the blocks that are free."""
        return all(
            sum(max(0, pool.blocks_for(len(r.token_ids)) - len(r.blocks)) for r in self.running[rank]) <= pool.num_free
            for rank, pool in enumerate(self.pools)
        )

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.add(request)

    def remove(self, request: Request) -> None:
        """Forget a request, wherever it is; its rank learns with the next plan."""
        if request.rank < 0:
            self.waiting.remove(request)
            return
        self._leave_rank(request)

    def admit(self) -> list[Request]:
        """Give running requests the blocks they need next and waiting ones a rank; return those admitted.

        A request that does not fit yet holds up those behind it, so none starves. Requests that lose their blocks to
        older ones wait again.
        """
        for rank in range(len(self.pools)):
            self._grow(rank)
        admitted = []
        while self.waiting:
            request = self.waiting.next()
            open_ranks = [rank for rank in range(len(self.pools)) if self._fits(request, rank)]
            if not open_ranks:
                break
            rank = min(open_ranks, key=lambda r: (sum(q.num_pending_tokens for q in self.running[r]), r))
            self.waiting.remove(request)
            if not request.was_admitted:
                self.waiting.charge(request.client, num_prompt_tokens=request.num_prompt_tokens)
            request.was_admitted = True
            request.rank = rank
            self.pools[rank].grow(request.blocks, len(request.token_ids))
            self.running[rank].append(request)
            admitted.append(request)
        self.num_admissions += len(admitted)
        return admitted

    def _fits(self, request: Request, rank: int) -> bool:
        running, pool = self.running[rank], self.pools[rank]
        if len(running) >= self._max_num_seqs:
            return False
        watermark = math.ceil(_WATERMARK * pool.num_blocks) if running else 0
        return pool.blocks_for(len(request.token_ids)) + watermark <= pool.num_free

    def _grow(self, rank: int) -> None:
        """Let every running request hold its known tokens, the oldest first; preempt the youngest while it cannot."""
        pool = self.pools[rank]
        for request in sorted(self.running[rank], key=_arrival):
            if request.rank != rank:  # preempted for one before it
                continue
            if pool.room(request.blocks) < len(request.token_ids):
                # What rejected drafts have left behind
                for other in self.running[rank]:
                    pool.shrink(other.blocks, len(other.token_ids))
                    other.num_blocks_sent = min(other.num_blocks_sent, len(other.blocks))
            while request.rank == rank and pool.room(request.blocks) < len(request.token_ids):
                self._preempt(max(self.running[rank], key=_arrival))
            if request.rank == rank:
                pool.grow(request.blocks, len(request.token_ids))

    def _preempt(self, request: Request) -> None:
        self._leave_rank(request)
        request.committed_len = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.add(request)

    def lose_kv(self, rank: int, num_blocks: int) -> int:
        """Take note that ``rank`` is another process, with ``num_blocks`` blocks and no KV; return how many wait again.

        Those are replayed as prompts, on whichever rank has room.
        """
        requests = list(self.running[rank])
        for request in requests:
            self._leave_rank(request)
            request.committed_len = 0
            self.waiting.add(request)
        self.num_replays += len(requests)
        self.pools[rank] = BlockPool(num_blocks, self.pools[rank].block_size)
        self._released[rank].clear()
        return len(requests)

    def _leave_rank(self, request: Request) -> None:
        """Take the request's place and blocks away; its rank learns with the next plan."""
        self.running[request.rank].remove(request)
        self.pools[request.rank].shrink(request.blocks, 0)
        self._released[request.rank].append(request.key)
        request.rank, request.num_blocks_sent = -1, 0

    def schedule(
        self,
        generation: int,
        step_id: int,
        drafts: Mapping[int, Sequence[int]],
        budget: ExpertBudget | None = None,
        reach: Mapping[int, Sequence[float]] | None = None,
    ) -> StepPlan | None:
        """Plan the next step; None when no request has a row to run.

        ``drafts``: tokens drafted for decoding requests, by ``Request.key``. ``budget``: of the rows that verify
        them; ``reach``: by key, the probability that each drafted token is reached and right, if the budget asks.
        """
        wanted = _Wanted(drafts, budget, reach or {})
        planned = [self._plan_rank(rank, wanted) for rank in range(len(self.pools))]
        if not any(planned):
            return None
        if all(request.first_budgeted_row is None for requests in planned for request in requests):
            budget = None
        bucket = None if self._padding is None else self._padding.bucket_of(planned)
        ranks = [
            RankPlan(generation, step_id, bucket, requests, self._released[rank], budget)
            for rank, requests in enumerate(planned)
        ]
        self._released = [[] for _ in self.pools]
        return StepPlan(generation, step_id, ranks)

    def prompt_rows(self) -> list[int]:
        """Return how many rows each rank would run of prompts, and of texts to replay, if nothing is drafted."""
        rows = []
        for requests in map(self.planned, range(len(self.pools))):
            num_decoding = sum(request.is_decoding for request in requests)
            pending = sum(request.num_pending_tokens for request in requests if not request.is_decoding)
            rows.append(min(pending, self._max_rows - num_decoding))
        return rows

    def _plan_rank(self, rank: int, wanted: _Wanted) -> list[RequestPlan]:
        num_left = self._max_rows
        plans = []
        # Decoding requests first: a stable sort keeps arrival order within both kinds
        requests = sorted(self.planned(rank), key=lambda r: not r.is_decoding)
        for place, request in enumerate(requests):
            if num_left == 0:
                break
            known = min(request.num_pending_tokens, num_left)
            is_last_chunk = known == request.num_pending_tokens
            draft = list(wanted.drafts.get(request.key, ())) if is_last_chunk else []
            # One token always comes on top of the drafts, so drafting all that is left would be one too many
            # and drafts must not take the rows that others need to go on at all
            others = len(requests) - place - 1
            room = self.pools[rank].room(request.blocks) - request.committed_len - known
            draft = draft[: max(0, min(num_left - known - others, request.num_tokens_left - 1, room))]
            plans.append(self._plan_request(request, known, draft, wanted, is_last_chunk=is_last_chunk))
            num_left -= known + len(draft)
        return plans

    def _plan_request(
        self, request: Request, known: int, draft: list[int], wanted: _Wanted, *, is_last_chunk: bool
    ) -> RequestPlan:
        start = request.committed_len
        num_rows = known + len(draft)
        self.pools[request.rank].grow(request.blocks, start + num_rows)
        first_block, request.num_blocks_sent = request.num_blocks_sent, len(request.blocks)
        first_sampled_row = known - 1 if is_last_chunk and request.num_tokens_left else num_rows
        first_budgeted, reach = wanted.budget_of(request, num_rows - first_sampled_row)
        return RequestPlan(
            request_id=request.key,
            committed_len=start,
            first_block=first_block,
            new_blocks=request.blocks[first_block:],
            token_ids=[*request.token_ids[start : start + known], *draft],
            parents=list(range(-1, num_rows - 1)),
            first_sampled_row=first_sampled_row,
            sampling=request.token_sampling,
            targets=request.targets(known),
            text=request.text_update(is_new=first_block == 0),
            first_budgeted_row=None if first_budgeted is None else first_sampled_row + first_budgeted,
            reach=reach,
        )

    def forget_ranks(self) -> None:
        """After a discarded step: ranks know no block tables, so the next plans carry them whole."""
        for requests in self.running:
            for request in requests:
                request.num_blocks_sent = 0

    def check_integrity(self) -> None:
        """Raise ``RuntimeError`` if any KV block is lost or held twice."""
        for pool, requests in zip(self.pools, self.running, strict=True):
            pool.check_integrity([request.blocks for request in requests])


def _arrival(request: Request) -> int:
    return request.key
