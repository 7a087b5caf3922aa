"""Ranks on two and on three machines: network namespaces with a Ray node each, one gang across them.

No interface or address is set by hand. Where namespaces cannot be made, this says so and does not pass.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from penstock.benchmarks.machines import machines, objection
from penstock.benchmarks.ray_cluster import PENSTOCK, RayCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
DEMO = Path(__file__).parents[1] / "demo" / "model"
PROMPTS = ["import os\n", "def main(", "class "]

_ASK = """
import json, sys, openai
client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0, timeout=120)
texts = []
for prompt in json.loads(sys.argv[2]):
    stream = client.completions.create(
        model="penstock-demo", prompt=prompt, max_tokens=24, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )
    text = ""
    for chunk in stream:
        text += chunk.choices[0].text if chunk.choices else ""
        usage = chunk.usage
    texts.append([text, usage.completion_tokens])
print(json.dumps(texts))
"""


@contextmanager
def serving(cluster: RayCluster, num_ranks: int, *options: str) -> Iterator[str]:
    """Serve the demo model on so many ranks; what was printed until it did."""
    given = [
        *("--expert-parallel-size", str(num_ranks), "--placement-group-strategy", "SPREAD"),
        *("--served-model-name", "penstock-demo", "--dtype", "float32", "--device", "cpu", "--num-threads", "1"),
        *options,
    ]
    with cluster.serving(DEMO, *given) as (_, log):
        yield log.read_text()


def ask(cluster: RayCluster, i: int) -> list[tuple[str, int]]:
    """Return the answers to `PROMPTS`, and their lengths in tokens, that a client on machine ``i`` gets."""
    answers = cluster.program(i, _ASK, f"{cluster.url}/v1", json.dumps(PROMPTS), environment=cluster.stranger)
    return [(text, num_tokens) for text, num_tokens in answers]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    if (reason := objection()) is not None:
        warnings.warn(f"NOT TESTED: ranks on several machines: {reason}", stacklevel=1)
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="pk-", dir="/tmp"))  # Ray's socket paths must be short
    try:
        with machines(3) as three:
            cluster = RayCluster(three, folder)
            cluster.join(1)
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def alone() -> list[tuple[str, int]]:
    """What one process answers."""
    from penstock.cluster.client.llm import LLM

    with LLM(str(DEMO), dtype="float32", device="cpu", num_threads=1, draft_len=0) as llm:
        answers = llm.generate(PROMPTS, temperature=0, max_tokens=24)
    return [(answer.text, len(answer.token_ids)) for answer in answers]


def _ranks_line(printed: str) -> str:
    (line,) = [line for line in printed.splitlines() if line.startswith("ranks: ")]
    return line


def test_the_demo_is_served_across_two_machines(cluster, alone):
    with serving(cluster, 2) as printed:
        assert _ranks_line(printed) == "ranks: 0 on 10.77.0.1, 1 on 10.77.0.2"
        assert "warning" not in printed
        assert ask(cluster, 1) == alone


def test_the_demo_is_served_across_three_machines(cluster, alone):
    cluster.join(2)
    with serving(cluster, 3) as printed:
        assert _ranks_line(printed) == "ranks: 0 on 10.77.0.1, 1 on 10.77.0.2, 2 on 10.77.0.3"
        assert ask(cluster, 2) == alone


def test_who_has_no_token_is_not_let_in_and_told_how(cluster):
    impatient = {**cluster.stranger, "RAY_NUM_REDIS_GET_RETRIES": "2"}  # Ray tries twenty times, once a second
    done = cluster.machines.run(
        1, PENSTOCK, "serve", str(DEMO), "--address", cluster.address, env=impatient, timeout=120
    )
    assert done.returncode == 2
    assert "address: cannot join the Ray cluster at" in done.stderr
    assert "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH" in done.stderr


def test_the_machines_leave_nothing_behind():
    if (reason := objection()) is not None:
        pytest.skip(reason)
    with machines(2) as two:
        names = [*two.names, two.switch]
        sleeper = two.popen(1, "sleep", "1000")
        while sleeper.pid not in two.pids(1):
            assert sleeper.poll() is None
        links = two.run(0, "ip", "-o", "link").stdout
        assert "eth0" in links
    assert sleeper.wait(10) == -signal.SIGKILL
    there = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout.split()
    assert not set(names) & set(there)
