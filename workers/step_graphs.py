"""Steps replayed as CUDA graphs: one graph for each shape, captured when the first step of that shape comes.

All ranks are told the same shapes, so all capture in the same step, and run the same collectives while they do. Graphs
hold the process group that they were captured with: another one takes new graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from .failed_capture import end_capture
from .plan import RankPlan
from .static_step import StaticStep, StepShape
from .step_answer import SentAnswer

logger = logging.getLogger(__name__)
_WARM_UPS = 2
"""Runs before a capture: libraries and compilers allocate and choose in their first ones."""


class StepGraphs:
    """The graphs of one rank. ``make`` builds the step of a shape.

    On a CPU there is nothing to capture, and the same operations run one by one.
    """

    def __init__(self, make: Callable[[StepShape], StaticStep], device: torch.device) -> None:
        self._make, self._device = make, device
        self._steps: dict[StepShape, StaticStep] = {}
        self._graphs: dict[StepShape, torch.cuda.CUDAGraph | None] = {}
        """None for a shape that could not be captured."""
        self._pool: Any = None
        self.num_bytes = 0
        """Memory that the device's allocator has taken for captures."""
        self.captures = True
        """Whether steps can be captured: not where collectives go by way of the host."""

    def clear(self) -> None:
        """Forget all graphs; the next step of each shape is captured anew."""
        self._steps.clear()
        self._graphs.clear()
        self._pool, self.num_bytes = None, 0

    @property
    def num_graphs(self) -> int:
        """How many shapes can be replayed."""
        return sum(graph is not None for graph in self._graphs.values())

    def has_run(self, shape: StepShape) -> bool:
        """Whether a step of ``shape`` has been launched before."""
        return shape in self._steps

    def is_ready(self, shape: StepShape) -> bool:
        """Whether launching a step of ``shape`` waits for nothing: it has run before, and a GPU has its graph."""
        return shape in self._steps and (self._device.type != "cuda" or self._graphs.get(shape) is not None)

    def launch(
        self,
        shape: StepShape,
        plan: RankPlan,
        tables: Mapping[int, np.ndarray],
        places: Mapping[int, int] = MappingProxyType({}),
    ) -> tuple[SentAnswer, torch.Tensor]:
        """Begin with ``plan``; return its answer, and the logits [T, V], which the next step of this shape overwrites.

        ``places``: see `StaticRows.fill`. At most one step before this one has not ended, and if there is one, then
        ``shape`` is ready.
        """
        step = self._steps.get(shape)
        if step is None:
            step = self._steps[shape] = self._make(shape)
        step.fill(plan, tables, places)
        if self._device.type == "cuda" and self.captures and shape not in self._graphs:
            before = torch.cuda.memory_reserved(self._device)
            self._graphs[shape] = self._capture(step)
            self.num_bytes += max(0, torch.cuda.memory_reserved(self._device) - before)
        graph = self._graphs.get(shape)
        if graph is None:
            step.run()
        else:
            graph.replay()
        assert step.logits is not None
        return step.send(), step.logits

    def again(self, shape: StepShape) -> None:
        """Launch the latest step of ``shape`` once more and wait for nothing: what the device has to do, by itself."""
        graph = self._graphs.get(shape)
        if graph is None:
            self._steps[shape].run()
        else:
            graph.replay()

    def _capture(self, step: StaticStep) -> torch.cuda.CUDAGraph | None:
        """Return the graph of ``step``, or None, and a line in the log, where a model asks the device for a number.

        It runs a few times first, which a step survives that takes no token from the one before: it writes the same
        again. Ranks without a graph run the same collectives as those with one.
        """
        present = torch.cuda.current_stream(self._device)
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(present)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                step.rehearse()
        present.wait_stream(stream)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                step.run()
        except Exception as error:  # CUDA's, torch's or the model's own
            torch.cuda.set_stream(present)  # torch leaves the one that it captured on
            end_capture(self._pool)
            self._pool = None
            logger.warning("steps of %s are launched operation by operation: %s", step.shape.bucket, error)
            return None
        return graph
