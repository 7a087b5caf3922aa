"""Decide which rows every rank runs next. State in, plan out: no clock, no processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from ...workers.plan import RankPlan, RequestPlan, StepPlan
from .block_pool import BlockPool
from .request import Request


class Scheduler:
    """Continuous batching over several ranks: running requests first, then waiting ones in order of arrival.

    A request stays on the rank that admitted it. Prompts are computed in chunks within ``max_num_batched_tokens``;
    decoding requests (their last token and drafts) come first, so a long prompt never stalls them.
    """

    def __init__(self, pools: Sequence[BlockPool], max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.pools = list(pools)
        self.running: list[list[Request]] = [[] for _ in pools]
        self.waiting: deque[Request] = deque()
        self._released: list[list[int]] = [[] for _ in pools]
        self._max_num_seqs, self._max_rows = max_num_seqs, max_num_batched_tokens

    @property
    def num_running(self) -> int:
        """Requests that hold KV."""
        return sum(map(len, self.running))

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.waiting.append(request)

    def remove(self, request: Request) -> None:
        """Forget a request, wherever it is; its rank learns with the next plan."""
        if request.rank < 0:
            self.waiting.remove(request)
            return
        self.running[request.rank].remove(request)
        self.pools[request.rank].release(request.blocks, request.max_total_tokens)
        self._released[request.rank].append(request.key)
        request.blocks = []

    def admit(self) -> list[Request]:
        """Give waiting requests a rank while one has a place and blocks; return those admitted.

        First come, first served: a request that does not fit yet holds up those behind it, so none starves.
        """
        admitted = []
        while self.waiting:
            request = self.waiting[0]
            open_ranks = [
                rank
                for rank, pool in enumerate(self.pools)
                if len(self.running[rank]) < self._max_num_seqs and pool.can_reserve(request.max_total_tokens)
            ]
            if not open_ranks:
                break
            rank = min(open_ranks, key=lambda r: (sum(q.num_pending_tokens for q in self.running[r]), r))
            self.waiting.popleft()
            request.rank = rank
            self.pools[rank].reserve(request.max_total_tokens)
            self.running[rank].append(request)
            admitted.append(request)
        return admitted

    def schedule(self, generation: int, step_id: int, drafts: Mapping[int, Sequence[int]]) -> StepPlan | None:
        """Plan the next step; None when no request has a row to run.

        ``drafts``: tokens drafted for decoding requests, by ``Request.key``.
        """
        planned = [self._plan_rank(rank, drafts) for rank in range(len(self.pools))]
        if not any(planned):
            return None
        bucket = max(1, *(sum(len(request.token_ids) for request in requests) for requests in planned))
        ranks = [
            RankPlan(generation, step_id, bucket, requests=requests, released=self._released[rank])
            for rank, requests in enumerate(planned)
        ]
        self._released = [[] for _ in self.pools]
        return StepPlan(generation, step_id, ranks)

    def _plan_rank(self, rank: int, drafts: Mapping[int, Sequence[int]]) -> list[RequestPlan]:
        budget = self._max_rows
        plans = []
        # Decoding requests first: a stable sort keeps arrival order within both kinds
        requests = sorted(self.running[rank], key=lambda r: not r.is_decoding)
        for place, request in enumerate(requests):
            if budget == 0:
                break
            known = min(request.num_pending_tokens, budget)
            is_last_chunk = known == request.num_pending_tokens
            draft = list(drafts.get(request.key, ())) if is_last_chunk else []
            # One token always comes on top of the drafts, so drafting all that is left would be one too many
            # and drafts must not take the rows that others need to go on at all
            others = len(requests) - place - 1
            draft = draft[: max(0, min(budget - known - others, request.num_tokens_left - 1))]
            plans.append(self._plan_request(request, known, draft, is_last_chunk))
            budget -= known + len(draft)
        return plans

    def _plan_request(self, request: Request, known: int, draft: list[int], is_last_chunk: bool) -> RequestPlan:
        start = request.committed_len
        num_rows = known + len(draft)
        self.pools[request.rank].grow(request.blocks, start + num_rows)
        first_block, request.num_blocks_sent = request.num_blocks_sent, len(request.blocks)
        return RequestPlan(
            request_id=request.key,
            committed_len=start,
            first_block=first_block,
            new_blocks=request.blocks[first_block:],
            token_ids=[*request.token_ids[start : start + known], *draft],
            parents=list(range(-1, num_rows - 1)),
            first_sampled_row=known - 1 if is_last_chunk and request.num_tokens_left else num_rows,
            sampling=request.token_sampling,
            targets=request.targets(known),
            text=request.text_update(is_new=first_block == 0),
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
