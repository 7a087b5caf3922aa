"""The harness that all benchmarks share, and that each benchmark runs and says what it promises to say."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from penstock.benchmarks.harness import Measurement, Options, Target, quantile, run


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
