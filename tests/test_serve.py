"""The server as a stranger has it: started by the command, used by the openai client, ended by Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from penstock.cluster.client.http_client import HttpClient

from .random_placement import write_placement

pytestmark = [pytest.mark.serve, pytest.mark.timeout(600)]
MODEL = "penstock-demo"
DEMO = Path(__file__).parents[1] / "demo" / "model"
NUM_STREAMS = 32
START_S = 300
PENSTOCK = str(Path(sys.executable).with_name("penstock"))


@dataclass
class Server:
    """A running `penstock demo`."""

    process: subprocess.Popen[str]
    log: Path
    url: str

    @property
    def ray_environment(self) -> dict[str, str]:
        """What the server prints for other processes of the same cluster."""
        line = next(line for line in self.log.read_text().splitlines() if "RAY_ADDRESS=" in line)
        return dict(re.findall(r"(RAY_\w+)=(\S+)", line))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait(what: str, condition, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout_s} s: {what}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with _running(["demo"], tmp_path_factory.mktemp("serve") / "log") as server:
        yield server


@contextmanager
def _running(command: list[str], log: Path) -> Iterator[Server]:
    port = _free_port()
    with log.open("w") as out:
        # An address left over from another cluster must not matter
        environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1"}
        process = subprocess.Popen(
            [PENSTOCK, *command, "--port", str(port)], stdout=out, stderr=out, text=True, env=environment
        )
    try:
        _wait("server up", lambda: process.poll() is not None or "Ctrl-C" in log.read_text(), START_S)
        assert process.poll() is None, log.read_text()
        yield Server(process, log, f"http://127.0.0.1:{port}")
    finally:
        # The last test has ended it already, unless it failed or was not selected
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def _prompts() -> list[list[dict[str, str]]]:
    sums = [f"{100 + 17 * i} + {205 + 31 * i}" for i in range(NUM_STREAMS // 2)]
    lookups = [f"order: K-{i}\ncity: Oslo\nagent: Ada\nget:order,city" for i in range(NUM_STREAMS // 2)]
    return [[{"role": "user", "content": content}] for content in sums + lookups]


def _options(i: int) -> dict:
    """Half the streams greedy, half sampled."""
    return {"temperature": 0} if i % 2 else {"temperature": 1.0, "seed": 1000 + i, "top_p": 0.9}


async def _stream(client: openai.AsyncOpenAI, i: int) -> tuple[str, dict]:
    text, last = "", {}
    chunks = await client.chat.completions.create(
        model=MODEL, messages=_prompts()[i], max_tokens=48, stream=True, stream_options={"include_usage": True},
        **_options(i),
    )  # fmt: skip
    async for chunk in chunks:
        if chunk.choices and chunk.choices[0].delta.content:
            text += chunk.choices[0].delta.content
        last = chunk.model_dump()
    return text, last


def test_the_demo_shows_a_sample_and_its_statistics(server):
    log = server.log.read_text()
    assert "Qwen3MoeForCausalLM, float32, max_model_len 2048; 32 experts, 4 per token, in 4 of 4 layers" in log
    assert re.search(
        r"ranks 0-1, each: 16 experts a layer, [\d.]+ MB; all else [\d.]+ MB; KV (\d+) blocks x 16 = \d+ tokens, "
        r"[\d.]+ MB; loaded in [\d.]+ s",
        log,
    )
    assert re.search(r"Answer: \d+", log)
    assert re.search(
        r"\d+ tokens, \d+ tokens/s; \d+ of \d+ draft tokens accepted in \d+ steps; "
        r"[\d.]+ distinct experts per layer and step; [1-9]\d* bytes between ranks per token",
        log,
    )


async def test_concurrent_streams_equal_the_same_requests_alone(server):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:
        together = await asyncio.gather(*[_stream(client, i) for i in range(NUM_STREAMS)])
        alone = [await _stream(client, i) for i in range(NUM_STREAMS)]
    for (text, last), (text_alone, last_alone) in zip(together, alone, strict=True):
        assert text == text_alone
        assert text
        assert last["usage"] == last_alone["usage"]
    assert _samples(server)["penstock:kv_cache_usage_perc"] == 0
    assert len({text for text, _ in together}) > NUM_STREAMS // 2, "different prompts get different answers"


def test_a_client_gone_mid_stream_frees_its_blocks(server):
    before = _samples(server)
    body = {"model": MODEL, "prompt": "import", "max_tokens": 1500, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        while not next(lines).startswith("data: {"):
            pass
        assert _samples(server)["penstock:kv_cache_usage_perc"] > 0
    _wait("blocks freed", lambda: _samples(server)["penstock:kv_cache_usage_perc"] == 0)
    after = _samples(server)
    aborted = 'penstock:request_success_total{finished_reason="abort"}'
    assert after[aborted] == before.get(aborted, 0) + 1
    assert after["penstock:generation_tokens_total"] - before["penstock:generation_tokens_total"] < 1500


def _samples(server: Server) -> dict[str, float]:
    client = HttpClient(server.url)
    try:
        return client.stats()
    finally:
        client.close()


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/completions", b"{not json", 400, None),
        ("/v1/completions", {"model": "nobody", "prompt": "x"}, 404, "model"),
        ("/v1/completions", {"model": MODEL, "prompt": "x", "temperature": 9}, 400, "temperature"),
        ("/v1/completions", {"model": MODEL, "prompt": [5] * 3000}, 400, "prompt"),
        ("/v1/completions", {"model": MODEL, "prompt": [10**6]}, 400, "prompt"),
        ("/v1/completions", {"model": MODEL, "prompt": "x", "max_tokens": 99999}, 400, "max_tokens"),
        ("/v1/chat/completions", {"model": MODEL, "messages": []}, 400, "messages"),
        (
            "/v1/chat/completions",
            {"model": MODEL, "messages": [{"role": "x", "content": "y"}]},
            400,
            "messages[0].role",
        ),
    ],
)
def test_bad_requests_name_the_field(server, path, body, status, param):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = httpx.post(server.url + path, content=content, headers={"content-type": "application/json"}, timeout=60)
    error = response.json()["error"]
    assert response.status_code == status
    assert error["message"]
    assert param is None or error["param"] == param


def test_health_and_models(server):
    assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
    models = httpx.get(f"{server.url}/v1/models", timeout=60).json()
    assert [model["id"] for model in models["data"]] == [MODEL]


def test_choices_and_scores_come_through_the_gang(server):
    """What travels with plans and results, between processes and through Ray."""
    client = HttpClient(server.url)
    asked = {"seed": 8, "max_tokens": 16, "frequency_penalty": 0.7, "logit_bias": {40: 2.0}, "min_tokens": 4}
    together = client.generate_many(["import ", "def f("], n=3, logprobs=2, **asked)
    alone = client.generate_many(["def f("], n=2, **asked)
    assert [output.text for output in together[3:5]] == [output.text for output in alone]
    assert len({output.text for output in together}) == 6
    for output in together:
        assert len(output.logprobs) == output.num_output_tokens >= 4
        assert "".join(entry.token for entry in output.logprobs).startswith(output.text)
    (scored,) = client.generate_many(["import os\n"], max_tokens=0, prompt_logprobs=1)
    assert (scored.text, len(scored.prompt_logprobs)) == ("", scored.num_prompt_tokens)
    client.close()
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": "import os\n"}, timeout=60).json()
    assert tokens["count"] == scored.num_prompt_tokens


_HANDLE = """
import asyncio, json, penstock
client = penstock.connect()
question = [{"role": "user", "content": "12 + 30"}]
fixed = {"temperature": 0, "speculation": {"mode": "fixed"}}  # so that the number of steps is no matter of time
whole = client.generate(question, **fixed)
with client.stream(question, **fixed) as stream:
    pieces = list(stream)
again = asyncio.run(client.agenerate(question, temperature=0))
predicted = client.generate(question, temperature=0, prediction=whole.text, speculation={"mode": "fixed"})
many = client.generate_many(["import ", "def f("], n=2, seed=8, max_tokens=8, logprobs=1)
try:
    client.generate("x", temperature=9)
except ValueError as error:
    refusal = str(error)
try:
    client.generate([10**6])
except ValueError as error:
    unknown = str(error)
print(json.dumps([whole.text, "".join(pieces), again.text, stream.generation.stats.steps, client.models(),
                  client.stats()["penstock:engine_up"], refusal, unknown,
                  [[output.text, output.token_ids, [entry.token for entry in output.logprobs]] for output in many],
                  predicted.text, predicted.stats.phase, predicted.stats.accepted_prediction_tokens]))
"""


def test_the_handle_inside_the_cluster_gives_what_http_gives(server):
    question = [{"role": "user", "content": "12 + 30"}]
    over_http = HttpClient(server.url).generate(question, temperature=0, speculation={"mode": "fixed"})
    done = subprocess.run(
        [sys.executable, "-c", _HANDLE],
        env={**os.environ, **server.ray_environment},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.strip().splitlines()[-1])
    whole, streamed, again, steps, models, up, refusal, unknown, many, predicted, phase, num_accepted = said
    outputs = HttpClient(server.url).generate_many(["import ", "def f("], n=2, seed=8, max_tokens=8, logprobs=1)
    assert many == [[o.text, o.token_ids, [entry.token for entry in o.logprobs]] for o in outputs]
    assert whole == streamed == again == over_http.text
    assert 0 < steps <= over_http.num_output_tokens, "how many depends on what shadow has seen by then"
    assert (predicted, phase) == (whole, "fixed")
    assert num_accepted > 5
    assert models == [MODEL]
    assert up == 1
    assert refusal.startswith("temperature: ")
    assert unknown.startswith("prompt: ")


def test_a_second_deployment_into_the_cluster_is_refused_and_harms_nothing(server):
    command = [PENSTOCK, "serve", str(DEMO), "--address", server.ray_environment["RAY_ADDRESS"], "--device", "cpu"]
    environment = {**os.environ, **server.ray_environment}
    done = subprocess.run(
        [*command, "--port", str(_free_port())],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: address: this cluster already serves an application")
    assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200


def _processes(server: Server, name: str) -> list[psutil.Process]:
    family = psutil.Process(server.process.pid).children(recursive=True)
    return [process for process in family if name in " ".join(process.cmdline())]


def _answers(server: Server) -> bool:
    body = {"model": MODEL, "prompt": "import", "max_tokens": 4, "temperature": 0}
    try:
        response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
    except httpx.TransportError:
        return False
    return response.status_code == 200


def _long_stream(server: Server, killed: str | None = None, max_tokens: int = 2000) -> list[str]:
    """Return the lines of a long stream; kill the process ``killed`` while it runs."""
    body = {"model": MODEL, "prompt": "import", "max_tokens": max_tokens, "stream": True, "ignore_eos": True, "seed": 3}
    lines = []
    try:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            for line in response.iter_lines():
                lines.append(line)
                if len(lines) == 10 and killed is not None:
                    _processes(server, killed)[0].kill()
    except httpx.TransportError:
        lines.append("cut off")
    return [line for line in lines if line]


def _text(lines: list[str]) -> str:
    assert lines[-1] == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    return "".join(choice["text"] for event in events for choice in event["choices"])


def test_requests_of_an_ingress_that_dies_are_aborted_and_can_be_sent_again(server):
    undisturbed = _long_stream(server, max_tokens=400)
    cut = _long_stream(server, "Ingress", max_tokens=400)
    assert cut[-1] == "cut off"
    _wait("another ingress", lambda: _answers(server), 90)
    _wait("blocks freed", lambda: _samples(server)["penstock:kv_cache_usage_perc"] == 0)
    assert _samples(server)['penstock:request_success_total{finished_reason="abort"}'] >= 1
    assert _text(_long_stream(server, max_tokens=400)) == _text(undisturbed)
    assert _text(undisturbed).startswith(_text([*cut[:-1], "data: [DONE]"]))


def test_a_worker_that_dies_is_replaced_and_no_stream_notices(server):
    undisturbed = _text(_long_stream(server, max_tokens=200))
    processes = {process.pid for process in _processes(server, "ray::Worker")}
    assert len(processes) == 2
    assert _text(_long_stream(server, "Worker.run", max_tokens=200)) == undisturbed
    others = {process.pid for process in _processes(server, "ray::Worker")}
    assert len(processes & others) == 1, "the other worker keeps its weights"
    assert [event["kind"] for event in HttpClient(server.url).events()] == ["fault", "recovery"]


@pytest.mark.parametrize(("name", "keeps_workers"), [("ray::Coordinator", True), ("ServeReplica:default:Gang", False)])
def test_streams_outlive_their_coordinator_and_their_gang(server, name, keeps_workers):
    undisturbed = _text(_long_stream(server, max_tokens=200))
    workers = {process.pid for process in _processes(server, "ray::Worker")}
    assert _text(_long_stream(server, name, max_tokens=200)) == undisturbed
    assert ({process.pid for process in _processes(server, "ray::Worker")} == workers) == keeps_workers
    found = HttpClient(server.url).events()
    assert found[-1]["what"] == "resubmission"
    assert found[-1]["num_requests_replayed"] == 1
    assert ("coordinator_died" in {event["what"] for event in found}) == keeps_workers
    samples = _samples(server)
    assert samples["penstock:requests_resumed_total"] == 1
    assert samples["penstock:kv_cache_usage_perc"] == 0


def _interrupted_stream(server: Server, kind: signal.Signals, times: int, max_tokens: int) -> list[str]:
    """Return the lines of a long stream; send the server a signal once it runs, and again when it has said so."""
    body = {"model": MODEL, "prompt": "import", "max_tokens": max_tokens, "stream": True, "ignore_eos": True, "seed": 3}
    lines = []
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        for line in filter(None, response.iter_lines()):
            lines.append(line)
            if len(lines) == 10:
                for _ in range(times):
                    server.process.send_signal(kind)
                    _wait("it says so", lambda: "ending live requests, for at most 30 s" in server.log.read_text())
    return lines


def test_ctrl_c_ends_live_streams_first_and_leaves_nothing_behind(server):
    """The last test of that server: it ends it."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    folder = Path(server.ray_environment["RAY_AUTH_TOKEN_PATH"]).parent
    assert len(family) > 5
    assert folder.is_dir()
    undisturbed = _text(_long_stream(server, max_tokens=400))
    assert _text(_interrupted_stream(server, signal.SIGINT, 1, 400)) == undisturbed
    assert server.process.wait(60) == 0
    # Zombies are the init process's business
    _wait("processes gone", lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family))
    assert not folder.exists()


def test_a_placement_reaches_the_workers_by_its_content(tmp_path):
    """Its file need not be where they run, nor there at all any more when a worker or the gang is started anew."""
    from penstock.cluster.client.llm import LLM

    path = tmp_path / "placement.json"
    write_placement(DEMO, 2, "balanced", path)
    options = [
        "--expert-parallel-size",
        "2",
        "--served-model-name",
        MODEL,
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--num-threads",
        "1",
    ]
    with LLM(str(DEMO), dtype="float32", device="cpu", num_threads=1) as llm:
        wanted = llm.generate("import os\n", temperature=0, max_tokens=24)[0].text
    with _running(["serve", str(DEMO), "--placement", str(path), *options], tmp_path / "log") as server:
        path.unlink()
        # 32 experts and three replicas
        assert "17-18 experts a layer" in server.log.read_text()
        client = HttpClient(server.url)
        for lost in ("Worker.run", "ServeReplica:default:Gang"):
            assert client.generate("import os\n", temperature=0, max_tokens=24).text == wanted
            gone = _processes(server, lost)[0]
            gone.kill()
            psutil.wait_procs([gone], timeout=30)
        assert client.generate("import os\n", temperature=0, max_tokens=24).text == wanted
        client.close()
        # SIGTERM is as good as Ctrl-C, and the second of them cuts off what the first would let end
        last = _interrupted_stream(server, signal.SIGTERM, 2, 2000)[-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["code"], error["type"]) == ("engine_dead", "server_error")
        assert server.process.wait(60) == 0


@pytest.fixture
def without_ray(monkeypatch):
    monkeypatch.setattr("penstock.cluster.serving.server.LocalRay", lambda *_: pytest.fail("Ray was started"))


def test_a_port_in_use_is_refused_with_one_line(penstock, without_ray):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = penstock("serve", str(DEMO), "--port", str(port))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: port: cannot listen on 127.0.0.1:{port}")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("fault", ["cut short", "no weights", "unknown architecture", "no such directory"])
def test_an_unusable_checkpoint_is_refused_before_ray_starts(fault, checkpoint, tmp_path, penstock, without_ray):
    import shutil

    directory = tmp_path / "model"
    if fault != "no such directory":
        shutil.copytree(checkpoint("qwen3_moe"), directory)
    weights = sorted(directory.glob("*.safetensors"))
    if fault == "cut short":
        weights[0].write_bytes(weights[0].read_bytes()[:-100])
    elif fault == "no weights":
        for file in weights:
            file.unlink()
    elif fault == "unknown architecture":
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    done = penstock("serve", str(directory))
    assert done.returncode == 2
    assert done.stderr.startswith("error: model: ")
