"""The application in a test's own process, how it is asked, and how its answers are read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai

from penstock.cluster.api.chat_tokenizer import ChatTokenizer
from penstock.cluster.api.openai_api import create_app
from penstock.cluster.api.serving_state import ServingState
from penstock.cluster.engine.backend import Backend

from .scripted_backend import LoopbackServer

NAMES = ("scripted", "other-name")
MODEL = NAMES[0]
CHAT = [{"role": "user", "content": "turn the wheel"}]
TEXT = "naïve café ☕ turns the wheel 水車"


def client_of(app: Any, **headers: Any) -> httpx.AsyncClient:
    # the transport would raise in the test what a server answers with 500
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)


@asynccontextmanager
async def served(backend: Backend, tokenizer: ChatTokenizer) -> AsyncIterator[openai.AsyncOpenAI]:
    """Serve on loopback and yield openai's client of it."""
    started = asyncio.Event()
    server = LoopbackServer(create_app(await ServingState.create(backend, tokenizer, MODEL)), started.set)
    running = asyncio.create_task(server.run_here())
    await started.wait()
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
    server.should_exit = True
    await running


async def post_completion(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post("/v1/completions", json={"model": MODEL, "prompt": "the water", **fields})


async def post_chat(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post("/v1/chat/completions", json={"model": MODEL, "messages": CHAT, **fields})


async def completion(http: httpx.AsyncClient, **fields: Any) -> Any:
    """Return the body of an answer that must be a good one, or the events of a stream."""
    return _read(await post_completion(http, **{"max_tokens": 12, **fields}))


async def chat(http: httpx.AsyncClient, **fields: Any) -> Any:
    """Return the body of an answer that must be a good one, or the events of a stream."""
    return _read(await post_chat(http, **{"max_tokens": 12, **fields}))


def _read(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    if response.headers["content-type"] == "application/json":
        return response.json()
    *events, last = sse(response)
    assert last == "[DONE]"
    return events


def sse(response: httpx.Response) -> list[Any]:
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    return [event if event == "[DONE]" else json.loads(event) for event in events]


def gathered(events: list[Any]) -> list[dict[str, Any]]:
    """Return the choices that a stream of completion chunks adds up to."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for part in event["choices"]:
            whole = choices.setdefault(part["index"], {"text": "", "logprobs": None, "finish_reason": None})
            whole["index"] = part["index"]
            whole["text"] += part.get("text") or part.get("delta", {}).get("content") or ""
            assert whole["finish_reason"] is None, "nothing follows a choice's end"
            whole["finish_reason"] = part["finish_reason"]
            for name, values in (part["logprobs"] or {}).items():
                whole["logprobs"] = whole["logprobs"] or {}
                whole["logprobs"][name] = (whole["logprobs"].get(name) or []) + values if values is not None else None
    return [choices[index] for index in sorted(choices)]


def check_error(response: httpx.Response, status: int, param: str | None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    if param is not None:
        assert error["message"].startswith(f"{param}: ")
    assert len(error["message"]) < 1500


def piece(token: str) -> bytes:
    """Return what a token of an answer stands for."""
    if token.startswith("bytes:"):
        return bytes(int(part, 16) for part in token.removeprefix("bytes:\\x").split("\\x"))
    return token.encode()
