"""The OpenAI API over a `Backend`: completions and chat completions, streamed or not, health and metrics."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import anyio.to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...workers.sampling_params import SamplingParams
from ..engine.backend import Backend, EngineDeadError
from .api_error import ApiError
from .chat_tokenizer import ChatTokenizer
from .event_stream import EventStream, while_connected
from .generation import Generation
from .metrics import CONTENT_TYPE, render
from .protocol import DEFAULT_MAX_TOKENS, ChatCompletionRequest, CompletionRequest, GenerationRequest
from .response_format import ChatFormat, CompletionFormat, ResponseFormat, model_card
from .text_stream import TextDelta, stream_text

RequestT = TypeVar("RequestT", bound=GenerationRequest)

MAX_BODY_BYTES = 32 << 20
"""Longer request bodies are refused unread."""
_INLINE_BYTES = 1 << 16
"""Bodies up to this long are parsed on the event loop."""
_INLINE_CHARS = 4096
"""Prompts up to this long are tokenized on the event loop: a thread costs more."""
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


@dataclass(frozen=True, slots=True)
class ServingState:
    """What the endpoints need. Set as ``app.state.serving`` once the engine runs; until then they answer 503."""

    backend: Backend
    tokenizer: ChatTokenizer
    model_name: str
    max_model_len: int
    vocab_size: int
    """Of the model: ids from here on are refused."""
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    async def create(cls, backend: Backend, tokenizer: ChatTokenizer, model_name: str) -> ServingState:
        """Ask the backend's ranks for the model's limits."""
        model = (await backend.ranks())[0].model
        return cls(backend, tokenizer, model_name, model.max_model_len, model.vocab_size)


def create_app(state: ServingState | None = None) -> FastAPI:
    """Return the application; with ``state`` it serves at once, else when ``app.state.serving`` is set.

    It holds locks and so cannot be pickled: build it in the process that serves.
    """
    app = FastAPI(title="Penstock", docs_url=None, redoc_url=None)
    app.state.serving = state
    app.add_middleware(RequestIdMiddleware)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_bug)
    app.get("/health")(health)
    app.get("/metrics")(metrics)
    app.get("/v1/models")(list_models)
    app.get("/v1/models/{model_id:path}")(retrieve_model)
    app.post("/v1/completions", openapi_extra=_body_schema(CompletionRequest))(create_completion)
    app.post("/v1/chat/completions", openapi_extra=_body_schema(ChatCompletionRequest))(create_chat_completion)
    return app


async def health(request: Request) -> Response:
    """Answer 200 if the engine can serve, else 503."""
    await _check_health(request)
    return JSONResponse({"status": "ok"})


async def metrics(request: Request) -> Response:
    """Answer Prometheus text."""
    state: ServingState | None = request.app.state.serving
    stats = await state.backend.stats() if state is not None else {}
    return Response(render(stats), headers={"Content-Type": CONTENT_TYPE})


async def list_models(request: Request) -> Response:
    """Answer the one model served."""
    state = _serving(request)
    return JSONResponse({"object": "list", "data": [model_card(state.model_name, state.created, state.max_model_len)]})


async def retrieve_model(request: Request, model_id: str) -> Response:
    """Answer the model's card, or 404."""
    state = _serving(request)
    _check_model(state, model_id)
    return JSONResponse(model_card(state.model_name, state.created, state.max_model_len))


async def create_completion(request: Request) -> Response:
    """Continue a prompt."""
    state = _serving(request)
    body = await _read(request, CompletionRequest)
    sampling = _admit(request, state, body)
    if isinstance(body.prompt, str):
        token_ids = await _tokenize(state.tokenizer.encode, body.prompt, len(body.prompt))
    else:
        token_ids = body.prompt
    sampling = _fit(state, "prompt", token_ids, body, sampling, default=DEFAULT_MAX_TOKENS)
    request_id = f"cmpl-{uuid.uuid4().hex}"
    answer = CompletionFormat(request_id, state.model_name, include_usage=body.include_usage)
    return await _respond(request, state, body, request_id, token_ids, sampling, answer)


async def create_chat_completion(request: Request) -> Response:
    """Write the assistant's next turn."""
    state = _serving(request)
    body = await _read(request, ChatCompletionRequest)
    sampling = _admit(request, state, body)
    token_ids = await _tokenize(state.tokenizer.encode_chat, body.messages, _num_chars(body.messages))
    sampling = _fit(state, "messages", token_ids, body, sampling, default=None)
    request_id = f"chatcmpl-{uuid.uuid4().hex}"
    answer = ChatFormat(request_id, state.model_name, include_usage=body.include_usage)
    return await _respond(request, state, body, request_id, token_ids, sampling, answer)


def _serving(request: Request) -> ServingState:
    state: ServingState | None = request.app.state.serving
    if state is None:
        raise ApiError(503, "the engine is still starting", code="engine_starting", headers={"Retry-After": "1"})
    return state


async def _check_health(request: Request) -> None:
    try:
        await _serving(request).backend.check_health()
    except EngineDeadError as error:
        raise ApiError.from_failure(error) from error


def _check_model(state: ServingState, model: str) -> None:
    if model != state.model_name:
        message = f"model: {model!r} does not exist; valid: {state.model_name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


async def _read(request: Request, model: type[RequestT]) -> RequestT:
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json":
        message = f"Content-Type: {media_type!r} is not supported; valid: 'application/json'"
        raise ApiError(415, message, param="Content-Type", code="unsupported_media_type")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"body: longer than {MAX_BODY_BYTES} bytes", param="body", code="body_too_large")
    try:
        if len(body) <= _INLINE_BYTES:
            return model.model_validate_json(bytes(body))
        return await anyio.to_thread.run_sync(model.model_validate_json, bytes(body))
    except ValidationError as error:
        raise ApiError.from_validation(error) from error


def _admit(request: Request, state: ServingState, body: GenerationRequest) -> SamplingParams:
    """Check all that does not depend on the prompt."""
    _check_model(state, body.model)
    try:
        body.check_supported()
        sampling = body.sampling_params()
    except ValueError as error:
        raise ApiError.from_value_error(error, rename={"max_tokens": body.max_tokens_field}) from error
    _check_vocabulary(state, "stop_token_ids", sampling.stop_token_ids)
    unknown = body.num_unknown_fields
    if unknown:
        state.backend.count_unknown_fields(request.url.path, unknown)
    return sampling


def _num_chars(content: Any) -> int:
    if isinstance(content, dict):
        content = list(content.values())
    return (
        sum(map(_num_chars, content)) if isinstance(content, list) else len(content) if isinstance(content, str) else 0
    )


async def _tokenize(encode: Any, text: Any, num_chars: int) -> list[int]:
    try:
        if num_chars <= _INLINE_CHARS:
            return encode(text)
        return await anyio.to_thread.run_sync(encode, text)
    except ValueError as error:
        raise ApiError.from_value_error(error) from error


def _fit(
    state: ServingState,
    param: str,
    token_ids: Sequence[int],
    body: GenerationRequest,
    sampling: SamplingParams,
    *,
    default: int | None,
) -> SamplingParams:
    """Return ``sampling`` with its ``max_tokens`` decided; 400 if the prompt or the two together do not fit."""
    if not token_ids:
        raise ApiError(400, f"{param}: expected at least one token", param=param, code="invalid_value")
    room = state.max_model_len - len(token_ids)
    if room < 1:
        message = f"{param}: {len(token_ids)} tokens leave no room for output; max_model_len is {state.max_model_len}"
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    _check_vocabulary(state, param, token_ids)
    if sampling.max_tokens is None:
        return replace(sampling, max_tokens=room if default is None else min(default, room))
    if sampling.max_tokens > room:
        limit = body.max_tokens_field
        message = (
            f"{limit}: {sampling.max_tokens} is not in [1, {room}]: "
            f"{param} has {len(token_ids)} tokens and max_model_len is {state.max_model_len}"
        )
        raise ApiError(400, message, param=limit, code="context_length_exceeded")
    return sampling


def _check_vocabulary(state: ServingState, param: str, token_ids: Sequence[int]) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < state.vocab_size:
            message = f"{param}: token id {token_id} is not in [0, {state.vocab_size - 1}]"
            raise ApiError(400, message, param=param, code="invalid_value")


async def _respond(
    request: Request,
    state: ServingState,
    body: GenerationRequest,
    request_id: str,
    token_ids: list[int],
    sampling: SamplingParams,
    answer: ResponseFormat,
) -> Response:
    deltas = stream_text(state.backend, state.tokenizer, request_id, token_ids, sampling)
    try:
        # the status is decided by the first token: until then a failure is not yet the middle of a stream
        first = await while_connected(anext(deltas), request.receive)
        if body.stream:
            return EventStream(_events(first, deltas, answer, include_usage=body.include_usage))
        generation = await while_connected(_collect(first, deltas), request.receive)
    except ClientDisconnect:
        raise
    except ValueError as error:
        raise ApiError.from_value_error(error) from error
    except Exception as error:
        raise ApiError.from_failure(error) from error
    return Response(answer.whole(generation), media_type="application/json")


async def _collect(first: TextDelta, deltas: AsyncGenerator[TextDelta, None]) -> Generation:
    async with aclosing(deltas):
        async for delta in _chain(first, deltas):
            if delta.generation is not None:
                return delta.generation
    raise AssertionError("the last delta carries the generation")


async def _events(
    first: TextDelta, deltas: AsyncGenerator[TextDelta, None], answer: ResponseFormat, *, include_usage: bool
) -> AsyncGenerator[str, None]:
    async with aclosing(deltas):
        try:
            for chunk in answer.opening():
                yield chunk
            async for delta in _chain(first, deltas):
                if delta.text:
                    yield answer.delta(delta.text)
                if delta.generation is not None:
                    yield answer.final(delta.generation)
                    if include_usage:
                        yield answer.usage(delta.generation)
            yield "[DONE]"
        except Exception as error:
            yield json.dumps(ApiError.from_failure(error).body)


async def _chain(first: TextDelta, rest: AsyncGenerator[TextDelta, None]) -> AsyncGenerator[TextDelta, None]:
    yield first
    async for delta in rest:
        yield delta


class RequestIdMiddleware:
    """Return the client's X-Request-Id, or one of ours, with every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self._app(scope, receive, send_with_id)


def _body_schema(model: type[GenerationRequest]) -> dict[str, Any]:
    # bodies are read by hand, so that every mistake in one gets the API's own error
    content = {"application/json": {"schema": model.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    refusal = ApiError(error.status_code, message, headers=dict(error.headers or {}))
    return JSONResponse(refusal.body, status_code=refusal.status, headers=refusal.headers)


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_bug(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError.from_failure(error).body, status_code=500)
