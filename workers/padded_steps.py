"""Steps that are padded to a bucket: how they attend, route and are compiled, and the graphs that replay them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch

from ..router.budgeted_choice import LayerRanks
from ..router.budgeted_selection import BudgetedSelection
from ..router.topk import RouterSeam
from . import page_attention
from .bucket import MAX_ROWS
from .compiled_layers import Backend, CompiledLayers
from .computed_step import ComputedStep
from .dispatch import CollectiveLog, Dispatcher
from .expert_parallel import ExpertParallel
from .gpu_routing import LaunchedRouting
from .graph_capture import CudaCapturer
from .graph_room import GraphRoom
from .known_routers import known_routers
from .kv_cache import PagedKVCache
from .latent_attention import LatentLayers
from .launched_step import LaunchedStep
from .plan import Bucket, RankPlan, RequestPlan
from .rows import PackedRows
from .sampling_params import TokenSampling
from .static_rows import StaticRows
from .static_step import Forward, StaticStep, StepShape
from .step_graphs import StepGraphs

logger = logging.getLogger(__name__)


class PaddedSteps:
    """All of one rank, whose ``forward`` computes rows that are laid out, over pools that have been allocated.

    ``opaque``: routers and experts, which no compiler is to look into. ``layers``: where budgets take experts to be,
    which may change between steps, in place. ``room``: what their graphs may take.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        opaque: Iterable[torch.nn.Module],
        forward: Forward,
        cache: PagedKVCache,
        routers: Sequence[RouterSeam],
        experts: ExpertParallel,
        layers: list[LayerRanks],
        log: CollectiveLog,
        device: torch.device,
        max_model_len: int,
        room: GraphRoom,
    ) -> None:
        self._model, self._opaque, self._plain = model, tuple(opaque), forward
        self._cache, self._experts, self._layers, self._log = cache, experts, layers, log
        self._device, self._max_model_len = device, max_model_len
        self.dispatcher: Dispatcher = experts.dispatcher
        """What they dispatch over."""
        self.last_tokens = torch.zeros(MAX_ROWS, dtype=torch.int64, device=device)
        """Of the latest step's requests, in their order: what a step behind it takes from there."""
        capturer = CudaCapturer(device) if device.type == "cuda" else None
        self.graphs = StepGraphs(self.step_of, capturer, room)
        with torch.inference_mode():
            self.known_routers = known_routers(routers, device)
        """Of all layers, where a kernel does what follows their logits; else empty."""
        self.objection = page_attention.objection(cache, device)
        """Why they do not attend to the pool in place; nothing if they do."""
        self._compiled: CompiledLayers | None = None
        self._latents: LatentLayers | None = None

    def connect(self, dispatcher: Dispatcher, *, captures: bool) -> None:
        """Dispatch over another process group; ``captures``: whether graphs can hold its collectives."""
        self.dispatcher, self.graphs.captures, self.graphs.agree = dispatcher, captures, dispatcher.agree
        self.graphs.clear()

    def run(self, plan: RankPlan) -> ComputedStep:
        """Compute the plan's rows padded to its bucket, as a graph where the device has any."""
        return self.launch(plan).computed()

    def launch(self, plan: RankPlan, behind: RankPlan | None = None) -> LaunchedStep:
        """Begin with that; ``behind``: the step before, whose tokens the device takes from where that left them."""
        launched, self._experts.dispatcher = self._experts.dispatcher, self.dispatcher
        places = {} if behind is None else {part.request_id: place for place, part in enumerate(behind.requests)}
        try:
            answer, logits = self.graphs.launch(_shape(plan), plan, self._cache.tables, places)
        finally:
            self._experts.dispatcher = launched
        payload_bytes = self.dispatcher.payload_bytes_per_row
        return LaunchedStep(plan, answer.has_arrived, lambda: answer.read().computed(plan, logits, payload_bytes))

    def has_run(self, plan: RankPlan) -> bool:
        """Whether a step like ``plan``, which is padded, has been computed before."""
        return self.graphs.has_run(_shape(plan))

    def is_ready(self, plan: RankPlan) -> bool:
        """Whether launching ``plan``, which is padded, waits for nothing."""
        return self.graphs.is_ready(_shape(plan))

    def step_of(self, shape: StepShape) -> StaticStep:
        """Return the operations of a shape."""
        rows, pools = self._rows(shape.bucket), self._cache.pools
        return StaticStep(shape, rows, self._forward, self._experts, self._layers, self._log, self.known_routers, pools)

    def _rows(self, bucket: Bucket) -> StaticRows:
        block_size = self._cache.block_size
        most_blocks = None if self.objection else -(-self._max_model_len // block_size)
        return StaticRows(bucket, block_size, self._cache.scratch_slot, self._device, most_blocks, self.last_tokens)

    def _forward(
        self,
        rows: PackedRows,
        selections: Sequence[BudgetedSelection] = (),
        routings: Sequence[LaunchedRouting] = (),
    ) -> torch.Tensor:
        with ExitStack() as ways:
            if self._latents is not None and rows.pages is not None:
                ways.enter_context(self._latents.active())
            if self._compiled is not None:
                ways.enter_context(self._compiled.active())
            return self._plain(rows, selections, routings)

    @torch.inference_mode()
    def choose_attention(self) -> None:
        """Attend to the pool in place if nothing is against it and it works here; a line in the log says which."""
        if not self.objection:
            try:
                if self._cache.keeps_latents:
                    self._absorb_latents()
                self._run_padding()
            except Exception as error:  # the compiler's, of many types
                self.objection = str(error) or type(error).__name__
        page_attention.say(self.objection)

    @torch.inference_mode()
    def compile_layers(self, backend: Backend = "inductor") -> None:
        """Run compiled layers; where that fails, a line in the log says why."""
        self._compiled = CompiledLayers(self._model, self._opaque, self._cache, backend)
        try:
            self._run_padding()
        except Exception as error:  # the compiler's, of many types
            self._compiled = None
            logger.warning("the dense part of layers runs as it is written: %s", error)
        else:
            logger.info("the dense part of layers is compiled by torch")

    def _absorb_latents(self) -> None:
        """Let layers attend to latents as they are kept; raise if they would not compute what they do."""
        layers = LatentLayers(self._model, self._cache)
        block_size = self._cache.block_size
        most_blocks = -(-self._max_model_len // block_size)
        num_blocks = max(1, min(2, self._cache.num_blocks, most_blocks))
        committed = num_blocks * block_size - 2
        request = RequestPlan(0, committed, 0, [], [0, 1], [-1, 0], 0, TokenSampling())
        bucket = Bucket(1, 2, num_blocks * block_size)
        ways = []
        for read_in_place in (None, most_blocks):
            rows = StaticRows(bucket, block_size, self._cache.scratch_slot, self._device, read_in_place)
            rows.fill(RankPlan(0, 0, requests=[request], bucket=bucket), {0: np.arange(num_blocks)})
            layout = rows.layout()
            assert layout.valid is not None
            ways.append(replace(layout, valid=torch.zeros_like(layout.valid)))  # experts have no part in it
        layers.prove(self._plain, *ways)
        self._latents = layers

    def _run_padding(self) -> None:
        """Run small steps of nothing but padding: of all variants that are compiled, so that no request waits."""
        for shape in ((1, 1), (1, 2), (2, 1), (2, 2)):
            self._forward(self._rows(Bucket(*shape, self._cache.block_size)).layout())


def _shape(plan: RankPlan) -> StepShape:
    assert plan.bucket is not None, "the coordinator pads it"
    return StepShape.of(plan.bucket, plan.budget)
