"""The protocol over the demo model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from penstock.cluster.api.chat_tokenizer import ChatTokenizer
from penstock.cluster.api.openai_api import create_app
from penstock.cluster.api.serving_state import ServingState
from penstock.cluster.client.llm import make_ranks
from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.async_engine import AsyncEngine
from penstock.cluster.engine.engine import Engine

from .openai_app import MODEL, client_of, completion, gathered, served

DEMO = Path(__file__).parents[1] / "demo" / "model"
PROMPTS = [
    "438 + 275",
    "17 + 5",
    "def add(a, b):",
    "import os\n\ndef walk(top):",
    "What is a generator?",
    "class Stack:",
    "906 + 118",
    "Return the sum of a list.",
]


@pytest.fixture(scope="module")
async def engine() -> AsyncIterator[tuple[AsyncEngine, ChatTokenizer]]:
    config = EngineConfig(model=str(DEMO), dtype="float32", device="cpu", num_threads=1, max_num_batched_tokens=64)
    running = AsyncEngine(Engine(config, make_ranks(config)))
    yield running, ChatTokenizer(config.tokenizer_source)
    await running.close()


async def stream_chat(client: openai.AsyncOpenAI, prompt: str, **fields: Any) -> tuple[str, str, Any]:
    text, finish_reason, usage = "", "", None
    stream: Any = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": prompt}],
        max_tokens=24,
        stream=True,
        stream_options={"include_usage": True},
        **fields,
    )
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish_reason = choice.finish_reason or finish_reason
    return text, finish_reason, usage


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"temperature": 1.0, "top_p": 0.95}], ids=["greedy", "seeded"]
)
async def test_eight_streams_at_once_say_what_each_says_alone(
    engine: tuple[AsyncEngine, ChatTokenizer], sampling: dict[str, float]
) -> None:
    backend, tokenizer = engine
    async with served(backend, tokenizer) as client:
        alone = [await stream_chat(client, prompt, seed=i, **sampling) for i, prompt in enumerate(PROMPTS)]
        together = await asyncio.gather(
            *(stream_chat(client, prompt, seed=i, **sampling) for i, prompt in enumerate(PROMPTS))
        )
        assert together == alone
        assert len({text for text, _, _ in alone}) == len(PROMPTS)
        if sampling["temperature"]:
            reseeded = await stream_chat(client, PROMPTS[2], seed=100, **sampling)
            assert reseeded[0] != alone[2][0]


async def test_leaving_a_stream_frees_the_engine(engine: tuple[AsyncEngine, ChatTokenizer]) -> None:
    backend, tokenizer = engine
    async with served(backend, tokenizer) as client:
        before = (await backend.stats())["0"]
        stream: Any = await client.completions.create(
            model=MODEL, prompt="def f(", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(aiter(stream))
        await stream.close()
        while (after := (await backend.stats())["0"]).num_requests_running:
            await asyncio.sleep(0.001)
        assert after.num_kv_blocks_used == before.num_kv_blocks_used == 0
        assert after.num_generation_tokens - before.num_generation_tokens < 1500
        assert after.num_requests_finished["abort"] - before.num_requests_finished.get("abort", 0) == 1


async def test_demo_model_stops_at_a_stop_string(engine: tuple[AsyncEngine, ChatTokenizer]) -> None:
    backend, tokenizer = engine
    async with served(backend, tokenizer) as client:
        asked: dict[str, Any] = {
            "model": MODEL,
            "messages": [{"role": "user", "content": "438 + 275"}],
            "temperature": 0,
        }
        full = (await client.chat.completions.create(**asked)).choices[0].message.content
        stop = full[4:7]
        cut = await client.chat.completions.create(**asked, stop=[stop])
        assert cut.choices[0].message.content == full[: full.index(stop)]
        assert cut.choices[0].finish_reason == "stop"


@pytest.fixture
async def http(engine: tuple[AsyncEngine, ChatTokenizer]) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(create_app(await ServingState.create(*engine, MODEL))) as client:
        yield client


async def test_a_harness_gets_the_models_own_loglikelihoods(http: httpx.AsyncClient) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    tokenizer = ChatTokenizer(str(DEMO))
    texts = ["import os\nimport sys\n", "def add(a, b):\n    return a + b\n" * 6, "x"]
    prompts = [tokenizer.encode(text) for text in texts]
    assert len(prompts[1]) > 64, "more than one chunk"
    body = await completion(http, prompt=prompts, echo=True, max_tokens=1, logprobs=1, temperature=0, seed=1234)
    for prompt, text, choice in zip(prompts, texts, body["choices"], strict=True):
        assert choice["text"].startswith(text)
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        logprobs = choice["logprobs"]
        for i, token in enumerate(prompt[1:]):
            assert logprobs["token_logprobs"][i + 1] == pytest.approx(float(expected[i, token]), abs=1e-4)
            assert max(logprobs["top_logprobs"][i + 1].values()) == pytest.approx(float(expected[i].max()), abs=1e-4)
        assert logprobs["token_logprobs"][-1] == pytest.approx(float(expected[-1].max()), abs=1e-4)
        assert math.isclose(sum(map(math.exp, expected[-1].tolist())), 1.0, abs_tol=1e-3)


async def test_choices_of_the_demo_model_do_not_depend_on_their_number(http: httpx.AsyncClient) -> None:
    asked = {"prompt": "def f(", "seed": 21, "max_tokens": 24, "frequency_penalty": 0.5}
    one, five = await completion(http, **asked), await completion(http, **asked, n=5)
    streamed = gathered(await completion(http, **asked, n=5, stream=True))
    texts = [choice["text"] for choice in five["choices"]]
    assert len(set(texts)) == 5
    assert one["choices"][0]["text"] == texts[0]
    assert [choice["text"] for choice in streamed] == texts
