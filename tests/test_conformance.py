"""Other people's programs, unmodified, against the demo. They are found on the PATH, from environments of their own.

``pip install 'lm-eval[api]' transformers`` in one, ``pip install guidellm`` in another, then
``PATH=$PATH:one/bin:another/bin pytest -m conformance``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.benchmarks.server_process import ServerProcess, serving

pytestmark = [pytest.mark.conformance, pytest.mark.serve, pytest.mark.timeout(900)]
DEMO = Path(__file__).parents[1] / "demo" / "model"
TASKS = Path(__file__).parent / "lm_eval"
MODEL = "penstock-demo"
EXPECTED = {
    # the model's card: all of 512, and 509 of 512
    ("penstock_math", "exact_match,none"): 1.0,
    ("penstock_extraction", "exact_match,none"): 0.98,
    # answers that end in another number are not what it would say
    ("penstock_math_choices", "acc,none"): 1.0,
}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with serving(["demo"]) as running:
        yield running


def _environment() -> dict[str, str]:
    """Return ours without what leads other environments to our packages; no program is to ask a hub."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@pytest.mark.skipif(shutil.which("lm-eval") is None, reason="lm-eval is not on the PATH")
def test_lm_eval_scores_the_demo_as_its_card_does(server, tmp_path):
    model = {
        "model": MODEL,
        "base_url": f"{server.url}/v1/completions",
        "tokenizer": str(DEMO),
        "num_concurrent": 8,
        "max_length": 2048,
        "max_retries": 1,
    }
    tasks = sorted({task for task, _ in EXPECTED})
    command = ["lm-eval", "run", "--model", "local-completions", "--include_path", str(TASKS)]
    command += ["--model_args", ",".join(f"{name}={value}" for name, value in model.items())]
    command += ["--tasks", *tasks, "--output_path", str(tmp_path)]
    done = subprocess.run(
        command, env=_environment(), cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tmp_path.rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    scores = {(task, metric): results[task][metric] for task, metric in EXPECTED}
    assert all(scores[key] >= least for key, least in EXPECTED.items()), scores


@pytest.mark.skipif(shutil.which("guidellm") is None, reason="guidellm is not on the PATH")
@pytest.mark.parametrize("load", [("--streams", "1", "8"), ("--rate", "4")], ids=["streams", "rate"])
def test_guidellm_measures_the_demo_through_bench_serve(server, tmp_path, load):
    report = tmp_path / "report.json"
    program = str(Path(sys.executable).with_name("penstock"))
    command = [program, "bench", "serve", "--url", server.url, *load, "--num-requests", "24", "--max-tokens", "32"]
    command += ["--output", str(report), "--", "--disable-progress"]
    environment = {**_environment(), **{name: value for name, value in os.environ.items() if name.startswith("PYTHON")}}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    benchmarks = json.loads(report.read_text())["benchmarks"]
    assert len(benchmarks) == len(load) - 1
    for benchmark in benchmarks:
        totals = benchmark["metrics"]["request_totals"]
        # guidellm's own processes may part before the last of them has reported
        assert totals["successful"] >= 23
        assert (totals["errored"], totals["incomplete"]) == (0, 0)
        assert benchmark["metrics"]["time_to_first_token_ms"]["successful"]["median"] > 0
