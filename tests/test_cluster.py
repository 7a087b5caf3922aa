"""Ranks on two and on three machines: network namespaces with a Ray node each, one gang across them.

No interface or address is set by hand. Where namespaces cannot be made, this says so and does not pass.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .machines import Machines, machines, objection

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
DEMO = Path(__file__).parents[1] / "demo" / "model"
PENSTOCK, RAY = (str(Path(sys.executable).with_name(name)) for name in ("penstock", "ray"))
PORT = 8000
RAY_PORT = 6390
PROMPTS = ["import os\n", "def main(", "class "]
START_S = 240

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


class Cluster:
    """Ray with a token on ``machines``: the head on the first, one more node with each `join`."""

    def __init__(self, machines: Machines, folder: Path) -> None:
        self.machines, self.folder = machines, folder
        self.address = f"{machines.address(0)}:{RAY_PORT}"
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        kept = {name: os.environ[name] for name in ("PATH", "LANG", "OMP_NUM_THREADS") if name in os.environ}
        # Another user's home, so to say: no token, model or configuration of this one's
        self.stranger = {**kept, "HOME": str(folder), "RAY_TMPDIR": str(folder), "HF_HUB_OFFLINE": "1"}
        self.environment = {**self.stranger, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self._start(0, "--head", f"--port={RAY_PORT}", f"--temp-dir={folder}", "--include-dashboard=false")

    def join(self, i: int) -> None:
        """Start Ray on machine ``i``."""
        self._start(i, f"--address={self.address}")

    def _start(self, i: int, *options: str) -> None:
        shared = ["--num-cpus=2", "--object-store-memory=80000000", "--disable-usage-stats"]
        address = f"--node-ip-address={self.machines.address(i)}"
        done = self.machines.run(i, RAY, "start", *options, address, *shared, env=self.environment, timeout=START_S)
        assert done.returncode == 0, done.stdout + done.stderr

    @contextmanager
    def serving(self, num_ranks: int) -> Iterator[str]:
        """Serve the demo model on so many ranks; what was printed until it did."""
        log = self.folder / "log"
        options = [
            *("--address", self.address, "--host", self.machines.address(0), "--port", str(PORT)),
            *("--expert-parallel-size", str(num_ranks), "--placement-group-strategy", "SPREAD"),
            *("--served-model-name", "penstock-demo", "--dtype", "float32", "--device", "cpu", "--num-threads", "1"),
        ]
        with log.open("w") as out:
            server = self.machines.popen(
                0, PENSTOCK, "serve", str(DEMO), *options, env=self.environment, stdout=out, stderr=out
            )
        try:
            deadline = time.monotonic() + START_S
            while "Ctrl-C" not in log.read_text():
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            yield log.read_text()
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 0, log.read_text()
        finally:
            server.kill()
            server.wait()

    def ask(self, i: int) -> list[tuple[str, int]]:
        """Return the answers to `PROMPTS`, and their lengths in tokens, that a client on machine ``i`` gets."""
        url = f"http://{self.machines.address(0)}:{PORT}/v1"
        command = [sys.executable, "-c", _ASK, url, json.dumps(PROMPTS)]
        done = self.machines.run(i, *command, env=self.stranger, timeout=180)
        assert done.returncode == 0, done.stderr
        return [(text, num_tokens) for text, num_tokens in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if (reason := objection()) is not None:
        warnings.warn(f"NOT TESTED: ranks on several machines: {reason}", stacklevel=1)
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="pk-", dir="/tmp"))  # Ray's socket paths must be short
    try:
        with machines(3) as three:
            cluster = Cluster(three, folder)
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
    with cluster.serving(2) as printed:
        assert _ranks_line(printed) == "ranks: 0 on 10.77.0.1, 1 on 10.77.0.2"
        assert "warning" not in printed
        assert cluster.ask(1) == alone


def test_the_demo_is_served_across_three_machines(cluster, alone):
    cluster.join(2)
    with cluster.serving(3) as printed:
        assert _ranks_line(printed) == "ranks: 0 on 10.77.0.1, 1 on 10.77.0.2, 2 on 10.77.0.3"
        assert cluster.ask(2) == alone


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
