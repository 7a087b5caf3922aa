"""Requests with wishes of their own, served side by side; what their ranks were asked and answered is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.output import RequestOutput
from penstock.cluster.engine.ranks import Ranks, Replacement
from penstock.cluster.speculation.options import SpeculationOptions
from penstock.workers.plan import StepFailedError, StepPlan, StepResult
from penstock.workers.sampling_params import SamplingParams

from .scripted_ranks import ScriptedRanks

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, seed=0)
PROMPT = [4, 7, 5]
NEVER = [0, 1, 2, 3]
"""Ids that scripted ranks never answer."""
OFF = SpeculationOptions("off")


class Recording:
    """Ranks, and what they were asked and answered; fails the calls it is told to, after they have run."""

    def __init__(self, ranks: Ranks, failed: Sequence[int] = ()) -> None:
        self._ranks, self._failed, self.infos = ranks, failed, ranks.infos
        self.plans: list[StepPlan] = []
        self.results: list[StepResult] = []

    def step(self, plan: StepPlan) -> StepResult:
        result = self._ranks.step(plan)
        self.plans.append(plan)
        if len(self.plans) in self._failed:
            raise StepFailedError("planted")
        self.results.append(result)
        return result

    def recover(self, generation: int) -> Sequence[Replacement]:
        return self._ranks.recover(generation)

    def close(self) -> None:
        self._ranks.close()

    @property
    def collectives(self) -> list[list[tuple[int, int]]]:
        """What every rank says of its sequence of collectives, by step."""
        return [[(rank.num_collectives, rank.collectives_crc) for rank in result.ranks] for result in self.results]


def scripted(
    failed: Sequence[int] = (), controller: Any = None, blocks: Sequence[int] = (40,), **options: Any
) -> Engine:
    drafts = {} if "speculation" in options else {"draft_len": 3}
    config = EngineConfig(model="m", **{"block_size": 4, "max_num_seqs": 8, **drafts, **options})
    return Engine(config, Recording(ScriptedRanks(blocks, 4, 64), failed), controller=controller)


Wish = tuple[list[int], SpeculationOptions]


def predicting(*token_ids: int) -> SpeculationOptions:
    return SpeculationOptions(prediction_token_ids=token_ids)


def run(engine: Engine, wishes: Sequence[Wish], sampling: SamplingParams = GREEDY) -> list[RequestOutput]:
    """Serve requests side by side; return their outputs as if each had come in one piece."""
    whole: dict[str, RequestOutput] = {}
    for index, (prompt, speculation) in enumerate(wishes):
        engine.add_request(str(index), prompt, sampling, speculation)
    while engine.has_requests:
        for output in engine.step():
            earlier = whole.get(output.request_id)
            whole[output.request_id] = output if earlier is None else earlier.followed_by(output)
        engine.scheduler.check_integrity()
    return [whole[str(index)] for index in range(len(wishes))]


PROMPTS = [[5, 17, 60, 33, 8, 71, 11, 44], [3, 9, 3, 9, 3, 9, 3, 9, 3, 9, 3], [41], [50, 51, 52, 50, 51, 52, 50]]


def real_config(directory: Path, num_ranks: int) -> EngineConfig:
    return EngineConfig(
        model=str(directory),
        expert_parallel_size=num_ranks,
        num_threads=1,
        device="cpu",
        block_size=4,
        max_model_len=96,
        kv_cache_bytes=1 << 20,
        max_num_batched_tokens=16,
        max_num_seqs=4,
        max_draft_len=5,
        draft_len=5,
    )
