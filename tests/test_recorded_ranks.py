"""The benchmark's recorded ranks against real ones: the same tokens, and the same counts in every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from penstock.benchmarks import speculation
from penstock.benchmarks.policy_run import make_engine, serve
from penstock.benchmarks.recorded_ranks import Job
from penstock.benchmarks.speculation import Bench
from penstock.benchmarks.step_times import StepTimes
from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.ranks import LocalRanks, Ranks, Replacement, make_runner
from penstock.cluster.transport.process_ranks import ProcessRanks
from penstock.workers.plan import StepPlan, StepResult

CONFIG = EngineConfig(
    model=str(speculation.DEMO),
    dtype="float32",
    device="cpu",
    num_threads=1,
    max_num_seqs=4,
    max_model_len=1024,
    kv_cache_bytes=16 << 20,
)


class Watched:
    """Ranks whose steps' counts are kept."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self.infos = ranks, ranks.infos
        self.counts: list[list[tuple[list[int], list[int], list[int], list[int]]]] = []

    def step(self, plan: StepPlan) -> StepResult:
        result = self._ranks.step(plan)
        self.counts.append(
            [(r.counts.rows, r.counts.experts, r.counts.rows_sent, r.counts.payload_bytes) for r in result.ranks]
        )
        return result

    def recover(self, generation: int) -> Sequence[Replacement]:
        raise AssertionError("no step fails here")

    def close(self) -> None:
        self._ranks.close()


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench("ngram", 3, speculation.QUICK_TOKENS)


@pytest.fixture(scope="module")
def jobs(bench: Bench) -> list[Job]:
    """Answers and long requests of every family."""
    families = ("code", "math", "extraction", "chat")
    answers = [job for family in families if (job := bench.maker.answer(family, 0))]
    return answers + [bench.maker.long(family, 1, 24) for family in families]


@pytest.fixture(scope="module")
def one_rank() -> Ranks:
    return LocalRanks(make_runner(CONFIG, 0))


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    ranks = ProcessRanks(replace(CONFIG, expert_parallel_size=2))
    yield ranks
    ranks.close()


@pytest.mark.parametrize(
    ("fixture", "batch_size"),
    [("one_rank", 1), ("one_rank", 4), pytest.param("two_ranks", 3, marks=pytest.mark.distributed)],
)
@pytest.mark.parametrize("prepared", [True, False])
def test_they_answer_as_real_ranks_do(
    request: pytest.FixtureRequest, bench: Bench, jobs: list[Job], fixture: str, batch_size: int, prepared: bool
) -> None:
    real = Watched(request.getfixturevalue(fixture))
    config = replace(CONFIG, expert_parallel_size=len(real.infos))
    if prepared:
        bench.prepare(jobs)
    recorded_ranks = bench.ranks(len(real.infos), jobs)
    recorded = Watched(recorded_ranks)
    # Neither policy looks at the clock, so both runs plan the same steps
    run = serve(make_engine("fixed 5", config, real, lambda: 0.0), jobs, batch_size)
    again = serve(make_engine("fixed 5", config, recorded, recorded_ranks.clock), jobs, batch_size)
    assert again.outputs == run.outputs
    assert again.num_accepted == run.num_accepted > 0
    # A rank without requests runs a padding row, which counts nowhere
    assert recorded.counts == real.counts


def test_time_is_that_of_the_price_list(bench: Bench, jobs: list[Job]) -> None:
    ranks = bench.ranks(1, jobs)
    run = serve(make_engine("off", CONFIG, ranks, ranks.clock), jobs[:1], 1)
    times = StepTimes.load()
    prices = [times.step_s(rows, layers, 4) for rows, layers in ranks.steps]
    assert run.time_s == pytest.approx(sum(prices))
    assert len(prices) == run.num_steps == run.num_tokens


def test_families_have_the_same_share_of_a_workload(bench: Bench) -> None:
    jobs = bench.maker.workload(("code", "math"), 64, 512, lambda job: 64)
    assert [job.family for job in jobs] == ["code", "math"] * 4
    assert bench.maker.workload(("code", "math"), 64, 512, lambda job: 64) == jobs


ROWS = [
    {"rows": 1, "experts": 4, "cpu_ms": 10.0},
    {"rows": 4, "experts": 4, "cpu_ms": 12.0},
    {"rows": 4, "experts": 12, "cpu_ms": 28.0},
]


@pytest.mark.parametrize(
    ("rows", "experts", "ms"),
    [
        ([1], [[4]], 10),
        ([4], [[8]], 20),
        ([4], [[99]], 28),
        ([2], [[4]], 32 / 3),
        ([1, 4], [[3], [12]], 28),
        ([1, 1], [[8], [4]], 40 / 3),
        ([1, 1], [[8, 4], [4, 8]], 40 / 3),
        ([4], [[6, 10]], 20),
    ],
)
def test_prices_are_interpolated_and_each_layers_slowest_rank_counts(
    rows: list[int], experts: list[list[int]], ms: float
) -> None:
    assert 1e3 * StepTimes(ROWS).step_s(rows, experts, 4) == pytest.approx(ms)  # type: ignore[arg-type]
