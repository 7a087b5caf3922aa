"""Ranks that die or fall silent are replaced in place: every stream goes on with the tokens that it would have had."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.backend import EngineDeadError
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.events import DIED, FAULT, RECOVERY, SILENT, Event
from penstock.cluster.transport.messages import Command, Regroup
from penstock.cluster.transport.process_ranks import ProcessRanks
from penstock.cluster.transport.rank_loop import RankSettings
from penstock.cluster.transport.roster import RankProcess
from penstock.workers.sampling_params import SamplingParams

from .tiny_engine import PROMPTS, Published, config_of, drain, generate

pytestmark = pytest.mark.distributed
SAMPLING = SamplingParams(temperature=1.0, seed=5, max_tokens=60, ignore_eos=True, frequency_penalty=0.3)
STEP_TIMEOUT_S = 4.0
FAULT_STEP = 12


class Ranks(ProcessRanks):
    """Ranks of which one can be out of reach of a kill, as behind a dead link, and one die when the others regroup."""

    unreachable = False
    killed_at_regroup: int | None = None

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        send = self._watch.send

        def send_or_kill(rank: int, command: Command) -> None:
            if isinstance(command, Regroup) and self.killed_at_regroup == rank:
                self.killed_at_regroup = None
                self.process_of(rank).kill()
                self.process_of(rank).wait()
            send(rank, command)

        self._watch.send = send_or_kill  # type: ignore[method-assign]

    def _launch(self, settings: RankSettings) -> RankProcess:
        return Reach(self, super()._launch(settings))

    def process_of(self, rank: int) -> subprocess.Popen[bytes]:
        process: subprocess.Popen[bytes] = self._roster.of_rank[rank].process.process._process  # type: ignore[attr-defined]
        return process

    def wait_for_spares(self) -> None:
        deadline_s = time.monotonic() + 60
        while not all(spare.is_ready for spare in self._roster.spares):
            assert time.monotonic() < deadline_s
            self._watch.receive(deadline_s)


class Reach:
    """A process that is killed only if it can be reached."""

    def __init__(self, ranks: Ranks, process: RankProcess) -> None:
        self.ranks, self.process = ranks, process
        self.ended = process.ended

    def kill(self) -> None:
        if not self.ranks.unreachable:
            self.process.kill()


def config(directory: Path, **options: object) -> EngineConfig:
    return config_of(directory, 2, step_timeout_s=STEP_TIMEOUT_S, max_num_batched_tokens=24, max_num_seqs=8, **options)


@pytest.fixture(scope="module")
def expected(checkpoint: Callable[[str], Path]) -> list[list[int]]:
    """Return the tokens of a run without faults, on one rank."""
    from penstock.cluster.engine.ranks import LocalRanks, make_runner

    alone = replace(config(checkpoint("qwen3_moe")), expert_parallel_size=1)
    return generate(Engine(alone, LocalRanks(make_runner(alone, 0))), PROMPTS, SAMPLING)


@pytest.fixture(scope="module")
def ranks(checkpoint: Callable[[str], Path]) -> Iterator[Ranks]:
    """Two ranks and a spare."""
    ranks = Ranks(config(checkpoint("qwen3_moe"), num_spares=1))
    yield ranks
    ranks.close()
    assert all(process.poll() is not None for process in ranks.processes)


def serve(ranks: Ranks, fault: Callable[[], object], **options: object) -> tuple[list[list[int]], Engine]:
    """Serve `PROMPTS` and commit ``fault`` in the middle; return the tokens. ``options``: of the engine alone."""
    num_before = len(ranks.events.events())
    engine, published = Engine(replace(ranks._config, **options), ranks, events=ranks.events), Published()
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, SAMPLING)
    for _ in range(FAULT_STEP):
        published.take(engine.step())
    fault()
    drain(engine, published)
    assert engine.ranks is ranks
    ranks.since = ranks.events.events()[num_before:]  # type: ignore[attr-defined]
    return [published[str(index)] for index in range(len(PROMPTS))], engine


def events_of(ranks: Ranks) -> list[Event]:
    return ranks.since  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
def test_a_spare_takes_the_place_of_a_lost_rank(ranks: Ranks, expected: list[list[int]], kind: signal.Signals) -> None:
    ranks.wait_for_spares()
    survivor, victim = ranks.process_of(0).pid, ranks.process_of(1)
    started = time.monotonic()
    tokens, engine = serve(ranks, lambda: os.kill(victim.pid, kind))
    assert tokens == expected
    assert ranks.process_of(0).pid == survivor, "it keeps its weights"
    assert victim.wait(10) == -signal.SIGKILL
    fault, recovery = events_of(ranks)
    assert (fault.kind, fault.what, fault.ranks) == (FAULT, DIED if kind == signal.SIGKILL else SILENT, (1,))
    assert (recovery.kind, recovery.what, recovery.ranks) == (RECOVERY, fault.what, (1,))
    assert recovery.message.endswith("1 from spares")
    assert recovery.expert_bytes_loaded == ranks.infos[1].expert_bytes > 0
    assert 0 < recovery.num_requests_replayed < len(PROMPTS), "only those of the lost rank"
    assert engine.scheduler.num_replays == recovery.num_requests_replayed
    assert engine.scheduler.num_preemptions == 0
    if kind == signal.SIGSTOP:
        assert STEP_TIMEOUT_S <= fault.duration_s < STEP_TIMEOUT_S + 1.5
    assert fault.time_s <= recovery.time_s
    assert recovery.duration_s < time.monotonic() - started


def test_a_budget_under_recovery_loses_and_repeats_no_token(ranks: Ranks) -> None:
    """Other tokens may come than without the fault, since replayed KV is exact; each comes once all the same."""
    ranks.wait_for_spares()
    victim = ranks.process_of(1)
    tokens, engine = serve(
        ranks, lambda: os.kill(victim.pid, signal.SIGKILL), expert_budget="experts=3,scope=request", draft_len=4
    )
    # `Published` has seen to it that offsets leave no gap
    assert [len(output) for output in tokens] == [SAMPLING.max_tokens] * len(PROMPTS)
    assert {event.kind for event in events_of(ranks)} == {FAULT, RECOVERY}
    assert engine.stats().budgeted_rows > 0
    assert engine.scheduler.num_replays > 0


def test_requests_of_the_other_ranks_keep_their_kv(ranks: Ranks, expected: list[list[int]]) -> None:
    ranks.wait_for_spares()
    engine, published = Engine(ranks._config, ranks), Published()
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, SAMPLING)
    for _ in range(FAULT_STEP):
        published.take(engine.step())
    before = [{request.request_id: request.committed_len for request in rank} for rank in engine.scheduler.running]
    assert all(before)
    ranks.process_of(0).kill()
    published.take(engine.step())  # fails
    published.take(engine.step())
    after = {request.request_id: request for rank in engine.scheduler.running for request in rank}
    assert all(after[name].committed_len > length for name, length in before[1].items())
    assert all(after[name].rank == 1 for name in before[1])
    drain(engine, published)
    assert [published[str(index)] for index in range(len(PROMPTS))] == expected


def test_a_rank_that_comes_back_is_fenced_and_ends(ranks: Ranks, expected: list[list[int]]) -> None:
    ranks.wait_for_spares()
    stale = ranks.process_of(1)
    ranks.unreachable = True
    engine, published = Engine(ranks._config, ranks), Published()
    for index, prompt in enumerate(PROMPTS):
        engine.add_request(str(index), prompt, SAMPLING)
    for _ in range(FAULT_STEP):
        published.take(engine.step())
    os.kill(stale.pid, signal.SIGSTOP)
    published.take(engine.step())  # fails
    published.take(engine.step())  # the spare is in
    ranks.unreachable = False
    assert stale.poll() is None
    assert ranks.process_of(1).pid != stale.pid
    os.kill(stale.pid, signal.SIGCONT)  # it answers the step that it was stopped in, and is told to close
    drain(engine, published)
    assert [published[str(index)] for index in range(len(PROMPTS))] == expected
    assert stale.wait(30) == 0


def test_a_rank_that_dies_while_the_others_regroup_is_replaced_too(ranks: Ranks, expected: list[list[int]]) -> None:
    ranks.wait_for_spares()

    def fault() -> None:
        ranks.killed_at_regroup = 0
        ranks.process_of(1).kill()

    tokens, _ = serve(ranks, fault)
    assert tokens == expected
    assert ranks.killed_at_regroup is None
    (recovery,) = [event for event in events_of(ranks) if event.kind == RECOVERY]
    assert recovery.ranks == (0, 1)
    assert recovery.num_requests_replayed == len(PROMPTS)
    assert recovery.duration_s < 60


def test_a_death_between_steps_is_noticed_and_mended(ranks: Ranks, expected: list[list[int]]) -> None:
    engine = Engine(ranks._config, ranks)
    assert not ranks.tend()
    ranks.process_of(1).kill()
    ranks.process_of(1).wait()
    assert ranks.tend()
    engine.recover()
    assert not ranks.tend()
    assert generate(engine, PROMPTS, SAMPLING) == expected
    assert engine.stats().num_failed_steps == 0


@pytest.mark.parametrize("is_rank", [True, False])
def test_a_stopped_process_is_noticed_while_nothing_runs(
    ranks: Ranks, expected: list[list[int]], is_rank: bool
) -> None:
    ranks.wait_for_spares()
    assert not ranks.tend()
    victim = ranks.process_of(1) if is_rank else ranks._roster.spares[0].process.process._process  # type: ignore[attr-defined]
    num_before = len(ranks.events.events())
    os.kill(victim.pid, signal.SIGSTOP)
    # Until one thread has seen it the others run on, and may yet answer
    os.waitid(os.P_PID, victim.pid, os.WSTOPPED | os.WNOWAIT)
    assert ranks.tend() == is_rank
    assert victim.wait(10) == -signal.SIGKILL
    (fault,) = ranks.events.events()[num_before:]
    assert (fault.what, fault.ranks) == (SILENT, (1,) if is_rank else ())
    engine = Engine(ranks._config, ranks)
    if is_rank:
        engine.recover()
    ranks.wait_for_spares()
    assert not ranks.tend()
    assert generate(engine, PROMPTS, SAMPLING) == expected
    assert engine.stats().num_failed_steps == 0


def test_a_replacement_that_cannot_load_ends_the_engine(
    checkpoint: Callable[[str], Path], tmp_path: Path, expected: list[list[int]]
) -> None:
    """Without spares; the first replacement serves, for the second the checkpoint is gone."""
    directory = tmp_path / "model"
    shutil.copytree(checkpoint("qwen3_moe"), directory)
    ranks = Ranks(config(directory))
    try:
        tokens, engine = serve(ranks, lambda: ranks.process_of(1).kill())
        assert tokens == expected
        assert events_of(ranks)[-1].message.endswith("0 from spares")
        shutil.rmtree(directory)
        engine.add_request("a", PROMPTS[0], SAMPLING)
        ranks.process_of(0).kill()
        with pytest.raises(EngineDeadError, match="a replacement of rank 0 cannot load: model: "):
            drain(engine)
        outputs = engine.fail_all("gone")
        assert [output.request_id for output in outputs] == ["a"]
        engine.scheduler.check_integrity()
    finally:
        ranks.close()
    assert all(process.poll() is not None for process in ranks.processes)
