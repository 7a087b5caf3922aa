"""A rank without a model whose device takes a given time for a step, and says how long it had nothing to do before.

The device is a thread that sleeps, once for each step, in the order in which they were launched: like a GPU it computes
while the rank's own thread does something else.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field, replace
from queue import SimpleQueue

from ..cluster.config import EngineConfig
from ..cluster.transport.process_ranks import parent_is_gone, read_settings
from ..cluster.transport.rank_loop import run_rank
from ..router.placement import Placement
from ..workers.loader import DenseModel
from ..workers.plan import RankPlan, RankResult
from .echo_rank import EchoRunner, answer

COMPUTE_VARIABLE = "PENSTOCK_BENCHMARK_COMPUTE_S"
LAUNCH_VARIABLE = "PENSTOCK_BENCHMARK_LAUNCH_AHEAD"
"""Whether steps are launched behind those that have not ended."""
NUM_KV_BLOCKS = 4096
MAX_MODEL_LEN = 2048


@dataclass(slots=True)
class ComputingStep:
    """Takes the place of `LaunchedStep`."""

    plan: RankPlan
    idle_s: float = 0.0
    """How long the device had nothing to do before it."""
    ended: threading.Event = field(default_factory=threading.Event)

    def has_ended(self) -> bool:
        """Whether the device has computed it."""
        return self.ended.is_set()


class ComputingRunner(EchoRunner):
    """Launches steps on such a device."""

    def __init__(self, config: EngineConfig, rank: int, placement: Placement | None, dense: DenseModel | None) -> None:
        super().__init__(config, rank, placement, dense)
        model = replace(self.info.model, vocab_size=8, max_model_len=MAX_MODEL_LEN)
        self.info = replace(self.info, model=model, num_kv_blocks=NUM_KV_BLOCKS)
        self._compute_s = float(os.environ[COMPUTE_VARIABLE])
        self._launches_ahead = bool(int(os.environ[LAUNCH_VARIABLE]))
        self._steps: SimpleQueue[ComputingStep] = SimpleQueue()
        threading.Thread(target=self._compute, daemon=True).start()

    def _compute(self) -> None:
        ended_s = time.perf_counter()
        while True:
            step = self._steps.get()
            step.idle_s = time.perf_counter() - ended_s
            time.sleep(self._compute_s)
            ended_s = time.perf_counter()
            step.ended.set()

    def can_follow(self, plan: RankPlan, running: ComputingStep) -> bool:  # type: ignore[override]
        """All steps can."""
        return self._launches_ahead

    def can_be_followed(self, running: ComputingStep) -> bool:  # type: ignore[override]
        """Likewise."""
        return self._launches_ahead

    def launch(self, plan: RankPlan, behind: ComputingStep | None = None) -> ComputingStep:  # type: ignore[override]
        """Give the device a step."""
        step = ComputingStep(plan)
        self._steps.put(step)
        return step

    def finish(self, step: ComputingStep) -> RankResult:  # type: ignore[override]
        """Wait for it and answer; ``thread_time_s`` is the time in which the device had nothing to do."""
        step.ended.wait()
        tokens = [[1] * request.num_sampled_rows for request in step.plan.requests]
        return replace(answer(step.plan, self.rank), token_ids=tokens, thread_time_s=step.idle_s, ran_s=self._compute_s)


if __name__ == "__main__":
    run_rank(read_settings(), parent_is_gone, ComputingRunner)  # type: ignore[arg-type]
