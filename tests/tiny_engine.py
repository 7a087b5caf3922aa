"""An engine over a tiny checkpoint: its configuration, ranks that fail as told, and what it published."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.output import RequestOutput
from penstock.cluster.engine.ranks import Ranks, Replacement
from penstock.cluster.speculation.batch import Batch
from penstock.cluster.speculation.fixed import FixedController
from penstock.workers.plan import StepFailedError, StepPlan, StepResult
from penstock.workers.sampling_params import SamplingParams

if TYPE_CHECKING:
    from penstock.cluster.transport.process_ranks import ProcessRanks

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
DRAFT_LENS = (0, 3, 7, "changing")
PROMPTS = [
    [5, 17, 60, 33, 8, 71, 11, 44],
    [3, 9, 3, 9, 3, 9, 3, 9, 3, 9, 3],
    [(7 * i + 5) % 90 + 3 for i in range(30)],
    [41],
    [50, 51, 52, 50, 51, 52, 50],
]


def config_of(directory: Path, num_ranks: int = 1, **options: Any) -> EngineConfig:
    """Return a configuration of ranks on one thread of a CPU each."""
    options = {"max_model_len": 160, "kv_cache_bytes": 8 << 20, **options}
    return EngineConfig(model=str(directory), expert_parallel_size=num_ranks, device="cpu", num_threads=1, **options)


class ChangingDraftLen(FixedController):
    """Another draft length every step and request."""

    def __init__(self) -> None:
        super().__init__(7)
        self.calls = 0

    def max_draft_lens(self, batch: Batch) -> list[int]:
        lengths = []
        for request in batch.requests:
            self.calls += 1
            lengths.append(min((0, 7, 1, 5, 3)[self.calls % 5], request.max_draft_len))
        return lengths


def controller_of(draft_len: int | str) -> FixedController:
    """Return the controller of one of `DRAFT_LENS`."""
    return FixedController(draft_len) if isinstance(draft_len, int) else ChangingDraftLen()


class FailingRanks:
    """Ranks whose steps fail when told to, after the real step has run and changed the KV pool."""

    def __init__(self, ranks: Ranks, fails: Callable[[int], bool]) -> None:
        self.ranks, self.fails = ranks, fails
        self.infos = ranks.infos
        self.calls = 0
        self.plans: list[StepPlan] = []
        self.results: list[StepResult] = []
        """Of the steps that did not fail."""
        self.recovered: list[int] = []

    def step(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        result = self.ranks.step(plan)
        self.calls += 1
        if self.fails(self.calls):
            raise StepFailedError("planted")
        self.results.append(result)
        return result

    def recover(self, generation: int) -> Sequence[Replacement]:
        self.recovered.append(generation)
        return self.ranks.recover(generation)

    def close(self) -> None:
        self.ranks.close()


@contextmanager
def faulty_ranks(config: EngineConfig) -> Iterator[ProcessRanks]:
    """Run ranks in processes of their own; rank 1 fails a step of every engine (`faulty_rank`)."""
    # What GPU machines lack: those that have no more run other tests with this module
    from penstock.cluster.transport.process_ranks import ProcessRanks

    ranks = ProcessRanks(config, [sys.executable, str(Path(__file__).with_name("faulty_rank.py"))])
    try:
        yield ranks
    finally:
        ranks.close()


class Published(dict[str, list[int]]):
    """What an engine published, checked as a reader would: offsets without gaps, nothing after the end."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: dict[str, RequestOutput] = {}
        """The last output of each request that has ended."""

    def take(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            assert output.request_id not in self.ended
            tokens = self.setdefault(output.request_id, [])
            assert output.offset == len(tokens), "tokens must come in order, each once"
            tokens += output.token_ids
            if output.finish_reason is not None:
                self.ended[output.request_id] = output


def drain(engine: Engine, published: Published | None = None) -> Published:
    """Step until every request has ended."""
    published = Published() if published is None else published
    while engine.has_requests:
        published.take(engine.step())
        engine.scheduler.check_integrity()
    assert engine.stats().num_kv_blocks_used == 0
    return published


def generate(engine: Engine, prompts: Sequence[list[int]], sampling: SamplingParams) -> list[list[int]]:
    """Serve ``prompts`` together."""
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, sampling)
    published = drain(engine)
    return [published[str(index)] for index in range(len(prompts))]
