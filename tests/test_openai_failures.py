"""Requests that fail and clients that leave."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest

from penstock.cluster.api.chat_tokenizer import ChatTokenizer
from penstock.cluster.engine.backend import QueueFullError, RequestTimeoutError

from .openai_app import CHAT, MODEL, post_completion, served, sse
from .scripted_backend import ScriptedBackend


@pytest.mark.parametrize("failure", [RuntimeError("boom"), "out of blocks"])
async def test_failure_before_the_first_token_is_a_status(
    http: httpx.AsyncClient, backend: ScriptedBackend, failure: Exception | str
) -> None:
    backend.fail_at, backend.failure = 0, failure
    for stream in (False, True):
        response = await post_completion(http, stream=stream)
        assert response.status_code == 500
        assert response.json()["error"]["message"] in str(failure)
        assert response.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize(
    ("failure", "status", "kind", "code"),
    [
        (QueueFullError("64 requests are waiting already", 2.3), 429, "rate_limit_error", "queue_full"),
        (RequestTimeoutError("the request took longer than 3 s"), 408, "timeout_error", "request_timeout"),
    ],
)
async def test_overload_is_told_in_openais_words(
    http: httpx.AsyncClient, backend: ScriptedBackend, failure: Exception, status: int, kind: str, code: str
) -> None:
    backend.fail_at, backend.failure = 0, failure
    for stream in (False, True):
        response = await post_completion(http, stream=stream)
        assert response.status_code == status
        error = {"message": str(failure), "type": kind, "param": None, "code": code}
        assert response.json() == {"error": error}
        assert response.headers.get("retry-after") == ("3" if status == 429 else None)
    backend.fail_at = 2
    assert sse(await post_completion(http, max_tokens=50, stream=True))[-1] == {"error": error}


async def test_failure_in_the_middle_of_a_stream_is_an_event(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    backend.fail_at = 2
    *before, last = sse(await post_completion(http, max_tokens=50, stream=True, temperature=0))
    assert before
    assert all("choices" in event for event in before)
    assert last["error"]["code"] == "engine_dead"
    assert last["error"]["message"] == "rank 1 is gone"


async def test_failure_in_the_middle_of_an_unstreamed_answer_is_a_status(
    http: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    backend.fail_at = 2
    response = await post_completion(http, max_tokens=50)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_dead"


async def test_openai_client_raises_the_error_of_a_stream(backend: ScriptedBackend, tokenizer: ChatTokenizer) -> None:
    backend.fail_at = 2
    async with served(backend, tokenizer) as client:
        stream = await client.completions.create(model=MODEL, prompt="a", max_tokens=50, stream=True)
        with pytest.raises(openai.APIError, match="rank 1 is gone"):
            async for _ in stream:
                pass


async def test_client_leaving_a_stream_aborts_the_request(backend: ScriptedBackend, tokenizer: ChatTokenizer) -> None:
    backend.gate = asyncio.Semaphore(2)
    async with served(backend, tokenizer) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=CHAT, stream=True)  # type: ignore[call-overload]
        await anext(aiter(stream))
        request_id = await backend.started.get()
        await stream.close()
        # no token comes any more: only the disconnect can end the wait for the next one
        assert await asyncio.wait_for(backend.aborted.get(), 10) == request_id


@pytest.mark.parametrize("steps", [0, 2])
async def test_client_leaving_before_the_answer_aborts_the_request(
    backend: ScriptedBackend, tokenizer: ChatTokenizer, steps: int
) -> None:
    backend.gate = asyncio.Semaphore(steps)
    async with served(backend, tokenizer) as client:
        asking = asyncio.create_task(client.completions.create(model=MODEL, prompt="a", max_tokens=50))
        request_id = await backend.started.get()
        asking.cancel()
        assert await asyncio.wait_for(backend.aborted.get(), 10) == request_id


async def test_requests_abort_one_by_one(backend: ScriptedBackend, tokenizer: ChatTokenizer) -> None:
    backend.gate = asyncio.Semaphore(0)
    async with served(backend, tokenizer) as client:
        asking = [
            asyncio.create_task(client.completions.create(model=MODEL, prompt="a", max_tokens=5, temperature=0))
            for _ in range(3)
        ]
        for _ in asking:
            await backend.started.get()
        asking[1].cancel()
        await asyncio.wait_for(backend.aborted.get(), 10)
        for _ in range(50):
            backend.gate.release()
        first, last = await asking[0], await asking[2]
        assert first.choices[0].text == last.choices[0].text
        assert backend.aborted.empty()
