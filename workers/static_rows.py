"""The rows of a step as tensors whose shapes depend on a bucket alone, laid out on the device.

A captured graph replays the same operations on the same addresses. So what changes from step to step is written into
one buffer, and everything else (positions, KV slots, masks) is computed from it on the device, in the graph. Requests
are padded to the bucket's, and their rows and contexts too: padding rows are not valid, so that they reach no expert
and count nowhere, and write their KV to a scratch slot.

Shapes: R requests of the bucket, N rows of each, T = R x N rows of the step, S context slots of each request.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import torch

from ..router.routing import BudgetedRows
from .context_pages import ContextPages
from .plan import Bucket, RankPlan
from .rows import AttentionGroup, PackedRows, depths, own_visibility
from .static_sampler import samples_plainly

_REAL = ("temperatures", "reach")


class StaticRows:
    """One bucket's inputs on ``device``: `fill` writes a step into them, `layout` derives the rest.

    ``fill`` makes one copy to the device and waits for nothing; ``layout`` is what a graph captures. ``most_blocks``:
    of a request in any bucket, where attention reads the pool's blocks in place; None where contexts are gathered.
    ``last_tokens``: int64, on ``device``, where steps of all buckets leave each request's last token to the next.
    """

    def __init__(
        self,
        bucket: Bucket,
        block_size: int,
        scratch_slot: int,
        device: torch.device,
        most_blocks: int | None = None,
        last_tokens: torch.Tensor | None = None,
    ) -> None:
        self.bucket, self.block_size, self._scratch_slot = bucket, block_size, scratch_slot
        self._most_blocks = most_blocks
        r, n = bucket.num_requests, bucket.num_rows
        self.last_tokens = torch.zeros(r, dtype=torch.int64, device=device) if last_tokens is None else last_tokens
        """[R or more] of the latest step's requests, in their order."""
        shapes: dict[str, tuple[int, ...]] = {
            "token_ids": (r, n),
            "token_places": (r, n),
            "last_rows": (r,),
            "depths": (r, n),
            "own": (r, n, n),
            "parents": (r, n),
            "first_sampled": (r,),
            "num_rows": (r,),
            "committed": (r,),
            "first_budgeted": (r,),
            "tables": (r, bucket.num_slots // block_size),
            "seeds": (r, 2),
            "choices": (r,),
            "temperatures": (r,),
            "reach": (r, n),
            "experts": (1,),
        }
        size = sum(map(math.prod, shapes.values()))
        # While one is copied to the device, which may be busy with the step before, the next step is written
        self._hosts = [torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda") for _ in range(2)]
        self._device = torch.zeros(size, dtype=torch.int64, device=device)
        self._written: list[dict[str, np.ndarray]] = [{} for _ in self._hosts]
        self._turn = 0
        self.inputs: dict[str, torch.Tensor] = {}
        """What a step is, by name, as `fill` wrote it; addresses never change."""
        start = 0
        for name, shape in shapes.items():
            part = slice(start, start := start + math.prod(shape))
            is_real = name in _REAL
            for host, names in zip(self._hosts, self._written, strict=True):
                written = host[part].numpy().reshape(shape)
                names[name] = written.view(np.float64) if is_real else written
            read = self._device[part].view(shape)
            self.inputs[name] = read.view(torch.float64) if is_real else read

    def fill(
        self, plan: RankPlan, tables: Mapping[int, np.ndarray], places: Mapping[int, int] = MappingProxyType({})
    ) -> None:
        """Write ``plan`` into the inputs; ``tables`` holds each request's KV blocks.

        ``places``: by request, which of the step before each was, where that may still run. A first token that the plan
        does not know is then the one that the device chose there. All steps before that one have ended. The plan's
        requests fit the bucket.
        """
        assert len(plan.requests) <= self.bucket.num_requests, "the plan names a bucket that holds it"
        self._turn = 1 - self._turn
        host, to = self._hosts[self._turn], self._written[self._turn]
        host.zero_()
        places_given = np.arange(self.bucket.total_rows).reshape(to["token_places"].shape)
        to["token_places"][:] = len(self.last_tokens) + places_given
        to["last_rows"][:] = np.arange(0, self.bucket.total_rows, self.bucket.num_rows)
        to["own"][:] = np.eye(self.bucket.num_rows, dtype=np.int64)  # padding sees itself: softmax over nothing is NaN
        to["depths"][:] = 1
        to["first_budgeted"][:] = self.bucket.num_rows
        is_plain = samples_plainly(plan.requests)
        for r, request in enumerate(plan.requests):
            n, table = len(request.token_ids), tables[request.request_id]
            to["token_ids"][r, :n] = request.token_ids
            if request.is_deferred:
                to["token_places"][r, 0] = places[request.request_id]
            to["last_rows"][r] += n - 1
            to["depths"][r, :n] = depths(request.parents)
            to["own"][r, :n, :n] = own_visibility(request.parents)
            to["parents"][r, :n] = request.parents
            # The device accepts what its own tokens accept, or nothing where the host chooses others
            to["first_sampled"][r] = request.first_sampled_row if is_plain else n
            to["num_rows"][r], to["committed"][r] = n, request.committed_len
            num_blocks = -(-(request.committed_len + n) // self.block_size)
            to["tables"][r, :num_blocks] = table[:num_blocks]
            sampling = request.sampling
            to["seeds"][r] = sampling.seed & 0xFFFFFFFF, sampling.seed >> 32
            to["choices"][r], to["temperatures"][r] = sampling.choice, sampling.temperature
            if request.first_budgeted_row is not None:
                first = to["first_budgeted"][r] = request.first_budgeted_row
                to["reach"][r, :first], to["reach"][r, first:n] = 1.0, request.reach or 1.0
        if plan.budget is not None and plan.budget.experts is not None:
            to["experts"][0] = plan.budget.experts
        self._device.copy_(host, non_blocking=True)

    def layout(self) -> PackedRows:
        """Return the step's rows, computed on the device from `inputs`; request r has rows r x N to r x N + N - 1."""
        bucket, inputs = self.bucket, self.inputs
        own_rows = torch.arange(bucket.num_rows, device=self._device.device)
        committed = inputs["committed"][:, None]
        valid = own_rows < inputs["num_rows"][:, None]  # [R, N]
        positions = (committed + inputs["depths"] - 1).clamp_min(0)
        write_slots = torch.where(valid, self._slots(committed + own_rows), self._scratch_slot)
        rows = torch.arange(bucket.total_rows, device=self._device.device)
        none = rows[:0]
        known = torch.cat([self.last_tokens, inputs["token_ids"].flatten()])
        layout = PackedRows(
            token_ids=known.index_select(0, inputs["token_places"].flatten()),
            positions=positions.flatten(),
            valid=valid.flatten(),
            write_slots=write_slots.flatten(),
            gather_slots=none,
            gather_span=None,
            groups=[],
            sampled_rows=rows,
            scored_rows=none,
        )
        if self._most_blocks is not None:
            return replace(layout, pages=self._pages(positions, self._most_blocks))
        group, gather_slots = self._gathered(positions, rows)
        return replace(layout, groups=[group], gather_slots=gather_slots)

    def keep(self, tokens: torch.Tensor) -> None:
        """Leave what each request's last row chose, of ``tokens`` [T], to the step behind this one."""
        kept = self.last_tokens[: self.bucket.num_requests]
        torch.index_select(tokens, 0, self.inputs["last_rows"], out=kept)

    def _pages(self, positions: torch.Tensor, most_blocks: int) -> ContextPages:
        return ContextPages(
            tables=self.inputs["tables"],
            committed=self.inputs["committed"],
            num_rows=self.inputs["num_rows"],
            positions=positions,
            own=self.inputs["own"].bool(),
            block_size=self.block_size,
            num_pool_blocks=self._scratch_slot // self.block_size + 1,
            most_blocks=max(most_blocks, self.inputs["tables"].shape[1]),
        )

    def _gathered(self, positions: torch.Tensor, rows: torch.Tensor) -> tuple[AttentionGroup, torch.Tensor]:
        """Return all requests as one group, and the slots of their contexts [R x S], padded to the bucket's."""
        r, n, s = self.bucket.num_requests, self.bucket.num_rows, self.bucket.num_slots
        committed = self.inputs["committed"][:, None]
        slots = torch.arange(s, device=rows.device).expand(r, s)
        row_there = (slots - committed).clamp(0, n - 1)  # [R, S] row whose KV a slot holds, if it is not committed
        is_committed, is_row = slots < committed, (slots >= committed) & (slots < committed + n)
        sees_row = self.inputs["own"].gather(2, row_there[:, None].expand(r, n, s)).bool()
        visible = is_committed[:, None] | (is_row[:, None] & sees_row)  # [R, N, S]
        group = AttentionGroup(
            rows=rows.view(r, n),
            scatter=rows[:0],
            packed_rows=rows[:0],
            num_slots=r * s,
            query_positions=positions,
            key_positions=torch.where(is_committed, slots, positions.gather(1, row_there)),
            visible=visible[:, None],
            is_whole=True,
            sees_all=False,
        )
        return group, self._slots(slots).flatten()

    def budgeted_rows(self, valid: torch.Tensor, *, per_request: bool) -> BudgetedRows:
        """Return which rows keep to a budget; ``valid`` [T] is the layout's."""
        bucket, inputs = self.bucket, self.inputs
        requests = torch.arange(bucket.num_requests, device=valid.device)
        own_rows = torch.arange(bucket.num_rows, device=valid.device)
        groups = requests if per_request else torch.zeros_like(requests)
        return BudgetedRows(
            budgeted=(own_rows >= inputs["first_budgeted"][:, None]).flatten() & valid,
            valid=valid,
            groups=groups.repeat_interleave(bucket.num_rows, output_size=bucket.total_rows),
            num_groups=bucket.num_requests if per_request else 1,
            reach=inputs["reach"].float().flatten(),
            num_experts=inputs["experts"],
        )

    def _slots(self, places: torch.Tensor) -> torch.Tensor:
        """Return the KV slots [R, P] of ``places`` [R, P] in the requests' texts."""
        last = self.inputs["tables"].shape[1] - 1
        blocks = self.inputs["tables"].gather(1, (places // self.block_size).clamp_max(last))
        return blocks * self.block_size + places % self.block_size
