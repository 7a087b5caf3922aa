"""The OpenAI API over a `Backend`: completions and chat completions, streamed or not, health and metrics."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from ...workers.sampling_params import SamplingParams
from ..engine.backend import EngineDeadError
from ..speculation.options import SpeculationOptions
from . import model_api, tokenization_api
from .admission import Admission, AdmissionMiddleware
from .api_error import ApiError
from .chat_format import ChatFormat
from .choices import merge
from .completion_format import CompletionFormat
from .event_stream import EventStream, while_connected
from .generation import Generation
from .metrics import CONTENT_TYPE, render
from .middleware import ApiKeyMiddleware, HeadMiddleware, RequestIdMiddleware
from .prompts import EncodedPrompt, encode_chat, encode_completion, encode_speculation
from .protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest
from .request_body import body_schema, read_body
from .response_format import AnswerOptions, ResponseFormat
from .serving_state import ServingState, serving
from .text_stream import TextDelta, stream_text


def create_app(
    state: ServingState | None = None, *, api_key: str | None = None, admission: Admission | None = None
) -> FastAPI:
    """Return the application; with ``state`` it serves at once, else when ``app.state.serving`` is set.

    With ``api_key`` it answers those alone who bring it, with ``admission`` as long as that is open. It holds locks and
    so cannot be pickled: build it in the process that serves.
    """
    app = FastAPI(title="Penstock", docs_url=None, redoc_url=None)
    app.state.serving = state
    if api_key is not None:
        app.add_middleware(ApiKeyMiddleware, api_key=api_key)
    if admission is not None:
        app.add_middleware(AdmissionMiddleware, admission=admission)
    app.add_middleware(RequestIdMiddleware)
    app.add_middleware(HeadMiddleware)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_bug)
    app.get("/health")(health)
    app.get("/metrics")(metrics)
    app.get("/events")(events)
    app.include_router(model_api.router)
    app.include_router(tokenization_api.router)
    app.post("/v1/completions", openapi_extra=body_schema(CompletionRequest))(create_completion)
    app.post("/v1/chat/completions", openapi_extra=body_schema(ChatCompletionRequest))(create_chat_completion)
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


async def events(request: Request) -> Response:
    """Answer the faults and recoveries of all gangs that are remembered, oldest first."""
    state: ServingState | None = request.app.state.serving
    gangs = await state.backend.events() if state is not None else {}
    found = [{"gang": gang, **asdict(event)} for gang, known in gangs.items() for event in known]
    return JSONResponse({"object": "list", "data": sorted(found, key=lambda event: event["time_s"])})


async def create_completion(request: Request) -> Response:
    """Continue one prompt or several."""
    state = serving(request)
    body = await read_body(request, CompletionRequest)
    sampling = _admit(request, state, body)
    speculation = await encode_speculation(state, body)
    prompts = await encode_completion(state, body, sampling)
    answer = CompletionFormat(_options(f"cmpl-{uuid.uuid4().hex}", state, body, prompts, echo=bool(body.echo)))
    return await _respond(request, state, body, answer, speculation)


async def create_chat_completion(request: Request) -> Response:
    """Write the assistant's next turn."""
    state = serving(request)
    body = await read_body(request, ChatCompletionRequest)
    sampling = _admit(request, state, body)
    speculation = await encode_speculation(state, body)
    prompt = await encode_chat(state, body, sampling)
    answer = ChatFormat(_options(f"chatcmpl-{uuid.uuid4().hex}", state, body, [prompt]))
    return await _respond(request, state, body, answer, speculation)


async def _check_health(request: Request) -> None:
    try:
        await serving(request).backend.check_health()
    except EngineDeadError as error:
        raise ApiError.from_failure(error) from error


def _admit(request: Request, state: ServingState, body: GenerationRequest) -> SamplingParams:
    """Check all that does not depend on the prompt."""
    state.check_model(body.model)
    try:
        body.check_supported()
        sampling = body.sampling_params()
        sampling.check_vocabulary(state.vocab_size, state.eos_token_ids)
    except ValueError as error:
        raise ApiError.from_value_error(error, rename={"max_tokens": body.max_tokens_field}) from error
    unknown = body.num_unknown_fields
    if unknown:
        state.backend.count_unknown_fields(request.url.path, unknown)
    return sampling


def _options(
    request_id: str, state: ServingState, body: GenerationRequest, prompts: Sequence[EncodedPrompt], **more: Any
) -> AnswerOptions:
    return AnswerOptions(
        request_id=request_id,
        model=body.model,
        system_fingerprint=state.system_fingerprint,
        prompts=prompts,
        n=body.n or 1,
        include_usage=body.include_usage,
        num_logprobs=body.num_logprobs,
        num_prompt_logprobs=body.prompt_logprobs,
        return_token_ids=bool(body.return_token_ids),
        **more,
    )


async def _respond(
    request: Request,
    state: ServingState,
    body: GenerationRequest,
    answer: ResponseFormat,
    speculation: SpeculationOptions,
) -> Response:
    options = answer.options
    wanted = [(prompt, one) for prompt in options.prompts for one in prompt.sampling.choices()]
    texts = [
        stream_text(
            state.backend,
            state.tokenizer,
            f"{options.request_id}-{index}",
            prompt.token_ids,
            one,
            speculation,
            _client(request, body),
        )
        for index, (prompt, one) in enumerate(wanted)
    ]
    deltas = merge(texts)
    try:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(deltas.aclose)
            # the status is decided by the first token: until then a failure is not yet the middle of a stream
            first = await while_connected(anext(deltas), request.receive)
            if body.stream:
                return EventStream(_events(first, deltas, answer), stack.pop_all())
            generations = await while_connected(_collect(first, deltas), request.receive)
    except ClientDisconnect:
        raise
    except ValueError as error:
        raise ApiError.from_value_error(error) from error
    except Exception as error:
        raise ApiError.from_failure(error) from error
    return Response(answer.whole(generations), media_type="application/json")


def _client(request: Request, body: GenerationRequest) -> str:
    """Return whose request it is, as far as can be told: a user's name may be of any length, and is remembered."""
    if body.user:
        return hashlib.sha256(body.user.encode()).hexdigest()
    return request.client.host if request.client else ""


async def _collect(
    first: tuple[int, TextDelta], deltas: AsyncGenerator[tuple[int, TextDelta], None]
) -> list[Generation]:
    """Return every choice, in order, once all have ended."""
    generations: dict[int, Generation] = {}
    async for index, delta in _chain(first, deltas):
        if delta.generation is not None:
            generations[index] = delta.generation
    return [generations[index] for index in sorted(generations)]


async def _events(
    first: tuple[int, TextDelta], deltas: AsyncGenerator[tuple[int, TextDelta], None], answer: ResponseFormat
) -> AsyncGenerator[str, None]:
    generations: dict[int, Generation] = {}
    try:
        for chunk in answer.opening():
            yield chunk
        async for index, delta in _chain(first, deltas):
            if (text := answer.delta(index, delta)) is not None:
                yield text
            if delta.generation is not None:
                generations[index] = delta.generation
                yield answer.final(index, delta.generation)
        if answer.options.include_usage:
            yield answer.usage([generations[index] for index in sorted(generations)])
        yield "[DONE]"
    except Exception as error:
        yield json.dumps(ApiError.from_failure(error).body)


async def _chain(
    first: tuple[int, TextDelta], rest: AsyncGenerator[tuple[int, TextDelta], None]
) -> AsyncGenerator[tuple[int, TextDelta], None]:
    yield first
    async for item in rest:
        yield item


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    if error.status_code == 404 and (meant := _meant_path(request)) is not None:
        message += f"; it is at {meant}"
    refusal = ApiError(error.status_code, message, headers=dict(error.headers or {}))
    return JSONResponse(refusal.body, status_code=refusal.status, headers=refusal.headers)


def _meant_path(request: Request) -> str | None:
    """Return the path that a client means whose base URL has no /v1, or one too many."""
    meant = "/v1" + request.url.path.removeprefix("/v1").removeprefix("/v1")
    scope = {**request.scope, "path": meant}
    is_known = any(route.matches(scope)[0] is not Match.NONE for route in request.app.router.routes)
    return meant if is_known else None


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_bug(request: Request, error: Exception) -> Response:
    return JSONResponse(ApiError.from_failure(error).body, status_code=500)
