"""Ranks on two and on three machines: network namespaces with a Ray node each, one gang across them.

No interface or address is set by hand. Where namespaces cannot be made, this says so and does not pass.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from penstock.benchmarks.cluster_server import ClusterServer
from penstock.benchmarks.faults import FAULTS
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

_STREAM = """
import json, sys, openai
client = openai.OpenAI(base_url=sys.argv[1], api_key="none", max_retries=0, timeout=120)
text, error, tokens = "", None, 0
try:
    stream = client.completions.create(
        model="penstock-demo", prompt="class ", max_tokens=600, temperature=1, seed=7, stream=True,
        extra_body={"ignore_eos": True},
    )
    for chunk in stream:
        text += chunk.choices[0].text
        tokens += 1
        if tokens == 10:
            print("streaming", flush=True)
except Exception as failure:
    error = type(failure).__name__
print(json.dumps([text, error]), flush=True)
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


def test_after_the_death_of_the_head_the_same_request_gives_the_same_tokens(cluster):
    """The head has the ingress: the stream is cut, and whoever started the server starts it again."""

    def stream() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _STREAM, f"{cluster.url}/v1"]
        client = cluster.machines.popen(1, *command, env=cluster.stranger, stdout=subprocess.PIPE)
        assert client.stdout.readline() == "streaming\n"
        return client

    def result(client: subprocess.Popen[str]) -> list[str | None]:
        said = json.loads(client.communicate(timeout=120)[0])
        assert client.returncode == 0
        return said

    with serving(cluster, 2):
        whole, error = result(stream())
        assert error is None
        client = stream()
        cluster.machines.kill_all(0)
        text, error = result(client)
        # What the openai client makes of a connection that is cut: it may be tried again
        assert error in ("APIConnectionError", "APIError", "RemoteProtocolError", "ReadError")
        assert whole.startswith(text)
        assert len(text) < len(whole)
    for i in (1, 2):
        cluster.machines.kill_all(i)
    cluster.start_head()
    cluster.join(1)
    with serving(cluster, 2):
        assert result(stream()) == [whole, None]


def test_a_node_that_falls_silent_costs_a_pause_and_is_let_in_again(cluster):
    """One rank's node: a spare on another takes over; the run without the fault is the measure."""
    for i in (1, 2):
        cluster.machines.kill_all(i)
        cluster.join(i)
    options = ["--num-spares", "1", "--step-timeout-s", "3"]
    with serving(cluster, 2, *options):
        server = ClusterServer(cluster.url, 0, cluster)
        fault = next(fault for fault in FAULTS if fault.name == "silent link")
        command = [sys.executable, "-c", _STREAM, f"{cluster.url}/v1"]

        def stream() -> subprocess.Popen[str]:
            client = cluster.machines.popen(0, *command, env=cluster.stranger, stdout=subprocess.PIPE)
            assert client.stdout.readline() == "streaming\n"
            return client

        whole = json.loads(stream().communicate(timeout=120)[0])
        client = stream()
        committed = fault.do(server, 2)
        disturbed = json.loads(client.communicate(timeout=180)[0])
        committed.undo()
        assert disturbed == whole
        assert whole[1] is None


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
