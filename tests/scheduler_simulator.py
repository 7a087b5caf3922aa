"""Traffic over a scheduler: ranks that obey its plans, and every plan checked."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from penstock.cluster.engine.block_pool import BlockPool
from penstock.cluster.engine.request import Request
from penstock.cluster.engine.scheduler import Scheduler
from penstock.cluster.speculation.options import AUTO
from penstock.workers.plan import RankPlan, StepPlan
from penstock.workers.sampling_params import SamplingParams, TokenSampling


def make_request(key: int, num_prompt: int, max_tokens: int) -> Request:
    return Request(
        request_id=str(key),
        key=key,
        sampling=SamplingParams(),
        speculation=AUTO,
        token_sampling=TokenSampling(seed=key),
        token_ids=[1000 * key + i for i in range(num_prompt)],
        num_prompt_tokens=num_prompt,
        max_total_tokens=num_prompt + max_tokens,
        arrival_s=0.0,
    )


def make_scheduler(
    num_blocks: int = 64, block_size: int = 4, max_num_seqs: int = 4, max_rows: int = 16, num_ranks: int = 1
) -> Scheduler:
    return Scheduler([BlockPool(num_blocks, block_size) for _ in range(num_ranks)], max_num_seqs, max_rows)


@dataclass
class Rank:
    """A rank that obeys plans: its block tables, and the token whose KV each slot holds."""

    block_size: int
    tables: dict[int, list[int]] = field(default_factory=dict)
    slots: dict[int, tuple[int, int]] = field(default_factory=dict)
    generation: int = -1

    def run(self, plan: RankPlan) -> None:
        if plan.generation != self.generation:
            self.tables.clear()
            self.generation = plan.generation
        for key in plan.released:
            self.tables.pop(key, None)
        for part in plan.requests:
            if part.request_id not in self.tables:
                assert part.first_block == 0, "a rank that knows nothing is told everything"
            table = self.tables.get(part.request_id, [])
            assert part.first_block <= len(table)
            self.tables[part.request_id] = table[: part.first_block] + part.new_blocks
        shared = [block for part in plan.requests for block in self.tables[part.request_id]]
        assert len(shared) == len(set(shared)), "two requests share a block"
        for part in plan.requests:
            table = self.tables[part.request_id]
            for row, token in enumerate(part.token_ids):
                where = part.committed_len + row
                slot = table[where // self.block_size] * self.block_size + where % self.block_size
                self.slots[slot] = (part.request_id, token)

    def context(self, key: int, length: int) -> list[tuple[int, int]]:
        table = self.tables[key]
        return [self.slots[table[i // self.block_size] * self.block_size + i % self.block_size] for i in range(length)]


class Simulation:
    """Drives a scheduler as the engine does, with ranks that sample by chance, and checks every plan."""

    def __init__(self, rng: random.Random, num_ranks: int, num_blocks: int, max_num_seqs: int, max_rows: int) -> None:
        self.rng = rng
        self.max_rows, self.max_num_seqs, self.block_size = max_rows, max_num_seqs, rng.choice([1, 3, 4])
        self.scheduler = make_scheduler(num_blocks, self.block_size, max_num_seqs, max_rows, num_ranks)
        self.ranks = [Rank(self.block_size) for _ in range(num_ranks)]
        self.live: dict[int, Request] = {}
        self.order: list[int] = []
        self.key = self.generation = self.step_id = 0

    def add(self) -> None:
        pool = min(self.scheduler.pools, key=lambda pool: pool.num_blocks)  # every pool holds the longest request
        largest = min(40, pool.num_blocks * pool.block_size)
        total = self.rng.randint(2, largest)
        num_prompt = self.rng.randint(1, total - 1)
        request = make_request(self.key, num_prompt, total - num_prompt)
        self.live[self.key] = request
        self.key += 1
        self.scheduler.add(request)

    def finish(self, request: Request) -> None:
        self.scheduler.remove(request)
        del self.live[request.key]

    def step(self) -> None:
        oldest = {
            rank: min(running, key=lambda r: r.key) for rank, running in enumerate(self.scheduler.running) if running
        }
        admitted = [request.key for request in self.scheduler.admit()]
        waiting = [request.key for request in self.scheduler.waiting]
        assert admitted + waiting == sorted(admitted + waiting), "first come, first served"
        assert all(request.rank == rank for rank, request in oldest.items()), "the oldest keeps its blocks"
        for request in self.live.values():
            assert request.rank >= 0 or (request.committed_len, request.blocks) == (0, [])
        drafts = {
            request.key: [self.rng.randrange(5) for _ in range(self.rng.randint(0, 9))]
            for request in self.live.values()
            if request.rank >= 0 and request.is_decoding and self.rng.random() < 0.7
        }
        plan = self.scheduler.schedule(self.generation, self.step_id, drafts)
        if plan is None:
            assert not self.live
            return
        self.check(plan, drafts)
        for rank, part in zip(self.ranks, plan.ranks, strict=True):
            rank.run(part)
        if self.rng.random() < 0.1:
            self.generation += 1
            self.scheduler.forget_ranks()
            if self.rng.random() < 0.3:
                self.lose(self.rng.randrange(len(self.ranks)))
            return
        self.step_id += 1
        self.commit(plan)

    def lose(self, rank: int) -> None:
        """Another process is ``rank``: it knows nothing, and may have another number of blocks."""
        keys = {request.key for request in self.scheduler.running[rank]}
        lengths = {request.key: request.committed_len for request in self.live.values()}
        num_blocks = self.scheduler.pools[rank].num_blocks + self.rng.choice([0, 1])
        assert self.scheduler.lose_kv(rank, num_blocks) == len(keys)
        assert self.scheduler.pools[rank].num_free == num_blocks
        waiting = [request.key for request in self.scheduler.waiting]
        assert keys <= set(waiting)
        assert waiting == sorted(waiting), "in their places by arrival"
        for request in self.live.values():
            assert request.committed_len == (0 if request.key in keys else lengths[request.key])
        self.ranks[rank] = Rank(self.block_size)

    def check(self, plan: StepPlan, drafts: dict[int, list[int]]) -> None:
        assert len(plan.ranks) == len(self.ranks)
        rows = [sum(len(part.token_ids) for part in rank.requests) for rank in plan.ranks]
        assert max(rows) <= self.max_rows
        assert {(r.generation, r.step_id, r.bucket) for r in plan.ranks} == {(self.generation, self.step_id, None)}
        for rank, part in enumerate(plan.ranks):
            assert len(self.scheduler.running[rank]) <= self.max_num_seqs
            decoding = [self.live[p.request_id].is_decoding for p in part.requests]
            assert decoding == sorted(decoding, reverse=True), "decoding requests come first"
            if not all(decoding):
                served = {p.request_id for p in part.requests}
                assert all(r.key in served for r in self.scheduler.running[rank] if r.is_decoding)
            for p in part.requests:
                request = self.live[p.request_id]
                assert request.rank == rank
                assert p.committed_len == request.committed_len
                assert p.parents == list(range(-1, len(p.token_ids) - 1))
                known = request.token_ids[request.committed_len :][: len(p.token_ids)]
                draft = p.token_ids[len(known) :]
                assert p.token_ids[: len(known)] == known
                assert known, "a planned request always advances"
                if len(known) < request.num_pending_tokens:
                    assert p.first_sampled_row == len(p.token_ids)
                    assert not draft
                else:
                    assert p.first_sampled_row == len(known) - 1
                assert draft == drafts.get(request.key, [])[: len(draft)]
                assert len(request.token_ids) + len(draft) + 1 <= request.max_total_tokens
                assert p.sampling is request.token_sampling
                assert len(request.blocks) <= -(-request.max_total_tokens // self.block_size), "no more than it may use"

    def commit(self, plan: StepPlan) -> None:
        for part in (p for rank in plan.ranks for p in rank.requests):
            request = self.live[part.request_id]
            num_drafted = len(part.token_ids) - part.first_sampled_row - 1
            if num_drafted < 0:
                request.committed_len += len(part.token_ids)
                continue
            accepted = self.rng.randint(0, num_drafted)
            request.token_ids += [*part.token_ids[part.first_sampled_row + 1 :][:accepted], 77]
            request.committed_len += part.first_sampled_row + 1 + accepted
            # What is committed is what the slots hold, over all the request's blocks
            rank = self.ranks[request.rank]
            expected = [(request.key, token) for token in request.token_ids[: request.committed_len]]
            assert rank.context(request.key, request.committed_len) == expected
            if request.num_tokens_left == 0 or self.rng.random() < 0.05:
                self.finish(request)
        self.scheduler.check_integrity()
