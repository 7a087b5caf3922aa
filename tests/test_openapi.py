"""Whatever a request holds, the server has an answer: requests made from our OpenAPI description, valid and not."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
import requests
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode

from penstock.cluster.api.chat_tokenizer import ChatTokenizer
from penstock.cluster.api.openai_api import create_app
from penstock.cluster.api.serving_state import ServingState
from penstock.cluster.client.llm import make_ranks
from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.async_engine import AsyncEngine
from penstock.cluster.engine.engine import Engine

from .scripted_backend import LoopbackServer

DEMO = Path(__file__).parents[1] / "demo" / "model"
MODEL = "demo"
VOCAB = 1024
NUM_POSTS = 4
OPERATIONS = {
    operation.label: operation
    for operation in (
        found.ok() for found in schemathesis.openapi.from_dict(create_app().openapi()).get_all_operations()
    )
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Serve the demo model from another thread: the real engine, on sequences so short that many can be tried."""
    torch.set_num_threads(1)
    config = EngineConfig(model=str(DEMO), device="cpu", num_threads=1, max_model_len=40, max_num_seqs=128)
    started = threading.Event()
    servers: list[LoopbackServer] = []

    async def serve() -> None:
        backend = AsyncEngine(Engine(config, make_ranks(config)))
        state = await ServingState.create(backend, ChatTokenizer(str(DEMO)), MODEL)
        servers.append(LoopbackServer(create_app(state), started.set))
        await servers[0].run_here()
        await backend.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert started.wait(60)
        yield servers[0].url
    finally:
        servers[0].should_exit = True
        thread.join(60)


INPUTS: dict[str, list[Any]] = {
    "messages": [
        [{"role": "user", "content": "1 + 2"}],
        [{"role": "system", "content": "é"}, {"role": "user", "content": []}],
    ],
    "prompt": ["import os\n", ["a", "b"], [5, 6, 7], [[5], [6, 7]]],
    "tokens": [[5, 6, 7]],
}


def tame(body: dict[str, Any], random: Random) -> None:
    """Bring most of a body's fields within what the model allows: taken as it comes, hardly one request is served."""
    for name in [name for name in body if name not in ("model", "prompt", "messages", "tokens")]:
        if random.random() < 0.8:
            del body[name]
    if "model" in body and random.random() < 0.95:
        body["model"] = MODEL
    for name, choices in INPUTS.items():
        if name in body and random.random() < 0.7:
            body[name] = random.choice(choices)
    if "prompt" in body and "messages" in body:  # /tokenize takes either
        del body[random.choice(["prompt", "messages"])]
    if random.random() < 0.8:
        body.setdefault("max_tokens", 5)
    for name, limit in (("max_tokens", 24), ("n", 4), ("best_of", 4)):
        if isinstance(body.get(name), int) and random.random() < 0.9:
            body[name] = body[name] % limit + 1
    for name in ("prompt", "tokens", "stop_token_ids", "allowed_token_ids"):
        value = body.get(name)
        if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
            body[name] = [item % VOCAB for item in value][:40]


@pytest.mark.parametrize("num_cases", [60, pytest.param(2000, marks=pytest.mark.conformance)])
@pytest.mark.parametrize("label", OPERATIONS)
def test_no_request_makes_an_error_of_ours(url, label, num_cases):
    statuses: Counter[int] = Counter()
    session = requests.Session()
    valid, invalid = (
        OPERATIONS[label].as_strategy(mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    )

    @settings(
        max_examples=num_cases // NUM_POSTS,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=st.one_of(valid, invalid), random=st.randoms(use_true_random=False))
    def check(case: Case, random: Random) -> None:
        if isinstance(case.body, dict):
            tame(case.body, random)
        response = case.call(base_url=url, session=session, timeout=60)
        assert response.status_code < 500, f"{response.status_code}: {response.text[:500]}"
        assert '"server_error"' not in response.text, response.text[-500:]  # in a stream, whose status had been sent
        statuses[response.status_code] += 1

    check()
    print(f"{label}: {dict(statuses)}")
    if label.startswith("POST"):
        assert statuses.total() >= num_cases // NUM_POSTS
        if num_cases >= 1000:  # of a few, chance may make all invalid
            assert 4 * statuses[200] >= statuses.total()
    assert httpx.get(f"{url}/health", timeout=60).status_code == 200


def test_the_cases_of_all_operations_that_take_a_body_add_up():
    assert sum(label.startswith("POST") for label in OPERATIONS) == NUM_POSTS
