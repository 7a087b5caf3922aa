"""One bucket's step as a fixed sequence of operations on the device: what a CUDA graph captures and replays.

Between the copy of its inputs and the event behind its answer the host does nothing: no shape, address or choice of
operation depends on what the step is. Without a graph the same operations are launched one by one.

Shapes: R requests of the bucket, N rows of each, T = R x N rows, L MoE layers, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..kernels.device import has_triton
from ..router.budgeted_choice import LayerRanks
from ..router.budgeted_selection import BudgetedSelection
from ..router.expert_budget import ExpertBudget
from .dispatch import CollectiveLog, both_crcs
from .expert_parallel import ExpertParallel
from .gpu_routing import LaunchedRouting, launched_routings
from .known_routers import KnownRouter
from .plan import Bucket, RankPlan
from .rows import PackedRows
from .static_rows import StaticRows
from .static_sampler import choose_tokens
from .step_answer import SentAnswer

if TYPE_CHECKING:
    from ..kernels.kv_moves import Pools

Forward = Callable[[PackedRows, Sequence[BudgetedSelection], Sequence[LaunchedRouting]], torch.Tensor]
"""From rows, and either the selections of all layers under a budget or all that follows routers' logits, to logits
[T, V]."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a sequence of operations is made for; steps of one shape share it."""

    bucket: Bucket
    budget: ExpertBudget | None
    """Without its number of experts, which is an input."""

    @classmethod
    def of(cls, bucket: Bucket, budget: ExpertBudget | None) -> StepShape:
        """Return the shape of a step."""
        return cls(bucket, budget if budget is None or budget.experts is None else replace(budget, experts=1))


class StaticStep:
    """The step of one shape. `fill`, `run` and `send` are one step, and wait for nothing.

    ``routers``: of all layers, where a kernel computes them. ``pools``: of the KV cache, in which a device that walks
    along drafts puts those that it accepts in order.
    """

    def __init__(
        self,
        shape: StepShape,
        rows: StaticRows,
        forward: Forward,
        experts: ExpertParallel,
        layers: Sequence[LayerRanks],
        log: CollectiveLog,
        routers: Sequence[KnownRouter] = (),
        pools: Sequence[torch.Tensor] = (),
    ) -> None:
        self.shape, self.rows, self._routers = shape, rows, routers
        self._forward, self._experts, self._layers, self._log = forward, experts, layers, log
        self._walks = has_triton(layers[0].owner.device)
        bucket = shape.bucket
        self._pools: Pools | None = None
        if self._walks and pools and bucket.num_rows > 2:  # what two rows accept is in order
            from ..kernels.kv_moves import Pools

            self._pools = Pools.of(pools)
        self._first_rows = torch.arange(0, bucket.total_rows, bucket.num_rows, device=layers[0].owner.device)
        self.logits: torch.Tensor | None = None
        """[T, V] of the latest run."""
        self._results: Sequence[torch.Tensor] = ()
        """int64: tokens [T], experts [L], rows sent [L], and where the device walks along drafts what requests emit
        [R], [R, N], [R, N]; f32: weight kept [L, T]."""
        self._copies: list[list[torch.Tensor]] = []
        """The same on the host, of two steps in turn: one may be read while the other is copied."""
        self._turn = 0
        self._known: tuple[list[int], int, int] = ([], 0, 0)
        """Wire bytes per layer, number and checksum of collectives: the same whenever it runs."""
        self._before = (0, 0)
        """Number and checksum of the collectives that preceded it: moves of experts."""

    def fill(
        self, plan: RankPlan, tables: Mapping[int, np.ndarray], places: Mapping[int, int] = MappingProxyType({})
    ) -> None:
        """Write a step of this shape; see `StaticRows.fill`."""
        self._before = self._log.num_collectives, self._log.crc
        self.rows.fill(plan, tables, places)

    def rehearse(self) -> None:
        """Run as the step will, for what libraries and compilers do in first runs: it writes what the step will."""
        with self._experts.uncounted():
            self.run()

    def run(self) -> None:
        """Compute the step that `rows` hold; what a graph captures."""
        self._log.reset()
        layout = self.rows.layout()
        assert layout.valid is not None
        selections, routings = self._choices(layout.valid)
        self.logits = self._forward(layout, selections, routings)
        inputs, num_rows = self.rows.inputs, self.shape.bucket.num_rows
        temperatures, seeds, choices = (
            inputs[name].repeat_interleave(num_rows, dim=0, output_size=self.shape.bucket.total_rows)
            for name in ("temperatures", "seeds", "choices")
        )
        tokens = choose_tokens(self.logits, temperatures, seeds, choices, layout.positions + 1)
        self.rows.keep(tokens)
        self._known = self._experts.wire_bytes, self._log.num_collectives, self._log.crc
        kept = [selection.limits.kept for selection in selections if selection.limits is not None]
        if self.shape.budget is not None:
            kept += [routing.kept for routing in routings if routing.kept is not None]
        self._results = (
            torch.cat([tokens, self._experts.counts_on(tokens.device).flatten(), *self._accept(tokens)]),
            torch.stack(kept) if kept else tokens.new_zeros(0, len(tokens), dtype=torch.float32),
        )

    def _accept(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Return how many tokens requests emit [R], those [R x N], and their rows [R x N], if the device can tell."""
        if not self._walks:
            return []
        from ..kernels.tree_acceptance import DraftTrees, accept_trees

        inputs, bucket = self.rows.inputs, self.shape.bucket
        trees = DraftTrees(
            token_ids=inputs["token_ids"].flatten(),
            parents=inputs["parents"].flatten(),
            first_rows=self._first_rows,
            num_rows=inputs["num_rows"],
            first_sampled=inputs["first_sampled"],
            first_choices=self._first_rows,
            most_rows=bucket.num_rows,
        )
        accepted = accept_trees(trees, tokens)
        if self._pools is not None:
            from ..kernels.kv_moves import AcceptedRows, move_accepted

            found = accepted.path, accepted.num_tokens, inputs["committed"], inputs["tables"]
            move_accepted(self._pools, AcceptedRows(*found, self.rows.block_size))
        return [accepted.num_tokens, accepted.tokens.flatten(), accepted.path.flatten()]

    def _choices(self, valid: torch.Tensor) -> tuple[list[BudgetedSelection], list[LaunchedRouting]]:
        """Return what chooses experts beside the routers' own code: one of the two, or neither."""
        budget, rows = self.shape.budget, None
        if budget is not None:
            rows = self.rows.budgeted_rows(valid, per_request=budget.scope == "request")
        reduce = self._experts.dispatcher.sum_scores
        routings = launched_routings(self._routers, budget, rows, valid, self._layers, reduce)
        if routings or budget is None or rows is None:
            return [], routings
        return [BudgetedSelection(budget, rows, layer, reduce) for layer in self._layers], []

    def send(self) -> SentAnswer:
        """Have what the latest run finds copied to the host, behind it. The answer before the last has been read."""
        assert self._results, "it has run"
        is_gpu = self._results[0].is_cuda
        if not self._copies:
            self._copies = [
                [torch.empty_like(part, device="cpu", pin_memory=is_gpu) for part in self._results] for _ in range(2)
            ]
        self._turn = 1 - self._turn
        copies = self._copies[self._turn]
        for copy, part in zip(copies, self._results, strict=True):
            copy.copy_(part, non_blocking=True)
        event = None
        if is_gpu:
            event = torch.cuda.Event()
            event.record()
        numbers, kept = (copy.numpy() for copy in copies)
        (num_before, crc_before), (wire_bytes, num_collectives, crc) = self._before, self._known
        return SentAnswer(
            event,
            numbers,
            kept,
            self.shape.bucket,
            self._experts.num_layers,
            self._walks,
            wire_bytes,
            num_before + num_collectives,
            both_crcs(crc_before, crc),
        )
