"""Lay the rows of one rank's plan out as tensors: packed, no padding between requests.

Shapes: T rows of the step, R requests of a group, N rows of a request, S context slots of a request (committed tokens
and its own rows).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from .context_pages import ContextPages
from .plan import RankPlan, RequestPlan
from .sampling_params import TokenSampling

WIDE_ROWS = 32
"""Requests with more rows attend alone; others whose contexts are of a size share a padded attention call."""

_FEW_SLOTS = 4096
"""Whose padding costs less than another call."""


@dataclass(slots=True)
class AttentionGroup:
    """Requests that attend in one call, padded to the longest of them."""

    rows: torch.Tensor
    """[R, N] packed row of each padded query; padding repeats row 0 of its request."""
    scatter: torch.Tensor
    """[sum N] places of the real queries in the flattened [R * N] result."""
    packed_rows: torch.Tensor
    """[sum N] the packed rows those places belong to."""
    num_slots: int
    """R x S: how many gathered context slots are this group's."""
    query_positions: torch.Tensor
    """[R, N]"""
    key_positions: torch.Tensor
    """[R, S]"""
    visible: torch.Tensor
    """[R, 1, N, S] bool: what each query may attend to without a sliding window."""
    is_whole: bool
    """The [R, N] queries are the step's rows in order, none padded."""
    sees_all: bool
    """Every query may attend to all S slots, as one row of one request may."""
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor | None:
        """Return the visibility under a sliding window of ``window`` tokens, None for all; layers share it."""
        if self.sees_all and (window is None or self.visible.shape[-1] <= window):
            return None
        if window not in self.masks:
            if window is None:
                self.masks[window] = self.visible
            else:
                near = self.query_positions[:, :, None] - self.key_positions[:, None, :] < window
                self.masks[window] = self.visible & near[:, None]
        return self.masks[window]


@dataclass(slots=True)
class PackedRows:
    """All rows of one rank's step."""

    token_ids: torch.Tensor
    """[T]"""
    positions: torch.Tensor
    """[T] absolute positions, which follow from the parents."""
    valid: torch.Tensor | None
    """[T] bool, False on padding rows; None when there are none."""
    write_slots: torch.Tensor
    """[T] KV slot of each row."""
    gather_slots: torch.Tensor
    """[sum of R x S] KV slots that the groups read, in group order."""
    gather_span: slice | None
    """The same slots where they follow one another, and so need not be copied."""
    groups: list[AttentionGroup]
    sampled_rows: torch.Tensor
    """[sum over requests of N - first_sampled_row] packed rows that yield a token."""
    scored_rows: torch.Tensor
    """[sum of targets] packed rows whose targets' log-probabilities are wanted."""
    pages: ContextPages | None = None
    """The pool's blocks that are read in place; there are no groups then, and nothing is gathered."""

    @property
    def logit_rows(self) -> torch.Tensor:
        """Rows that need logits: the sampled ones, then the scored ones."""
        return torch.cat([self.sampled_rows, self.scored_rows]) if len(self.scored_rows) else self.sampled_rows

    def to(self, device: torch.device) -> PackedRows:
        """Return the same layout on ``device``."""
        if device.type == "cpu":
            return self
        moved = _moved(self, device)
        return replace(self, **moved, groups=[replace(g, **_moved(g, device), masks={}) for g in self.groups])


def _moved(layout: PackedRows | AttentionGroup, device: torch.device) -> dict[str, Any]:
    """Return the tensors of a layout, on ``device``."""
    values = {spec.name: getattr(layout, spec.name) for spec in fields(layout)}
    return {name: value.to(device) for name, value in values.items() if isinstance(value, torch.Tensor)}


def depths(parents: Sequence[int]) -> list[int]:
    """Return each row's depth in its tree; 1 for a row that continues the last committed token."""
    result: list[int] = []
    for row, parent in enumerate(parents):
        assert -1 <= parent < row, "a row's parent precedes it"
        result.append(1 if parent < 0 else result[parent] + 1)
    return result


def _is_chain(parents: Sequence[int]) -> bool:
    return all(parent == row - 1 for row, parent in enumerate(parents))


def own_visibility(parents: Sequence[int]) -> np.ndarray:
    """Return [N, N] bool: the rows of the request that each row sees, itself and its ancestors."""
    n = len(parents)
    if _is_chain(parents):
        return np.tril(np.ones((n, n), dtype=bool))
    seen = np.eye(n, dtype=bool)
    for row, parent in enumerate(parents):
        if parent >= 0:
            seen[row] |= seen[parent]
    return seen


def context_slots(table: np.ndarray, block_size: int, length: int) -> np.ndarray:
    """Return the KV slots of the first ``length`` tokens of a request whose blocks are ``table``."""
    blocks = table[: -(-length // block_size)]
    return (blocks[:, None] * block_size + np.arange(block_size)).reshape(-1)[:length]


def pack(plan: RankPlan, tables: dict[int, np.ndarray], block_size: int, scratch_slot: int) -> PackedRows:
    """Lay out ``plan``; ``tables`` holds each request's KV blocks.

    An empty plan becomes one padding row in ``scratch_slot``, so that an idle rank runs the same collectives.
    """
    if not plan.requests:
        return _padding_row(scratch_slot)
    token_ids: list[int] = []
    sampled: list[int] = []
    scored: list[int] = []
    positions: list[np.ndarray] = []
    slots: list[np.ndarray] = []
    starts: list[int] = []
    for request in plan.requests:
        start, n = len(token_ids), len(request.token_ids)
        starts.append(start)
        token_ids += request.token_ids
        sampled += range(start + request.first_sampled_row, start + n)
        scored += range(start, start + len(request.targets))
        positions.append(request.committed_len - 1 + np.asarray(depths(request.parents)))
        slots.append(context_slots(tables[request.request_id], block_size, request.committed_len + n))
    wide = [i for i, request in enumerate(plan.requests) if len(request.token_ids) > WIDE_ROWS]
    narrow = [i for i, request in enumerate(plan.requests) if len(request.token_ids) <= WIDE_ROWS]
    gathered: list[np.ndarray] = []
    groups = [
        _group([plan.requests[i] for i in members], [starts[i] for i in members], [positions[i] for i in members],
               [slots[i] for i in members], gathered, len(token_ids))
        for members in [*_alike(narrow, [len(x) for x in slots]), *([i] for i in wide)]
    ]  # fmt: skip
    slots_read = np.concatenate(gathered)
    write = [s[request.committed_len :] for s, request in zip(slots, plan.requests, strict=True)]
    return PackedRows(
        token_ids=torch.tensor(token_ids),
        positions=torch.from_numpy(np.concatenate(positions)),
        valid=None,
        write_slots=torch.from_numpy(np.concatenate(write)),
        gather_slots=torch.from_numpy(slots_read),
        gather_span=_span(slots_read),
        groups=groups,
        sampled_rows=torch.tensor(sampled, dtype=torch.int64),
        scored_rows=torch.tensor(scored, dtype=torch.int64),
    )


def _alike(members: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """Return ``members`` in groups whose shortest context is at least half as long as the longest, in their order.

    ``lengths``: of all contexts. So padding at most doubles what a step gathers, unless that is little.
    """
    if not members or len(members) * max(lengths[i] for i in members) <= _FEW_SLOTS:
        return [list(members)] if members else []
    groups: dict[int, list[int]] = {}
    longest = 0
    for i in sorted(members, key=lambda i: -lengths[i]):
        if 2 * lengths[i] < longest or not groups:
            longest = lengths[i]
            groups[longest] = []
        groups[longest].append(i)
    return [sorted(group) for group in groups.values()]


def _span(slots: np.ndarray) -> slice | None:
    """Return ``slots`` as a slice if each follows the one before."""
    first, last = int(slots[0]), int(slots[-1])
    is_span = last - first + 1 == len(slots) and bool((np.diff(slots) == 1).all())
    return slice(first, last + 1) if is_span else None


def _group(
    requests: list[RequestPlan],
    starts: list[int],
    positions: list[np.ndarray],
    slots: list[np.ndarray],
    gathered: list[np.ndarray],
    num_rows_of_step: int,
) -> AttentionGroup:
    r, n, s = len(requests), max(len(p) for p in positions), max(len(x) for x in slots)
    rows = np.zeros((r, n), dtype=np.int64)
    query_positions = np.zeros((r, n), dtype=np.int64)
    key_positions = np.zeros((r, s), dtype=np.int64)
    visible = np.zeros((r, n, s), dtype=bool)
    slot_table = np.zeros((r, s), dtype=np.int64)
    scatter, packed = [], []
    for i, request in enumerate(requests):
        committed, num_rows = request.committed_len, len(request.token_ids)
        rows[i] = starts[i]
        rows[i, :num_rows] = np.arange(starts[i], starts[i] + num_rows)
        query_positions[i, :num_rows] = positions[i]
        key_positions[i, :committed] = np.arange(committed)
        key_positions[i, committed : committed + num_rows] = positions[i]
        visible[i, :num_rows, :committed] = True
        visible[i, :num_rows, committed : committed + num_rows] = own_visibility(request.parents)
        # A padded query sees one slot: softmax over nothing is NaN
        visible[i, num_rows:, 0] = True
        slot_table[i, : len(slots[i])] = slots[i]
        slot_table[i, len(slots[i]) :] = slots[i][0]
        scatter.append(np.arange(num_rows) + i * n)
        packed.append(rows[i, :num_rows])
    gathered.append(slot_table.reshape(-1))
    return AttentionGroup(
        rows=torch.from_numpy(rows),
        scatter=torch.from_numpy(np.concatenate(scatter)),
        packed_rows=torch.from_numpy(np.concatenate(packed)),
        num_slots=r * s,
        query_positions=torch.from_numpy(query_positions),
        key_positions=torch.from_numpy(key_positions),
        visible=torch.from_numpy(visible)[:, None],
        is_whole=r * n == sum(map(len, positions)) == num_rows_of_step,
        sees_all=bool(visible.all()),
    )


def largest_step(max_rows: int, num_ranks: int, block_size: int) -> PackedRows:
    """Return a step of ``max_rows`` sampled rows beside those that the other ranks might send, to see what it takes.

    All are padding to the experts: which of them a row visits is not known, what it takes to move rows is. There need
    be no pool yet.
    """
    requests = [
        RequestPlan(
            request_id=rank,
            committed_len=0,
            first_block=0,
            new_blocks=[],
            token_ids=[0] * max_rows,
            parents=list(range(-1, max_rows - 1)),
            first_sampled_row=max_rows if rank else 0,
            sampling=TokenSampling(),
        )
        for rank in range(num_ranks)
    ]
    blocks = np.arange(-(-max_rows // block_size))
    rows = pack(RankPlan(-1, -1, requests=requests), dict.fromkeys(range(num_ranks), blocks), block_size, 0)
    return replace(rows, valid=torch.zeros(len(rows.token_ids), dtype=torch.bool))


def _padding_row(scratch_slot: int) -> PackedRows:
    zero = torch.zeros(1, dtype=torch.int64)
    group = AttentionGroup(
        rows=zero[None],
        scatter=zero,
        packed_rows=zero,
        num_slots=1,
        query_positions=zero[None],
        key_positions=zero[None],
        visible=torch.ones(1, 1, 1, 1, dtype=torch.bool),
        is_whole=True,
        sees_all=True,
    )
    return PackedRows(
        token_ids=zero,
        positions=zero,
        valid=torch.zeros(1, dtype=torch.bool),
        write_slots=zero + scratch_slot,
        gather_slots=zero + scratch_slot,
        gather_span=slice(scratch_slot, scratch_slot + 1),
        groups=[group],
        sampled_rows=torch.zeros(0, dtype=torch.int64),
        scored_rows=torch.zeros(0, dtype=torch.int64),
    )
