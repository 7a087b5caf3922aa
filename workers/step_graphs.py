"""Steps replayed as CUDA graphs: one graph for each shape, captured when the first step of that shape comes.

All ranks are told the same shapes, so all rehearse in the same step, and run the same collectives while they do. Which
of them are captured, they agree on: a collective is captured by all ranks or by none, and a graph that has any is
launched by all (NCCL's user guide, "Using NCCL with CUDA Graphs"). Graphs hold the process group that they were
captured with: another one takes new graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import torch

from .graph_capture import Captured, Capturer, Graph, causes, is_out_of_memory
from .graph_room import GraphRoom
from .plan import RankPlan
from .static_step import StaticStep, StepShape
from .step_answer import SentAnswer

logger = logging.getLogger(__name__)


class StepGraphs:
    """The graphs of one rank. ``make`` builds the step of a shape; ``room``: what they may take.

    Without a ``capturer``, as on a CPU, there is nothing to capture, and the same operations run one by one.
    """

    def __init__(self, make: Callable[[StepShape], StaticStep], capturer: Capturer | None, room: GraphRoom) -> None:
        self._make, self._capturer, self._room = make, capturer, room
        self._steps: dict[StepShape, StaticStep] = {}
        self._graphs: dict[StepShape, Graph | None] = {}
        """None for a shape whose steps are launched."""
        self._has_said = False
        self.captures = True
        """Whether steps can be captured: not where collectives go by way of the host."""
        self.agree: Callable[[bool], bool] = bool
        """Whether all ranks say yes; a collective, where there are others."""

    def clear(self) -> None:
        """Forget all graphs; the next step of each shape is captured anew."""
        self._steps.clear()
        self._graphs.clear()
        self._room.clear()
        self._has_said = False
        if self._capturer is not None:
            self._capturer.clear()

    @property
    def num_graphs(self) -> int:
        """How many shapes can be replayed."""
        return sum(graph is not None for graph in self._graphs.values())

    @property
    def num_bytes(self) -> int:
        """Memory that the device's allocator has taken for graphs."""
        return self._room.num_bytes

    def has_run(self, shape: StepShape) -> bool:
        """Whether a step of ``shape`` has been launched before."""
        return shape in self._steps

    def is_ready(self, shape: StepShape) -> bool:
        """Whether launching a step of ``shape`` waits for nothing: it has run before, and a GPU has its graph."""
        return shape in self._steps and (self._capturer is None or self._graphs.get(shape) is not None)

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
        if self._capturer is not None and self.captures and shape not in self._graphs:
            self._graphs[shape] = self._graph_of(step, self._capturer)
        self._run(shape)
        assert step.logits is not None
        return step.send(), step.logits

    def again(self, shape: StepShape) -> None:
        """Launch the latest step of ``shape`` once more and wait for nothing: what the device has to do, by itself."""
        self._run(shape)

    def _run(self, shape: StepShape) -> None:
        graph = self._graphs.get(shape)
        if graph is None:
            self._steps[shape].run()
        else:
            graph.replay()

    def _graph_of(self, step: StaticStep, capturer: Capturer) -> Graph | None:
        """Return the graph of ``step``, or None, and a line in the log, if this rank or another can have none.

        It runs a few times first, on all ranks, which a step survives that takes no token from the one before: it
        writes the same again.
        """
        reason = self._room.objection(capturer.rehearse(step), capturer.free_bytes())
        if not self.agree(not reason):
            self._say(step, reason or "another rank has no memory for it")
            return None
        captured: Captured | None = None
        try:
            captured = capturer.capture(step)
        except Exception as error:  # CUDA's, torch's or the model's own
            first = causes(error)[-1]
            reason = str(first).partition("\n")[0] or type(first).__name__
            if is_out_of_memory(error):
                self._room.close()
            else:
                self._room.begin_pool()
        else:
            self._room.take(captured.grown_bytes, captured.kept_bytes)
        # Behind `except`, since its error holds what the step had made so far
        if not self.agree(captured is not None):
            self._say(step, reason or "another rank could not capture it")
            return None
        assert captured is not None, "all ranks have a graph"
        return captured.graph

    def _say(self, step: StaticStep, reason: str) -> None:
        """Once, until graphs are made anew: what holds for one shape holds for most that follow."""
        if not self._has_said:
            self._has_said = True
            logger.warning(
                "steps of %s are launched operation by operation, as are others that can have no graph: %s; "
                "%d shapes have graphs, which take %.2f GiB",
                step.shape.bucket,
                reason,
                self.num_graphs,
                self.num_bytes / (1 << 30),
            )
