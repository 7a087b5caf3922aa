"""Several gangs behind Serve's proxy: metrics are those of all; gangs come with the load, and go when it has ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.serve, pytest.mark.timeout(600)]
DEMO = Path(__file__).parents[1] / "demo" / "model"
NUM_REQUESTS = 24

_SCRIPT = """
import json, os, socket, sys, time
from concurrent.futures import ThreadPoolExecutor
import httpx, psutil
from penstock.cluster.config import EngineConfig
from penstock.cluster.serving.local_ray import LocalRay

num_requests = int(sys.argv[2])
config = EngineConfig(
    model=sys.argv[1], served_model_name="m", dtype="float32", device="cpu", num_threads=1, cpus_per_rank=0.5,
    num_replicas=2,
)
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]

def over_proxy(kill=False):
    body = {"model": "m", "prompt": "class ", "max_tokens": 300, "seed": 7, "stream": True, "ignore_eos": True}
    text, error = "", None
    try:
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60) as response:
            if response.status_code != 200:
                return None, response.status_code
            for number, line in enumerate(filter(None, response.iter_lines())):
                if line != "data: [DONE]":
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                if kill and number == 10:
                    for process in psutil.Process().children(recursive=True):
                        if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::ProxyActor"):
                            process.kill()
    except httpx.TransportError as failure:
        error = type(failure).__name__
    return text, error

with LocalRay(config) as local:
    import ray
    from ray import serve
    from penstock.cluster.serving.app import build_app

    one = serve.deployment
    serve.deployment = lambda *args, **options: one(*args, **{**options, "num_replicas": 2})  # the ingress too
    app = build_app(config)
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "WARNING"})
    serve.run(app, name="default")
    handle = serve.get_app_handle("default")

    def generate(i):
        body = {"temperature": 0, "max_tokens": 7, "ignore_eos": True}
        for delta in handle.options(stream=True).stream.remote([5 + i, 6, 7], body):
            last = delta
        return last.generation.num_output_tokens

    with ThreadPoolExecutor(8) as pool:
        tokens = sum(pool.map(generate, range(num_requests)))
    from penstock.cluster.serving.gang_directory import GangDirectory

    gangs = GangDirectory("default").coordinators().values()
    ray.get([gang.count_unknown_fields.remote("/v1/completions", 3) for gang in gangs])
    readings = [handle.stats.remote().result() for _ in range(12)]
    running = {name: d.replica_states for name, d in serve.status().applications["default"].deployments.items()}
    own = [stats.num_generation_tokens for stats in ray.get([gang.stats.remote() for gang in gangs])]
    proxied = [over_proxy(), over_proxy(kill=True)]
    deadline = time.monotonic() + 60
    while (again := over_proxy())[1] is not None and time.monotonic() < deadline:
        time.sleep(0.2)
    proxied.append(again)
    serve.shutdown()
print(json.dumps({"tokens": tokens, "readings": readings, "running": running, "own": own, "proxied": proxied}))
"""


_GROW_AND_SHRINK = """
import json, sys, threading, time
from penstock.cluster.config import EngineConfig
from penstock.cluster.serving.local_ray import LocalRay

config = EngineConfig(
    model=sys.argv[1], served_model_name="m", device="cpu", dtype="float32", num_threads=1, cpus_per_rank=0.5,
    draft_len=0, max_replicas=2, target_ongoing_requests=2, upscale_delay_s=0, downscale_delay_s=0,
)
with LocalRay(config) as local:
    import ray
    from ray import serve
    from penstock.cluster.serving.app import build_app
    from penstock.cluster.serving.gang_directory import GangDirectory

    one = serve.deployment

    def impatient(*args, **options):  # Serve looks back 30 s, or what one tells it
        if "autoscaling_config" in options:
            options["autoscaling_config"] = options["autoscaling_config"].model_copy(update={"look_back_period_s": 1.0})
        return one(*args, **options)

    serve.deployment = impatient
    serve.start(http_options={"location": "NoServer"}, logging_config={"log_level": "WARNING"})
    serve.run(build_app(config), name="default")
    handle = serve.get_app_handle("default")
    directory = GangDirectory("default")

    class Client(threading.Thread):  # sends the same long request again and again
        def __init__(self):
            super().__init__(daemon=True)
            self.texts, self.stopped = [], False
            self.start()

        def run(self):
            while not self.stopped:
                body = {"temperature": 0, "max_tokens": 1000, "ignore_eos": True}
                try:
                    for delta in handle.options(stream=True).stream.remote([5, 6, 7], body):
                        last = delta
                    self.texts.append(last.generation.text)
                except Exception as error:
                    self.texts.append(repr(error))

    def gangs():
        return dict(serve.status().applications["default"].deployments["Gang"].replica_states)

    def live():
        found = []
        for gang in directory.coordinators().values():
            try:
                stats = ray.get(gang.stats.remote())
                found.append(stats.num_requests_running + stats.num_requests_waiting)
            except Exception:  # it loads, or has gone
                pass
        return found

    def wait(what, condition):
        deadline = time.monotonic() + 240
        while not condition():
            if time.monotonic() > deadline:
                raise SystemExit(f"not in time: {what}; {gangs()}, {live()}")
            time.sleep(0.05)

    clients = [Client() for _ in range(4)]
    wait("two gangs", lambda: gangs() == {"RUNNING": 2})
    wait("requests in both", lambda: len(live()) == 2 and min(live()) > 1)
    for client in clients[2:]:  # the two that stay are one gang's due, and one at each gang
        client.stopped = True
    wait("one gang", lambda: gangs() == {"RUNNING": 1})
    for client in clients:
        client.stopped = True
    for client in clients:
        client.join()
    texts = [client.texts for client in clients]
    serve.shutdown()
print(json.dumps(texts))
"""


def _run(script: str, *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={
            **os.environ,
            "RAY_ADDRESS": "127.0.0.1:1",
            "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.3",
        },
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def said() -> dict[str, Any]:
    return _run(_SCRIPT, str(DEMO), str(NUM_REQUESTS))


def test_after_the_death_of_serves_proxy_the_same_request_gives_the_same_tokens(said: dict[str, Any]) -> None:
    (whole, error), (cut, cut_error), again = said["proxied"]
    assert error is None
    assert cut_error in ("ReadError", "RemoteProtocolError")
    assert whole.startswith(cut)
    assert len(cut) < len(whole)
    assert again == [whole, None]


def test_metrics_do_not_depend_on_the_replica_that_is_asked(said: dict[str, Any]) -> None:
    assert said["running"] == {"Gang": {"RUNNING": 2}, "Ingress": {"RUNNING": 2}}
    assert len(said["own"]) == 2
    first = said["readings"][0]
    assert all(reading == first for reading in said["readings"])
    assert said["tokens"] == 7 * NUM_REQUESTS == sum(said["own"])
    assert first["penstock:generation_tokens_total"] == said["tokens"]
    assert first["penstock:prompt_tokens_total"] == 3 * NUM_REQUESTS
    assert first['penstock:request_success_total{finished_reason="length"}'] == NUM_REQUESTS
    assert first["penstock:time_to_first_token_seconds_count"] == NUM_REQUESTS
    assert first['penstock:unknown_request_fields_total{endpoint="/v1/completions"}'] == 2 * 3
    assert first["penstock:num_requests_running"] == 0


def test_gangs_come_with_the_load_and_go_when_their_requests_have_ended() -> None:
    texts = _run(_GROW_AND_SHRINK, str(DEMO))
    assert len(texts) == 4
    assert all(texts)
    assert {len(text) > 1000 for client in texts for text in client} == {True}
    assert len({text for client in texts for text in client}) == 1
