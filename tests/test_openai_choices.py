"""Several prompts and several choices in one request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from penstock.cluster.api.chat_tokenizer import ChatTokenizer
from penstock.cluster.api.openai_api import create_app
from penstock.cluster.api.serving_state import ServingState
from penstock.workers.sampling_params import SamplingParams

from .openai_app import NAMES, chat, client_of, completion, gathered
from .scripted_backend import ScriptedBackend


async def test_choices_are_prompt_major_and_each_is_always_the_same(
    http: httpx.AsyncClient, backend: ScriptedBackend, tokenizer: ChatTokenizer
) -> None:
    prompts = ["the water", "the stone"]
    body = await completion(http, prompt=prompts, n=3, seed=7)
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    texts = [choice["text"] for choice in body["choices"]]
    assert len(set(texts)) == 6
    assert [sampling.choice for sampling in backend.requests] == [0, 1, 2] * 2
    assert all(sampling.n == 1 for sampling in backend.requests)
    for i, prompt in enumerate(prompts):
        alone = await completion(http, prompt=prompt, n=2, seed=7)
        assert [choice["text"] for choice in alone["choices"]] == texts[3 * i : 3 * i + 2]
    usage = body["usage"]
    assert usage["prompt_tokens"] == sum(len(tokenizer.encode(prompt)) for prompt in prompts)
    assert usage["completion_tokens"] == 6 * 12
    assert body["penstock"]["seed"] == 7
    assert [choice["penstock"]["seed"] for choice in body["choices"]] == [7] * 6


@pytest.mark.parametrize("as_ids", [False, True])
async def test_every_form_of_prompt(http: httpx.AsyncClient, tokenizer: ChatTokenizer, as_ids: bool) -> None:
    prompts: list[Any] = ["the water", "café ☕", "the wheel"]
    one = [(await completion(http, prompt=prompt, temperature=0))["choices"][0]["text"] for prompt in prompts]
    if as_ids:
        prompts = [tokenizer.encode(prompt) for prompt in prompts]
    together = await completion(http, prompt=prompts, temperature=0)
    assert [choice["text"] for choice in together["choices"]] == one
    single = await completion(http, prompt=prompts[:1], temperature=0)
    assert [choice["text"] for choice in single["choices"]] == one[:1]
    assert "penstock" not in single["choices"][0]


async def test_prompts_that_are_alike_get_seeds_of_their_own(http: httpx.AsyncClient) -> None:
    body = await completion(http, prompt=["the water"] * 3)
    seeds = [choice["penstock"]["seed"] for choice in body["choices"]]
    assert len(set(seeds)) == 3
    assert body["penstock"]["seed"] is None
    again = await completion(http, seed=seeds[1])
    assert again["choices"][0]["text"] == body["choices"][1]["text"]


@pytest.mark.parametrize("endpoint", [completion, chat])
async def test_a_stream_of_choices_adds_up(http: httpx.AsyncClient, endpoint: Any) -> None:
    whole = await endpoint(http, n=3, seed=3)
    events = await endpoint(http, n=3, seed=3, stream=True, stream_options={"include_usage": True})
    assert events.pop()["usage"] == whole["usage"]
    texts = [choice.get("text") or choice["message"]["content"] for choice in whole["choices"]]
    assert [choice["text"] for choice in gathered(events)] == texts
    assert [choice["finish_reason"] for choice in gathered(events)] == ["length"] * 3
    if endpoint is chat:
        assert [e["choices"][0]["delta"] for e in events[:3]] == [{"role": "assistant", "content": ""}] * 3


async def test_one_choice_that_stops_leaves_the_others_alone(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    full = [choice["text"] for choice in (await completion(http, n=4, seed=5, max_tokens=40))["choices"]]
    stop = next(full[2][i : i + 3] for i in range(5, 30) if sum(full[2][i : i + 3] in text for text in full) == 1)
    cut = (await completion(http, n=4, seed=5, max_tokens=40, stop=stop))["choices"]
    assert [choice["text"] for choice in cut] == [*full[:2], full[2][: full[2].index(stop)], full[3]]
    assert [choice["finish_reason"] for choice in cut] == ["length", "length", "stop", "length"]
    assert backend.aborted.qsize() == 1


async def test_a_client_that_leaves_ends_all_choices(backend: ScriptedBackend, tokenizer: ChatTokenizer) -> None:
    backend.gate = asyncio.Semaphore(4)
    app = create_app(await ServingState.create(backend, tokenizer, NAMES))
    async with client_of(app) as http:
        asking = asyncio.create_task(completion(http, n=3))
        started = {await backend.started.get() for _ in range(3)}
        asking.cancel()
        assert {await asyncio.wait_for(backend.aborted.get(), 10) for _ in range(3)} == started


@pytest.mark.parametrize("stream", [False, True])
async def test_one_failing_choice_fails_the_request_and_ends_the_others(
    http: httpx.AsyncClient, backend: ScriptedBackend, stream: bool
) -> None:
    generate = backend.generate

    async def fails_once(request_id: str, prompt: Any, sampling: SamplingParams, *more: Any) -> AsyncIterator[Any]:
        async for output in generate(request_id, prompt, sampling, *more):
            if sampling.choice == 1 and output.offset > 0:
                raise RuntimeError("boom")
            yield output

    backend.generate = fails_once  # type: ignore[method-assign]
    body = {"model": NAMES[0], "prompt": "a", "n": 3, "max_tokens": 100, "stream": stream}
    response = await http.post("/v1/completions", json=body)
    if stream:
        *_, last = [line for line in response.text.split("\n\n") if line]
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "boom"
    else:
        assert (response.status_code, response.json()["error"]["message"]) == (500, "boom")
