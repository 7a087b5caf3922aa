"""Two gangs behind two ingresses: whichever is asked, the metrics are those of all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.serve, pytest.mark.timeout(400)]
DEMO = Path(__file__).parents[1] / "demo" / "model"
NUM_REQUESTS = 24

_SCRIPT = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from penstock.cluster.config import EngineConfig
from penstock.cluster.serving.local_ray import LocalRay

num_requests = int(sys.argv[2])
config = EngineConfig(model=sys.argv[1], served_model_name="m", device="cpu", num_threads=1, cpus_per_rank=0.5)
with LocalRay(replace(config, expert_parallel_size=4)) as local:  # CPUs for two gangs of one rank
    import httpx
    import ray
    from ray import serve
    from penstock.cluster.serving.app import build_app

    one = serve.deployment
    serve.deployment = lambda *args, **options: one(*args, **{**options, "num_replicas": 2})
    app = build_app(config)
    serve.start(http_options={"host": "127.0.0.1", "port": 0}, logging_config={"log_level": "WARNING"})
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
    # The ingresses may have attached to the same gang; this makes the other one count too
    ray.get([gang.count_unknown_fields.remote("/v1/completions", 3) for gang in gangs])
    readings = [handle.stats.remote().result() for _ in range(12)]
    running = {name: d.replica_states for name, d in serve.status().applications["default"].deployments.items()}
    own = [stats.num_generation_tokens for stats in ray.get([gang.stats.remote() for gang in gangs])]
    serve.shutdown()
print(json.dumps({"tokens": tokens, "readings": readings, "running": running, "own": own}))
"""


def test_metrics_do_not_depend_on_the_replica_that_is_asked() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(DEMO), str(NUM_REQUESTS)],
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1"},
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.strip().splitlines()[-1])
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
