"""Steps of chosen sizes over contexts of chosen lengths: what a rank's time depends on, without an engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..router.expert_budget import ExpertBudget
from ..workers.bucket import bucket_of
from ..workers.plan import RankPlan, RequestPlan
from ..workers.runner import ModelRunner
from ..workers.sampling_params import TokenSampling

_CHUNK = 512
"""Rows of a prompt that are computed at once."""
_MOST_DRAFTS = 16


class FixedSteps:
    """Requests with ``context`` tokens each in one rank's KV. Their tokens are random, or all those of ``text``.

    A step commits nothing, so that any number of them may follow each other; each has other tokens.
    """

    def __init__(
        self,
        runner: ModelRunner,
        *,
        num_requests: int,
        context: int,
        seed: int,
        text: Sequence[int] | None = None,
    ) -> None:
        self._runner, self.num_requests, self.context = runner, num_requests, context
        self._random = random.Random(seed)
        self._text = text
        self._generation = runner.generation + 1
        self._step_id = 0

    def _tokens(self, start: int, number: int) -> list[int]:
        if self._text is not None:
            return list(self._text[start : start + number])
        return [self._random.randrange(self._runner.info.model.vocab_size) for _ in range(number)]

    def fill(self) -> None:
        """Compute the contexts, one after the other; raises ``ValueError`` if the pool has no room for them."""
        size = self._runner.cache.block_size
        blocks = -(-(self.context + _MOST_DRAFTS) // size)
        if blocks * self.num_requests > self._runner.info.num_kv_blocks:
            raise ValueError(f"{self.num_requests} contexts of {self.context} tokens do not fit the KV pool")
        for key in range(self.num_requests):
            for start in range(0, self.context, _CHUNK):
                number = min(_CHUNK, self.context - start)
                table = list(range(key * blocks, (key + 1) * blocks)) if start == 0 else []
                first = 0 if start == 0 else blocks
                self._step(
                    [
                        RequestPlan(
                            key,
                            start,
                            first,
                            table,
                            self._tokens(start, number),
                            list(range(-1, number - 1)),
                            number,
                            TokenSampling(),
                        )
                    ]
                )
        self._blocks = blocks

    def _step(self, requests: list[RequestPlan]) -> None:
        self._runner.step(RankPlan(self._generation, self._step_id, requests=requests))
        self._step_id += 1

    def plan(self, num_rows: int, budget: ExpertBudget | None = None, *, padded: bool = False) -> RankPlan:
        """Return a step of ``num_rows`` rows of each request, all of them under ``budget``.

        ``padded``: to a bucket, as ranks that replay graphs are told; raises ``ValueError`` where none holds it.
        """
        requests = [
            RequestPlan(
                key,
                self.context,
                self._blocks,
                [],
                self._tokens(self.context, num_rows),
                list(range(-1, num_rows - 1)),
                0,
                TokenSampling(),
                first_budgeted_row=None if budget is None else 0,
            )
            for key in range(self.num_requests)
        ]
        bucket = None
        if padded:
            bucket = bucket_of([requests], self._runner.cache.block_size, self._runner.max_model_len)
            if bucket is None:
                raise ValueError(f"{self.num_requests} requests of {num_rows} rows fit no bucket")
        self._step_id += 1
        return RankPlan(self._generation, self._step_id, requests=requests, budget=budget, bucket=bucket)


@dataclass(frozen=True, slots=True)
class StepBytes:
    """What a step must read of the device's memory at least."""

    dense: int
    experts: int
    context: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.dense + self.experts + self.context


def step_bytes(runner: ModelRunner, experts: Sequence[float], num_requests: int, context: int) -> StepBytes:
    """Return the bytes of a step whose layers read ``experts`` distinct experts each.

    Dense weights count once, but for the table of embeddings, of which a step reads its rows' alone, unless the logits
    are made with it.
    """
    info = runner.info
    inputs: Any = runner.model.get_input_embeddings()
    outputs: Any = runner.model.get_output_embeddings()
    is_shared = outputs is not None and outputs.weight.data_ptr() == inputs.weight.data_ptr()
    dense = info.dense_bytes - (0 if is_shared else inputs.weight.nbytes)
    read = sum(number * size for number, size in zip(experts, info.bytes_per_expert, strict=True))
    kept = num_requests * context * info.kv_block_bytes // runner.cache.block_size
    return StepBytes(dense, round(read), kept)
