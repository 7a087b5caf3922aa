"""Steps whose plans are made here: prompts, then verifications of so many rows at one context length.

With random weights no draft would be accepted, and what a step costs does not ask: every verification starts from the
same committed tokens, with other drafts. Tokens of a request are of one topic (`random_model`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..router.expert_budget import ExpertBudget
from ..workers.bucket import Padding
from ..workers.plan import RankPlan, RequestPlan
from ..workers.sampling_params import TokenSampling
from .random_model import tokens_of

MOST_ROWS = 8
"""Of a request: a token and seven drafts."""


@dataclass(frozen=True, slots=True)
class FixedSteps:
    """A batch of requests with ``context`` committed tokens each."""

    batch: int
    context: int
    vocab_size: int
    block_size: int
    max_model_len: int
    seed: int = 0

    @property
    def blocks_per_request(self) -> int:
        """KV blocks of each."""
        return -(-(self.context + MOST_ROWS) // self.block_size)

    def prompts(self, max_rows: int) -> Iterator[RankPlan]:
        """Yield the steps that compute the contexts, ``max_rows`` at a time."""
        step_id = 0
        for number in range(self.batch):
            tokens = self.tokens(number)
            for start in range(0, self.context, max_rows):
                part = tokens[start : start + max_rows]
                yield RankPlan(0, step_id, requests=[self._request(number, start, part, first_sampled_row=len(part))])
                step_id += 1

    def tokens(self, number: int) -> list[int]:
        """Return the context of request ``number``."""
        return self._tokens(number, self.context, salt=0)

    def verification(
        self, step_id: int, num_rows: int, budget: ExpertBudget | None = None, *, padded: bool
    ) -> RankPlan:
        """Return a step of ``num_rows`` rows of each request, all of them under ``budget``.

        ``padded``: to the bucket that an engine would choose, if there is one.
        """
        requests = [
            self._request(
                number,
                self.context,
                self._tokens(number, num_rows, salt=1 + step_id),
                first_sampled_row=0,
                first_budgeted_row=None if budget is None else 0,
            )
            for number in range(self.batch)
        ]
        bucket = Padding(self.block_size, self.max_model_len).bucket_of([requests]) if padded else None
        return RankPlan(0, 1_000_000 + step_id, bucket=bucket, requests=requests, budget=budget)

    def _tokens(self, number: int, count: int, salt: int) -> list[int]:
        generator = torch.Generator().manual_seed(hash((self.seed, number, salt)) % (1 << 62))
        return tokens_of(self.seed + number, count, self.vocab_size, generator)

    def _request(
        self,
        number: int,
        start: int,
        tokens: list[int],
        *,
        first_sampled_row: int,
        first_budgeted_row: int | None = None,
    ) -> RequestPlan:
        first = number * self.blocks_per_request
        blocks = list(range(first, first + self.blocks_per_request))
        chain = _chain(number, start, blocks, tokens, first_sampled_row)
        return replace(chain, first_budgeted_row=first_budgeted_row)


def whole_prompt(tokens: Sequence[int], block_size: int) -> RankPlan:
    """Return the step that computes one text alone, and yields no token."""
    blocks = list(range(-(-len(tokens) // block_size)))
    return RankPlan(0, 0, requests=[_chain(0, 0, blocks, list(tokens), len(tokens))])


def _chain(number: int, start: int, blocks: list[int], tokens: list[int], first_sampled_row: int) -> RequestPlan:
    return RequestPlan(
        request_id=number,
        committed_len=start,
        first_block=0,
        new_blocks=blocks,
        token_ids=tokens,
        parents=list(range(-1, len(tokens) - 1)),
        first_sampled_row=first_sampled_row,
        sampling=TokenSampling(temperature=0.0),
    )
