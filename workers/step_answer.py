"""What the host reads of a padded step: on its way while the device still computes, and once it is there.

Shapes: R requests of the bucket, N rows of each, T = R x N rows, L MoE layers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .computed_step import ComputedStep
from .plan import Bucket, LayerCounts, RankPlan
from .rows import depths
from .static_sampler import samples_plainly
from .step_budget import kept_weights


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


@dataclass(frozen=True, slots=True)
class SentAnswer:
    """An `Answer` that the device copies to the host when its step has ended."""

    event: torch.cuda.Event | None
    """Behind the copy; None where nothing is under way."""
    numbers: np.ndarray
    """int64, where it arrives: tokens [T], experts [L], rows sent [L], and where the device walks along drafts what
    requests emit [R], [R, N], [R, N]."""
    kept: np.ndarray
    """[L, T] f32, likewise; no layers without a budget."""
    bucket: Bucket
    num_layers: int
    walks: bool
    wire_bytes: list[int]
    num_collectives: int
    collectives_crc: int

    def has_arrived(self) -> bool:
        """Whether `read` has nothing to wait for."""
        return self.event is None or self.event.query()

    def read(self) -> Answer:
        """Return the answer, whose arrays the step after the next of its shape overwrites; waits for the device."""
        if self.event is not None:
            self.event.synchronize()
        bucket = self.bucket
        ends = np.cumsum([bucket.total_rows, self.num_layers, self.num_layers, bucket.num_requests * self.walks])
        tokens, experts, rows_sent, num_emitted, walks = np.split(self.numbers, ends)
        accepted = None
        if self.walks:
            emitted, path = walks.reshape(2, bucket.num_requests, bucket.num_rows)
            accepted = np.concatenate([emitted, path, num_emitted[:, None]], axis=1)
        return Answer(
            tokens.reshape(bucket.num_requests, bucket.num_rows),
            accepted,
            experts.tolist(),
            rows_sent.tolist(),
            self.wire_bytes,
            self.kept.reshape(-1, bucket.num_requests, bucket.num_rows),
            self.num_collectives,
            self.collectives_crc,
        )
