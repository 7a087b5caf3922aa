"""The server as a stranger has it: started by the command, used by the openai client, ended by Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from penstock.cluster.client.http_client import HttpClient

from .running_server import (
    DEMO,
    MODEL,
    PENSTOCK,
    Server,
    free_port,
    interrupted_stream,
    long_stream,
    processes,
    running,
    text_of,
    wait,
)

pytestmark = [pytest.mark.serve, pytest.mark.timeout(600)]
NUM_STREAMS = 32


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with running(["demo"], tmp_path_factory.mktemp("serve") / "log") as server:
        yield server


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
    wait("blocks freed", lambda: _samples(server)["penstock:kv_cache_usage_perc"] == 0)
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
        [*command, "--port", str(free_port())],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: address: this cluster already serves an application")
    assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200


def _answers(server: Server) -> bool:
    body = {"model": MODEL, "prompt": "import", "max_tokens": 4, "temperature": 0}
    try:
        response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
    except httpx.TransportError:
        return False
    return response.status_code == 200


def test_requests_of_an_ingress_that_dies_are_aborted_and_can_be_sent_again(server):
    undisturbed = long_stream(server, max_tokens=400)
    cut = long_stream(server, "Ingress", max_tokens=400)
    assert cut[-1] == "cut off"
    wait("another ingress", lambda: _answers(server), 90)
    wait("blocks freed", lambda: _samples(server)["penstock:kv_cache_usage_perc"] == 0)
    assert _samples(server)['penstock:request_success_total{finished_reason="abort"}'] >= 1
    assert text_of(long_stream(server, max_tokens=400)) == text_of(undisturbed)
    assert text_of(undisturbed).startswith(text_of([*cut[:-1], "data: [DONE]"]))


def test_a_worker_that_dies_is_replaced_and_no_stream_notices(server):
    undisturbed = text_of(long_stream(server, max_tokens=200))
    before = {process.pid for process in processes(server, "ray::Worker")}
    assert len(before) == 2
    assert text_of(long_stream(server, "Worker.run", max_tokens=200)) == undisturbed
    others = {process.pid for process in processes(server, "ray::Worker")}
    assert len(before & others) == 1, "the other worker keeps its weights"
    assert [event["kind"] for event in HttpClient(server.url).events()] == ["fault", "recovery"]


@pytest.mark.parametrize(("name", "keeps_workers"), [("ray::Coordinator", True), ("ServeReplica:default:Gang", False)])
def test_streams_outlive_their_coordinator_and_their_gang(server, name, keeps_workers):
    undisturbed = text_of(long_stream(server, max_tokens=200))
    workers = {process.pid for process in processes(server, "ray::Worker")}
    assert text_of(long_stream(server, name, max_tokens=200)) == undisturbed
    assert ({process.pid for process in processes(server, "ray::Worker")} == workers) == keeps_workers
    found = HttpClient(server.url).events()
    assert found[-1]["what"] == "resubmission"
    assert found[-1]["num_requests_replayed"] == 1
    assert ("coordinator_died" in {event["what"] for event in found}) == keeps_workers
    samples = _samples(server)
    assert samples["penstock:requests_resumed_total"] == 1
    assert samples["penstock:kv_cache_usage_perc"] == 0


def test_ctrl_c_ends_live_streams_first_and_leaves_nothing_behind(server):
    """The last test of that server: it ends it."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    folder = Path(server.ray_environment["RAY_AUTH_TOKEN_PATH"]).parent
    assert len(family) > 5
    assert folder.is_dir()
    undisturbed = text_of(long_stream(server, max_tokens=400))
    assert text_of(interrupted_stream(server, signal.SIGINT, 1, 400)) == undisturbed
    assert server.process.wait(60) == 0
    # Zombies are the init process's business
    wait("processes gone", lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family))
    assert not folder.exists()
