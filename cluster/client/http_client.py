"""A client over HTTP: the openai package underneath, our words on top."""

from __future__ import annotations

import asyncio
import os
import re
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import openai

from ..api.generation import Generation
from ..api.metric import PREFIX
from ..api.metrics import parse_samples
from ..api.text_stream import RequestFailedError
from ..config import API_KEY_VARIABLE
from ..engine.backend import EngineDeadError, QueueFullError, RequestTimeoutError
from .client import Prompt
from .http_answer import StreamedAnswer, read_choices
from .request_params import RequestParams

_OPENAI_FIELDS = {
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    "max_tokens",
    "n",
    "presence_penalty",
    "seed",
    "stop",
    "temperature",
    "top_p",
}
"""Sampling parameters that are OpenAI's too."""
_METRIC_PREFIX = re.compile(r"^([a-zA-Z_]\w*):", re.MULTILINE)
_BASE_URL = re.compile(r"https?://[^/]")


class HttpClient:
    """A `Client` of an OpenAI-compatible Penstock server at ``base_url``, with or without the final ``/v1``.

    ``model`` defaults to the first that the server lists, ``api_key`` to that of PENSTOCK_API_KEY. ``timeout_s`` is the
    longest wait for the server's next bytes. What the openai package calls transient
    (no connection, no answer in time, 408, 409, 429, 5xx) is sent again up to ``max_retries`` times.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout_s: float = 600.0,
        max_retries: int = 2,
    ) -> None:
        if not _BASE_URL.match(base_url):
            raise ValueError(f"base_url: {base_url!r} does not begin with http://HOST or https://HOST")
        self._root = base_url.rstrip("/").removesuffix("/v1")
        self._options: dict[str, Any] = {
            "base_url": f"{self._root}/v1",
            # a key is sent even to servers that ask for none: the library insists on one
            "api_key": api_key or os.environ.get(API_KEY_VARIABLE) or "none",
            "timeout": timeout_s,
            "max_retries": max_retries,
        }
        self._model = model
        self._sync = openai.OpenAI(**self._options)
        # connections belong to the event loop that opened them
        self._async: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, openai.AsyncOpenAI]
        self._async = weakref.WeakKeyDictionary()

    def generate(self, prompt: Prompt, **sampling: Any) -> Generation:
        """Generate one output."""
        call = _one_call(prompt, sampling)
        with _plain_errors():
            return call.read(call.send(self._sync, self._model or self._first(self.models())))[0]

    def generate_many(self, prompts: Sequence[Prompt], **sampling: Any) -> list[Generation]:
        """Generate ``n`` outputs of each prompt; the first prompt's come first. Chats are sent one after another."""
        generations: list[Generation] = []
        for call in _calls(prompts, sampling):
            with _plain_errors():
                generations += call.read(call.send(self._sync, self._model or self._first(self.models())))
        return generations

    def stream(self, prompt: Prompt, **sampling: Any) -> HttpTextStream:
        """Generate one output piece by piece; a refusal is raised here, not by the first read."""
        call = _one_call(prompt, sampling, stream=True)
        with _plain_errors():
            chunks = call.send(self._sync, self._model or self._first(self.models()))
        return HttpTextStream(chunks, call.num_top)

    def stats(self) -> dict[str, float]:
        """Return the server's metrics by name, labels included."""
        return parse_samples(self.metrics_text())

    def metrics_text(self) -> str:
        """Return the server's metrics in Prometheus' text format."""
        with _plain_errors():
            return _ours(self._sync.get(f"{self._root}/metrics", cast_to=str), self._root)

    def events(self) -> list[dict[str, Any]]:
        """Return the server's faults and recoveries, oldest first: the fields of `Event`, and ``gang``."""
        with _plain_errors():
            return _listed(self._sync.get(f"{self._root}/events", cast_to=object), self._root)

    def models(self) -> list[str]:
        """Return the names of the models served."""
        return [card["id"] for card in self.model_cards()]

    def model_cards(self) -> list[dict[str, Any]]:
        """Return what /v1/models says of each model served: id, max_model_len and more."""
        with _plain_errors():
            return _listed(self._sync.get(f"{self._root}/v1/models", cast_to=object), self._root)

    def close(self) -> None:
        """Let go of connections."""
        self._sync.close()

    async def agenerate(self, prompt: Prompt, **sampling: Any) -> Generation:
        """Generate one output."""
        call = _one_call(prompt, sampling)
        with _plain_errors():
            return call.read(await call.send(self._client(), self._model or self._first(await self.amodels())))[0]

    async def agenerate_many(self, prompts: Sequence[Prompt], **sampling: Any) -> list[Generation]:
        """Generate ``n`` outputs of each prompt; the first prompt's come first."""
        calls = _calls(prompts, sampling)
        with _plain_errors():
            model = self._model or self._first(await self.amodels())
            answers = await _all(call.send(self._client(), model) for call in calls)
        return [generation for call, answer in zip(calls, answers, strict=True) for generation in call.read(answer)]

    def astream(self, prompt: Prompt, **sampling: Any) -> AsyncHttpTextStream:
        """Generate one output piece by piece; the request is sent when the first piece is read."""
        call = _one_call(prompt, sampling, stream=True)

        async def send() -> openai.AsyncStream[Any]:
            return await call.send(self._client(), self._model or self._first(await self.amodels()))

        return AsyncHttpTextStream(send, call.num_top)

    async def astats(self) -> dict[str, float]:
        """Return the server's metrics by name, labels included."""
        with _plain_errors():
            return parse_samples(_ours(await self._client().get(f"{self._root}/metrics", cast_to=str), self._root))

    async def amodels(self) -> list[str]:
        """Return the names of the models served."""
        with _plain_errors():
            answer = await self._client().get(f"{self._root}/v1/models", cast_to=object)
            return [card["id"] for card in _listed(answer, self._root)]

    async def aclose(self) -> None:
        """Let go of this event loop's connections and of those that need none."""
        client = self._async.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.close()
        self._sync.close()

    def _client(self) -> openai.AsyncOpenAI:
        loop = asyncio.get_running_loop()
        if loop not in self._async:
            self._async[loop] = openai.AsyncOpenAI(**self._options)
        return self._async[loop]

    def _first(self, models: list[str]) -> str:
        if not models:
            raise ValueError("model: the server lists none")
        self._model = models[0]
        return self._model


class HttpTextStream:
    """A `TextStream` over HTTP."""

    def __init__(self, chunks: openai.Stream[Any], num_top: int) -> None:
        self._chunks = chunks
        self._iterator = iter(chunks)
        self._answer = StreamedAnswer(num_top)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        with _plain_errors():
            for chunk in self._iterator:
                text = self._answer.take(chunk)
                if text:
                    return text
        self._answer.check_complete()
        raise StopIteration

    def __enter__(self) -> HttpTextStream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def generation(self) -> Generation:
        """The whole; raises ``RuntimeError`` until the last piece of text has been read."""
        return self._answer.generation()

    def close(self) -> None:
        """Stop reading; the server aborts the request if it still runs."""
        self._chunks.close()


class AsyncHttpTextStream:
    """An `AsyncTextStream` over HTTP."""

    def __init__(self, send: Callable[[], Awaitable[openai.AsyncStream[Any]]], num_top: int) -> None:
        self._send = send
        self._chunks: openai.AsyncStream[Any] | None = None
        self._answer = StreamedAnswer(num_top)

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        with _plain_errors():
            if self._chunks is None:
                self._chunks = await self._send()
                self._iterator = aiter(self._chunks)
            async for chunk in self._iterator:
                text = self._answer.take(chunk)
                if text:
                    return text
        self._answer.check_complete()
        raise StopAsyncIteration

    async def __aenter__(self) -> AsyncHttpTextStream:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    @property
    def generation(self) -> Generation:
        """The whole; raises ``RuntimeError`` until the last piece of text has been read."""
        return self._answer.generation()

    async def aclose(self) -> None:
        """Stop reading; the server aborts the request if it still runs."""
        if self._chunks is not None:
            await self._chunks.close()


class _Call:
    """One request to one of the two endpoints: one prompt of any kind, or several that are no chats."""

    def __init__(self, prompts: Sequence[Prompt], sampling: dict[str, Any], *, stream: bool = False) -> None:
        # a mistake is found here as the server would find it
        params = RequestParams.from_kwargs(**sampling).sampling
        if params.choice:
            raise ValueError("choice: not a field of the HTTP API; ask for n outputs")
        self._is_chat = len(prompts) == 1 and _is_chat(prompts[0])
        self.num_top = params.logprobs or 0
        given = {name: list(value) if isinstance(value, tuple) else value for name, value in sampling.items()}
        given.pop("choice", None)
        if isinstance(given.get("prediction"), str):
            given["prediction"] = {"type": "content", "content": given["prediction"]}
        self._arguments: dict[str, Any] = {name: given.pop(name) for name in list(given) if name in _OPENAI_FIELDS}
        # or nobody could tell how many tokens each of several outputs has
        self._arguments["extra_body"] = {**given, "return_token_ids": True}
        if self._is_chat and params.logprobs is not None:
            self._arguments.update(logprobs=True, top_logprobs=params.logprobs)
        if stream:
            self._arguments.update(stream=True, stream_options={"include_usage": True})
        plain = [prompt if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        self._arguments["messages" if self._is_chat else "prompt"] = plain[0] if len(plain) == 1 else plain

    def send(self, client: openai.OpenAI | openai.AsyncOpenAI, model: str) -> Any:
        """Send it; with an asynchronous client, return what to await."""
        endpoint: Any = client.chat.completions if self._is_chat else client.completions
        return endpoint.create(model=model, **self._arguments)

    def read(self, answer: Any) -> list[Generation]:
        """Return the outputs of an answer that was not streamed."""
        return read_choices(answer, self.num_top)


async def _all(requests: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Return the answers to ``requests``, sent side by side; if one fails, the others are aborted."""
    tasks = [asyncio.create_task(request) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _one_call(prompt: Prompt, sampling: dict[str, Any], *, stream: bool = False) -> _Call:
    if RequestParams.from_kwargs(**sampling).sampling.n > 1:
        raise ValueError("n: one output is generated; generate_many takes more")
    return _Call([prompt], sampling, stream=stream)


def _calls(prompts: Sequence[Prompt], sampling: dict[str, Any]) -> list[_Call]:
    """Return as few requests as there can be: a chat needs one of its own."""
    are_chats = [_is_chat(prompt) for prompt in prompts]
    if any(are_chats):
        return [_Call([prompt], sampling) for prompt in prompts]
    return [_Call(prompts, sampling)] if prompts else []


def _is_chat(prompt: Prompt) -> bool:
    """Tell a chat from text and token ids; raise ``ValueError`` for what is none of them."""
    if isinstance(prompt, str):
        return False
    items = list(prompt) if isinstance(prompt, Sequence) else []
    if items and all(isinstance(item, Mapping) for item in items):
        return True
    if items and all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        return False
    raise ValueError("prompt: expected text, a non-empty list of token ids or a non-empty list of messages")


def _listed(answer: Any, root: str) -> list[dict[str, Any]]:
    """Return what an answer lists; raise ``ConnectionError`` if it is not one of ours."""
    items = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ConnectionError(f"what answers at {root} is no Penstock server")
    return items


def _ours(metrics: str, root: str) -> str:
    """Return a /metrics text; raise ``ConnectionError`` if it is another program's."""
    if f"{PREFIX}engine_up" in metrics:  # a Penstock server's has it whatever becomes of its engines
        return metrics
    others = sorted({name + ":" for name in _METRIC_PREFIX.findall(metrics)})
    found = f"its metrics are {', '.join(others)}..." if others else "it has none of our metrics"
    raise ConnectionError(f"what answers at {root} is no Penstock server: {found}")


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn the library's errors into the `Client`'s."""
    try:
        yield
    except openai.APITimeoutError as error:
        raise TimeoutError(str(error)) from error
    except openai.APIConnectionError as error:
        raise ConnectionError(f"no answer from {error.request.url}: {error.__cause__ or error}") from error
    except openai.APIError as error:
        status = error.status_code if isinstance(error, openai.APIStatusError) else 500
        message = error.body.get("message", error.message) if isinstance(error.body, dict) else error.message
        if status == 503 or error.code == "engine_dead":
            raise EngineDeadError(message) from error
        if status == 408 or error.code == "request_timeout":
            raise RequestTimeoutError(message) from error
        if isinstance(error, openai.RateLimitError):
            raise QueueFullError(message, float(error.response.headers.get("Retry-After", 1))) from error
        if status in (401, 403):
            raise PermissionError(message) from error
        if not (isinstance(error.body, dict) and "message" in error.body):
            raise ConnectionError(f"{error.request.url} answers {status}, and not as a Penstock server does") from error
        if 400 <= status < 500:
            raise ValueError(message) from error
        raise RequestFailedError(message) from error
