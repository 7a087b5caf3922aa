"""A rank without a model that computes for a given time, and says how long it has had nothing to do before that."""

from __future__ import annotations

import os
import time
from dataclasses import replace

from ..cluster.config import EngineConfig
from ..cluster.transport.process_ranks import parent_is_gone, read_settings
from ..cluster.transport.rank_loop import run_rank
from ..router.placement import Placement
from ..workers.loader import DenseModel
from ..workers.plan import RankPlan, RankResult
from .echo_rank import EchoRunner, answer

COMPUTE_VARIABLE = "PENSTOCK_BENCHMARK_COMPUTE_S"
NUM_KV_BLOCKS = 4096
MAX_MODEL_LEN = 2048


class ComputingRunner(EchoRunner):
    """Sleeps for as long as a device would compute: the host's thread waits for one too."""

    def __init__(self, config: EngineConfig, rank: int, placement: Placement | None, dense: DenseModel | None) -> None:
        super().__init__(config, rank, placement, dense)
        model = replace(self.info.model, vocab_size=8, max_model_len=MAX_MODEL_LEN)
        self.info = replace(self.info, model=model, num_kv_blocks=NUM_KV_BLOCKS)
        self._compute_s = float(os.environ[COMPUTE_VARIABLE])
        self._ended_s = time.perf_counter()

    def step(self, plan: RankPlan) -> RankResult:
        """Compute and answer; ``thread_time_s`` is the time since the step before was over."""
        idle_s = time.perf_counter() - self._ended_s
        time.sleep(self._compute_s)
        self._ended_s = time.perf_counter()
        tokens = [[1] * request.num_sampled_rows for request in plan.requests]
        return replace(answer(plan, self.rank), token_ids=tokens, thread_time_s=idle_s)


if __name__ == "__main__":
    run_rank(read_settings(), parent_is_gone, ComputingRunner)  # type: ignore[arg-type]
