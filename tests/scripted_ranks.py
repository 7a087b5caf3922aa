"""Ranks without a model: each token follows from the whole context as the KV slots hold it, so lost KV shows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from penstock.cluster.engine.ranks import Replacement
from penstock.workers.model_info import ModelInfo, RankInfo
from penstock.workers.plan import LayerCounts, RankPlan, RankResult, RequestPlan, StepPlan, StepResult
from penstock.workers.sampler import accept

FIRST, VOCAB = 4, 9
"""Few tokens, so that n-gram drafts are accepted now and then; the ids below are special in the tests' tokenizer."""


POISON = 1000
"""What blocks hold that their request has left, beside any sum of tokens."""
WINDOW = 200
"""How far back a token looks; contexts of the tests about KV are shorter."""


def next_token(context: Sequence[int], length: int) -> int:
    """Return what the ranks answer to a context of ``length`` tokens, the last of which are ``context``."""
    return FIRST + (sum(context[-WINDOW:]) * 31 + context[-1] * 7 + length) % (VOCAB - FIRST)


def continuation(prompt: Sequence[int], num_tokens: int) -> list[int]:
    """Return the output that a prompt must get."""
    context = list(prompt)
    for _ in range(num_tokens):
        context.append(next_token(context[-WINDOW:], len(context)))
    return context[len(prompt) :]


class ScriptedRanks:
    """Obeys plans as a rank does: block tables per generation, tokens written to slots and read back from them."""

    def __init__(
        self, num_kv_blocks: Sequence[int], block_size: int, max_model_len: int, *, step_s: float = 0.0
    ) -> None:
        zeros = dict.fromkeys(ModelInfo.__dataclass_fields__, 0)
        limits = {"vocab_size": VOCAB, "max_model_len": max_model_len, "eos_token_ids": ()}
        limits |= {"num_moe_layers": 1, "num_experts": 8, "num_experts_per_tok": 2}
        model = ModelInfo(**{**zeros, **limits})  # type: ignore[arg-type]
        facts = dict.fromkeys(RankInfo.__dataclass_fields__, 0)
        self.infos = [
            RankInfo(**{**facts, "rank": rank, "model": model, "num_kv_blocks": blocks})  # type: ignore[arg-type]
            for rank, blocks in enumerate(num_kv_blocks)
        ]
        self._block_size, self._step_s = block_size, step_s
        self._tables: list[dict[int, list[int]]] = [{} for _ in num_kv_blocks]
        self._slots: list[dict[int, int]] = [{} for _ in num_kv_blocks]
        self._owners: list[dict[int, int]] = [{} for _ in num_kv_blocks]
        """By block: the request that was given it last, the only one that may write there."""
        self._sampled: list[dict[int, int]] = [{} for _ in num_kv_blocks]
        self._generations = [-1] * len(num_kv_blocks)

    def step(self, plan: StepPlan) -> StepResult:
        time.sleep(self._step_s)
        return StepResult([self._run(rank, part) for rank, part in enumerate(plan.ranks)], self._step_s)

    def recover(self, generation: int) -> Sequence[Replacement]:
        return ()

    def close(self) -> None:
        pass

    def _run(self, rank: int, plan: RankPlan) -> RankResult:
        tables, owners, slots = self._tables[rank], self._owners[rank], self._slots[rank]
        plan = replace(plan, requests=[request.filled_in(self._sampled[rank]) for request in plan.requests])
        if plan.generation != self._generations[rank]:
            tables.clear()
            self._generations[rank] = plan.generation
        for key in plan.released:
            for block in tables.pop(key, []):
                if owners[block] == key:
                    slots.update(dict.fromkeys(range(block * self._block_size, (block + 1) * self._block_size), POISON))
        for request in plan.requests:
            owners.update(dict.fromkeys(request.new_blocks, request.request_id))
            tables[request.request_id] = tables.get(request.request_id, [])[: request.first_block] + request.new_blocks
        held = [block for request in plan.requests for block in tables[request.request_id]]
        assert len(held) == len(set(held)), "two requests share a block"
        # All write before any reads, as in a layer of a model
        for request in plan.requests:
            for place, token in enumerate(request.token_ids, start=request.committed_len):
                slot = self._slot(tables[request.request_id], place)
                assert owners[slot // self._block_size] == request.request_id, "the block is another's"
                slots[slot] = token
        num_rows = sum(len(request.token_ids) for request in plan.requests)
        answers = [accept(request, self._sample(rank, request))[0] for request in plan.requests]
        sampled = zip(plan.requests, answers, strict=True)
        self._sampled[rank] = {request.request_id: tokens[-1] for request, tokens in sampled if tokens}
        return RankResult(
            generation=plan.generation,
            step_id=plan.step_id,
            rank=rank,
            token_ids=answers,
            counts=LayerCounts([num_rows], [min(8, 2 * num_rows)], [0], [0], [0]),
            num_collectives=0,
            collectives_crc=0,
            thread_time_s=0.0,
            ran_s=0.0,
        )

    def _sample(self, rank: int, request: RequestPlan) -> list[int]:
        table = self._tables[rank][request.request_id]
        end = request.committed_len + len(request.token_ids)
        first = request.committed_len + request.first_sampled_row
        start = max(0, first + 1 - WINDOW)
        context = [self._slots[rank][self._slot(table, place)] for place in range(start, end)]
        return [next_token(context[: place + 1 - start], place + 1) for place in range(first, end)]

    def _slot(self, table: Sequence[int], place: int) -> int:
        return table[place // self._block_size] * self._block_size + place % self._block_size
