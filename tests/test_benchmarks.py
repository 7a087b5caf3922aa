"""The harness that all benchmarks share, and that each benchmark runs and says what it promises to say."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest

from penstock.benchmarks import draft_or_send, drafting, priced_waits, step_gaps
from penstock.benchmarks.churn import slope
from penstock.benchmarks.harness import Measurement, Options, Target, quantile, run
from penstock.benchmarks.http_stream import COMPLETED, LEFT, LOST, REFUSED, Answer, ask
from penstock.benchmarks.peer_process import PeerProcess
from penstock.benchmarks.speculation import QUICK_TOKENS, Bench
from penstock.benchmarks.stream_peer import EnginePeer, HttpPeer, Job, Report
from penstock.benchmarks.time_budget import TimeBudget, process_age_s
from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.backend import QueueFullError
from penstock.demo.records import FAMILIES

from .scripted_backend import ScriptedBackend, save_tokenizer
from .served_backend import MODEL, served

DEMO = Path(__file__).parents[1] / "demo" / "model"


def _measure(figure: float):
    def measure(options: Options) -> Measurement:
        rows = [{"policy": "a", "value": 1.0, "quick": options.quick, "seed": options.seed}, {"policy": "b"}]
        return Measurement(rows, [Target("speed", figure, 4.0), Target("other", 9.0, 1.0)], "float32", 2)

    return measure


def test_a_missed_target_is_named_and_fails_the_check(capsys):
    assert run("some", _measure(3.9), ["--check"]) == 1
    assert capsys.readouterr().err == "missed: speed\n"
    assert run("some", _measure(3.9), []) == 0
    assert run("some", _measure(4.0), ["--check"]) == 0


def test_the_file_holds_environment_rows_and_targets(tmp_path):
    file = tmp_path / "out.json"
    run("some", _measure(3.9), ["--quick", "--seed", "5", "--json", str(file)])
    saved = json.loads(file.read_text())
    assert saved["benchmark"] == "some"
    assert saved["command"] == "python -m penstock.benchmarks.some --quick --seed 5"
    assert saved["rows"][0] == {"policy": "a", "value": 1.0, "quick": True, "seed": 5}
    assert saved["targets"][0] == {"name": "speed", "figure": 3.9, "at_least": 4.0, "reached": False}
    assert {"cpu", "cores", "dtype", "threads", "torch", "python"} <= set(saved["environment"])
    assert (saved["environment"]["dtype"], saved["environment"]["threads"]) == ("float32", 2)


def test_the_command_holds_the_options_of_the_benchmark_alone(tmp_path):
    file = tmp_path / "out.json"

    def more(parser):
        parser.add_argument("--name")

    run("some", _measure(3.9), ["--name", "a b", "--check", f"--json={file}", "--quick"], add_options=more)
    command = json.loads(file.read_text())["command"]
    assert command == "python -m penstock.benchmarks.some --name 'a b' --quick --seed 0"


def test_a_run_that_is_cut_short_has_kept_what_it_found(tmp_path):
    file = tmp_path / "out.json"
    measured = _measure(3.9)(Options(quick=False, seed=0))

    def dies(options):
        options.keep(measured)
        kept = json.loads(file.read_text())
        assert (kept["unfinished"], len(kept["rows"]), kept["targets"][0]["figure"]) == (True, 2, 3.9)
        options.keep(replace(measured, rows=measured.rows[:1]))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("some", dies, ["--json", str(file)])
    kept = json.loads(file.read_text())
    assert (kept["unfinished"], len(kept["rows"])) == (True, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    run("some", _measure(3.9), ["--json", str(file)])
    assert "unfinished" not in json.loads(file.read_text())


def test_what_there_was_no_time_for_is_named(tmp_path, capsys):
    file, elapsed = tmp_path / "out.json", iter([0.5, 1.5, 2.5])
    budget = TimeBudget(2.0, lambda: next(elapsed))
    assert [part for part in ("a", "b", "c") if budget.allows(part)] == ["a", "b"]
    measured = replace(_measure(3.9)(Options(quick=False, seed=0)), left_out=budget.left_out)
    run("some", lambda options: measured, ["--json", str(file)])
    assert "left out, since time was over: c\n" in capsys.readouterr().out
    assert json.loads(file.read_text())["left_out"] == ["c"]
    elapsed = iter([0.5, 1.5, 1.5, 2.5])
    budget = TimeBudget(2.0, lambda: next(elapsed))
    first = budget.first(0.5)
    assert [part for part in ("a", "b") if first.allows(part)] == ["a"]
    assert [part for part in ("c", "d") if budget.allows(part)] == ["c"]
    assert budget.left_out == ["b", "d"]
    assert TimeBudget(None).first(0.5).allows("any")
    assert TimeBudget(None).allows("any")
    assert 0 < process_age_s() < 86400


def test_quantiles_are_of_the_sorted_values():
    values = [float(value) for value in (5, 1, 4, 2, 3)]
    assert [quantile(values, share) for share in (0.0, 0.5, 0.99)] == [1.0, 3.0, 5.0]


@pytest.mark.serve
def test_step_overhead_times_both_transports(tmp_path):
    file = tmp_path / "out.json"
    command = [sys.executable, "-m", "penstock.benchmarks.step_overhead", "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["transport"] for row in rows] == ["step plane", "Ray actor calls"]
    for row in rows:
        assert row["steps"] == 1000
        assert 0 < row["p50_us"] <= row["p90_us"] <= row["p99_us"]


@pytest.mark.distributed
def test_step_gaps_times_every_step_of_all_ways():
    idle_s = step_gaps._idle(0.001, 2, 1)
    assert list(idle_s) == list(step_gaps.WAYS)
    for found in idle_s.values():
        assert len(found) == step_gaps.NUM_RANKS * (step_gaps.STEPS - step_gaps.SKIPPED)
        assert min(found) > 0
    assert sum(idle_s[step_gaps.LAUNCHED]) < sum(idle_s[step_gaps.AFTER])


@pytest.mark.distributed
def test_draft_or_send_compares_both_policies_with_steps_sent_ahead_and_without():
    found = draft_or_send.compared({"small": DEMO}, num_requests=1, length=12, seed=0)
    cells = [(row["model"], row["family"], row["policy"]) for row in found.rows]
    assert cells == [("small", family, policy) for family in FAMILIES for policy in draft_or_send.POLICIES]
    for row in found.rows:
        assert row["requests"] == 1
        assert row["altered"] == 0
        assert min(row["relative"], row["over_no_speculation"], row["over_neither"]) > 0
        assert (row["drafted"] > 0) <= (row["policy"] == "shadow")
        assert row["accepted"] <= row["drafted"]
        assert 0 <= row["ahead"] < 1
        assert (row["ahead"] > 0.5) or row["policy"] == "shadow"
    shadow = [row for row in found.rows if row["policy"] == "shadow"]
    assert [(target.figure, target.at_least) for target in found.targets] == [
        (row["relative"], draft_or_send.NO_LOSS) for row in shadow
    ]
    assert all(row["family"] in target.name for row, target in zip(shadow, found.targets, strict=True))


def test_a_bound_from_above_is_kept_by_what_lies_below():
    assert Target("growth", 15.9, at_most=16.0).reached
    assert not Target("growth", 16.1, at_most=16.0).reached
    assert Target("growth", 16.1, at_most=16.0).record() == {
        "name": "growth",
        "figure": 16.1,
        "at_most": 16.0,
        "reached": False,
    }


def test_a_line_fitted_to_memory_has_the_slope_of_its_growth():
    noise = [0.3, -0.2, 0.1, -0.1, 0.2, -0.3]
    assert slope([(5.0 * i, 100 + 0.5 * i + noise[i % 6]) for i in range(240)]) == pytest.approx(0.1, abs=0.001)


PEER = """
import json, sys
print("loading")
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    if line == "null\\n":
        sys.exit(3)
    print("a library's own words")
    print(json.dumps({"heard": json.loads(line)}), flush=True)
"""


def test_a_peer_answers_each_line_and_one_that_ends_is_named():
    with PeerProcess([sys.executable, "-c", PEER]) as peer:
        assert [peer.ask(question) for question in ([1, 2], {"a": None})] == [{"heard": [1, 2]}, {"heard": {"a": None}}]
        with pytest.raises(RuntimeError, match="ended with code 3"):
            peer.ask(None)
    with pytest.raises(RuntimeError, match="ended with code 4"), PeerProcess([sys.executable, "-c", "exit(4)"]):
        pass


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


async def _asked(url: str, on_event=None) -> Answer:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "water"}], "max_tokens": 30}
    async with aiohttp.ClientSession() as session:
        return await ask(session, url, body, on_event)


def test_what_becomes_of_a_stream_is_told_apart(tokenizer):
    async def leave(number: int) -> bool:
        return number < 2

    refusal = QueueFullError("64 requests wait", 3.0)
    backends = {
        COMPLETED: ScriptedBackend(tokenizer.vocab_size),
        LEFT: ScriptedBackend(tokenizer.vocab_size),
        REFUSED: ScriptedBackend(tokenizer.vocab_size, fail_at=0, failure=refusal),
        LOST: ScriptedBackend(tokenizer.vocab_size, fail_at=3),
    }
    for outcome, backend in backends.items():
        with served(backend, tokenizer) as server:
            answer = asyncio.run(_asked(server.url, leave if outcome == LEFT else None))
        assert answer.outcome == outcome
        if outcome == COMPLETED:
            assert len(answer.token_ids) == 30
        if outcome == REFUSED:
            assert answer.retry_after_s == 3.0
    assert asyncio.run(_asked("http://127.0.0.1:9")).outcome == LOST


async def _run_http(url: str, job: Job) -> Report:
    client = HttpPeer(url, MODEL)
    try:
        return await client.run(job)
    finally:
        await client.close()


async def _run_engine(job: Job) -> Report:
    engine = EnginePeer(EngineConfig(model=str(DEMO), device="cpu", num_threads=1))
    try:
        return await engine.run(job)
    finally:
        await engine.close()


def test_both_ends_of_the_serving_benchmark_count_the_same_tokens(tokenizer):
    chats = [[{"role": "user", "content": f"{i} + 4"}] for i in range(5)]
    job = Job(streams=2, chats=chats, max_tokens=6)
    with served(ScriptedBackend(tokenizer.vocab_size), tokenizer) as server:
        reports = [asyncio.run(_run_http(server.url, job)), asyncio.run(_run_engine(job))]
    for report in reports:
        assert [request.num_tokens for request in report.requests] == [6] * 5
        assert all(0 < request.ttft_s <= request.total_s <= report.wall_s for request in report.requests)


def test_controllers_are_timed_in_every_call_of_a_step():
    bench = Bench("ngram", 0, QUICK_TOKENS)
    jobs = [bench.maker.long("extraction", number, 24) for number in range(2)]
    bench.prepare(jobs)
    for policy in ("cascade", "shadow"):
        timed = drafting.controlled(bench, policy, 2, jobs)
        assert set(timed.calls_us) == {"max_draft_lens", "draft_lens", "observe", "learn"}
        assert len(timed.steps_us(["max_draft_lens", "draft_lens", "observe"])) > 10
        assert min(map(min, timed.calls_us.values())) > 0


def test_the_default_policy_loses_nothing_where_steps_are_sent_ahead(monkeypatch):
    """By a clock that repeats exactly, so that its targets bind here too."""
    monkeypatch.setattr(priced_waits, "QUICK_TOKENS", {1: 512})
    found = priced_waits.measure(Options(quick=True, seed=0))
    assert [target.name for target in found.targets if not target.reached] == []
    assert {row["family"] for row in found.rows if 0 < row["ahead"] < 1} == set(FAMILIES)


@pytest.mark.conformance
@pytest.mark.serve
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["overload", "churn"])
def test_what_a_server_must_withstand_it_withstands_for_a_minute(name, tmp_path):
    command = [sys.executable, "-m", f"penstock.benchmarks.{name}", "--quick", "--check"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
