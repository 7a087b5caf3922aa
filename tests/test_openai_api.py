from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from penstock import demo
from penstock.cluster.api import prompts, request_body
from penstock.cluster.api.chat_tokenizer import ChatTokenizer
from penstock.cluster.api.openai_api import create_app
from penstock.cluster.api.serving_state import ServingState
from penstock.cluster.client.llm import make_ranks
from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.async_engine import AsyncEngine
from penstock.cluster.engine.backend import Backend, QueueFullError, RequestTimeoutError
from penstock.cluster.engine.engine import Engine

from .scripted_backend import MAX_MODEL_LEN, LoopbackServer, ScriptedBackend, save_tokenizer

MODEL = "scripted"
DEMO_MODEL = Path(demo.__file__).parent / "model"
CHAT = [{"role": "user", "content": "turn the wheel"}]
STATS = {"seed", "steps", "draft_tokens", "accepted_tokens", "acceptance", "tokens_per_s", "ttft_s", "queue_s"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def backend(tokenizer: ChatTokenizer) -> ScriptedBackend:
    return ScriptedBackend(tokenizer.vocab_size)


@pytest.fixture
async def http(backend: ScriptedBackend, tokenizer: ChatTokenizer) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(await ServingState.create(backend, tokenizer, MODEL))
    # the transport would raise in the test what a server answers with 500
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


@asynccontextmanager
async def served(backend: Backend, tokenizer: ChatTokenizer) -> AsyncIterator[openai.AsyncOpenAI]:
    started = asyncio.Event()
    server = LoopbackServer(create_app(await ServingState.create(backend, tokenizer, MODEL)), started.set)
    running = asyncio.create_task(server.run_here())
    await started.wait()
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
    server.should_exit = True
    await running


def sse(response: httpx.Response) -> list[Any]:
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    return [event if event == "[DONE]" else json.loads(event) for event in events]


async def completion(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post("/v1/completions", json={"model": MODEL, "prompt": "the water", **fields})


async def chat(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post("/v1/chat/completions", json={"model": MODEL, "messages": CHAT, **fields})


# --- answers -------------------------------------------------------------------------------------------------------


async def test_completion_is_the_decoded_script(
    http: httpx.AsyncClient, backend: ScriptedBackend, tokenizer: ChatTokenizer
) -> None:
    backend.script = tokenizer.encode("turns the wheel ☕ 水車")
    body = (await completion(http, max_tokens=100)).json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {"index": 0, "text": "turns the wheel ☕ 水車", "logprobs": None, "finish_reason": "length"}
    ]
    prompt, output = len(tokenizer.encode("the water")), len(backend.script)
    assert body["usage"] == {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}
    assert set(body["penstock"]) == STATS
    assert (body["penstock"]["acceptance"], body["penstock"]["queue_s"]) == (0.5, 0.25)


async def test_chat_is_the_decoded_script(
    http: httpx.AsyncClient, backend: ScriptedBackend, tokenizer: ChatTokenizer
) -> None:
    backend.script = [*tokenizer.encode("café"), 0]
    backend.stop_token_id = 0
    body = (await chat(http)).json()
    message = {"role": "assistant", "content": "café", "refusal": None}
    assert body["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"]["completion_tokens"] == len(backend.script)
    assert body["usage"]["prompt_tokens"] == len(tokenizer.encode_chat(CHAT))


async def test_an_ordinary_stop_token_is_not_text(
    http: httpx.AsyncClient, backend: ScriptedBackend, tokenizer: ChatTokenizer
) -> None:
    *text, stop = tokenizer.encode("the stone!")
    backend.script, backend.stop_token_id = [*text, stop], stop
    body = (await completion(http, stop_token_ids=[stop])).json()
    assert body["choices"][0]["text"] == tokenizer.decode(text)
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == len(text) + 1


@pytest.mark.parametrize("endpoint", [completion, chat])
@pytest.mark.parametrize("fields", [{}, {"temperature": 0}, {"stop": ["wheel"]}, {"seed": 5}])
async def test_stream_and_whole_say_the_same(
    http: httpx.AsyncClient, backend: ScriptedBackend, tokenizer: ChatTokenizer, endpoint: Any, fields: dict[str, Any]
) -> None:
    backend.script = tokenizer.encode("naïve café ☕ turns the wheel 水車")
    options = {"include_usage": True}
    whole = (await endpoint(http, max_tokens=60, **fields)).json()
    events = sse(await endpoint(http, max_tokens=60, stream=True, stream_options=options, **fields))

    assert events.pop() == "[DONE]"
    usage = events.pop()
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert set(usage["penstock"]) == STATS
    choices = [event["choices"][0] for event in events]
    if endpoint is chat:
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        expected = whole["choices"][0]["message"]["content"]
    else:
        text = "".join(choice["text"] for choice in choices)
        expected = whole["choices"][0]["text"]
    assert text == expected
    assert len(choices) > 3, "the text should have come in pieces"
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert set(events[-1]["penstock"]) == STATS
    assert all(event["usage"] is None for event in events)
    assert len({event["id"] for event in events}) == 1


async def test_stop_string_cuts_and_aborts(
    http: httpx.AsyncClient, backend: ScriptedBackend, tokenizer: ChatTokenizer
) -> None:
    backend.script = tokenizer.encode("the water turns the wheel and goes on and on and on and on")
    body = (await completion(http, max_tokens=100, stop=["wheel", "stone"])).json()
    assert body["choices"][0]["text"] == "the water turns the "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == len(tokenizer.encode("the water turns the wheel"))
    assert body["penstock"]["acceptance"] is None, "only the engine knows, and it was not asked"
    assert body["penstock"]["ttft_s"] >= 0
    assert backend.aborted.get_nowait() == backend.found_stop[0], "so that the engine counts it as a stop"


async def test_seed_is_drawn_and_reported(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    first, second = (await completion(http)).json(), (await completion(http)).json()
    drawn = [first["penstock"]["seed"], second["penstock"]["seed"]]
    assert drawn == [sampling.seed for sampling in backend.requests]
    assert drawn[0] != drawn[1]
    assert all(0 <= seed < 2**63 for seed in drawn)
    again = (await completion(http, seed=drawn[0])).json()
    assert again["choices"][0]["text"] == first["choices"][0]["text"]
    greedy = (await completion(http, temperature=0)).json()
    assert greedy["penstock"]["seed"] is None


async def test_limits_when_none_is_given(
    http: httpx.AsyncClient, backend: ScriptedBackend, tokenizer: ChatTokenizer
) -> None:
    await completion(http)
    await completion(http, prompt=[5] * (MAX_MODEL_LEN - 3))
    await chat(http)
    room = MAX_MODEL_LEN - len(tokenizer.encode_chat(CHAT))
    assert [sampling.max_tokens for sampling in backend.requests] == [16, 3, room]


async def test_prompt_may_fill_the_context_exactly(http: httpx.AsyncClient) -> None:
    assert (await completion(http, prompt=[5] * (MAX_MODEL_LEN - 4), max_tokens=4)).status_code == 200


async def test_long_prompts_are_tokenized_alike(
    http: httpx.AsyncClient, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline = (await chat(http, temperature=0)).json()
    monkeypatch.setattr(prompts, "_INLINE_CHARS", 0)
    assert (await chat(http, temperature=0)).json()["choices"] == inline["choices"]


async def test_text_parts_are_one_text(http: httpx.AsyncClient) -> None:
    parts = [{"type": "text", "text": "turn the"}, {"type": "text", "text": " wheel"}]
    in_parts = await chat(http, temperature=0, messages=[{"role": "user", "content": parts}])
    assert in_parts.json()["choices"] == (await chat(http, temperature=0)).json()["choices"]


async def test_models(http: httpx.AsyncClient) -> None:
    listed = (await http.get("/v1/models")).json()
    assert listed["object"] == "list"
    card = listed["data"][0]
    assert card == (await http.get(f"/v1/models/{MODEL}")).json()
    assert (card["id"], card["object"], card["max_model_len"]) == (MODEL, "model", MAX_MODEL_LEN)


async def test_request_id_is_honoured_or_made(http: httpx.AsyncClient) -> None:
    given = await http.get("/v1/models", headers={"X-Request-Id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    made = {(await completion(http)).headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    refused = await http.get("/v1/models", headers={"X-Request-Id": "x" * 500})
    assert len(refused.headers["x-request-id"]) < 100


async def test_two_requests_may_share_a_request_id(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    for _ in range(2):
        await http.post("/v1/completions", json={"model": MODEL, "prompt": "a"}, headers={"X-Request-Id": "same"})
    assert backend.started.get_nowait() != backend.started.get_nowait()


# --- health and metrics --------------------------------------------------------------------------------------------


async def test_before_the_engine_is_there_everything_answers_503(tokenizer: ChatTokenizer) -> None:
    app = create_app()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        for response in [
            await http.get("/health"),
            await http.get("/v1/models"),
            await completion(http),
            await chat(http),
        ]:
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "engine_starting"
            assert int(response.headers["retry-after"]) > 0
        assert "penstock:engine_up 0.0" in (await http.get("/metrics")).text
        app.state.serving = await ServingState.create(ScriptedBackend(tokenizer.vocab_size), tokenizer, MODEL)
        assert (await http.get("/health")).status_code == 200
        assert (await completion(http)).status_code == 200


async def test_dead_engine_answers_503(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    assert (await http.get("/health")).status_code == 200
    backend.dead = True
    for response in [await http.get("/health"), await completion(http), await chat(http, stream=True)]:
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_dead"
        assert "rank 1 is gone" in response.json()["error"]["message"]
        assert "retry-after" in response.headers
    assert "penstock:engine_up 0.0" in (await http.get("/metrics")).text


async def test_metrics_count_what_was_served(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    await completion(http, max_tokens=5)
    await completion(http, max_tokens=5, frobnicate=1, wibble=2, user="u")
    await completion(http, temperature=9)
    lines = (await http.get("/metrics")).text.splitlines()
    for line in [
        "penstock:engine_up 1.0",
        'penstock:generation_tokens_total{gang="g"} 77.0',
        'penstock:kv_cache_usage_perc{gang="g"} 0.25',
        'penstock:request_success_total{finished_reason="stop",gang="g"} 3.0',
        'penstock:spec_decode_num_accepted_tokens_per_pos_total{gang="g",position="1"} 2.0',
        'penstock:unknown_request_fields_total{endpoint="/v1/completions",gang="g"} 2.0',
        'penstock:time_to_first_token_seconds_count{gang="g"} 0.0',
    ]:
        assert line in lines


# --- failures and disconnects --------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [RuntimeError("boom"), "out of blocks"])
async def test_failure_before_the_first_token_is_a_status(
    http: httpx.AsyncClient, backend: ScriptedBackend, failure: Exception | str
) -> None:
    backend.fail_at, backend.failure = 0, failure
    for stream in (False, True):
        response = await completion(http, stream=stream)
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
        response = await completion(http, stream=stream)
        assert response.status_code == status
        error = {"message": str(failure), "type": kind, "param": None, "code": code}
        assert response.json() == {"error": error}
        assert response.headers.get("retry-after") == ("3" if status == 429 else None)
    backend.fail_at = 2
    assert sse(await completion(http, max_tokens=50, stream=True))[-1] == {"error": error}


async def test_failure_in_the_middle_of_a_stream_is_an_event(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    backend.fail_at = 2
    *before, last = sse(await completion(http, max_tokens=50, stream=True, temperature=0))
    assert before
    assert all("choices" in event for event in before)
    assert last["error"]["code"] == "engine_dead"
    assert last["error"]["message"] == "rank 1 is gone"


async def test_failure_in_the_middle_of_an_unstreamed_answer_is_a_status(
    http: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    backend.fail_at = 2
    response = await completion(http, max_tokens=50)
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


async def test_openai_client_reads_both_endpoints(backend: ScriptedBackend, tokenizer: ChatTokenizer) -> None:
    backend.script = [*tokenizer.encode("the stone ☕"), 0]
    backend.stop_token_id = 0
    async with served(backend, tokenizer) as client:
        assert [model.id async for model in client.models.list()] == [MODEL]
        whole = await client.chat.completions.create(model=MODEL, messages=CHAT)  # type: ignore[arg-type]
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("the stone ☕", "stop")
        text = ""
        async with client.chat.completions.stream(model=MODEL, messages=CHAT) as events:  # type: ignore[arg-type]
            async for event in events:
                if event.type == "content.delta":
                    text += event.delta
            final = await events.get_final_completion()
        assert text == final.choices[0].message.content == "the stone ☕"
        with pytest.raises(openai.NotFoundError, match="model"):
            await client.completions.create(model="nope", prompt="a")


# --- the real engine -----------------------------------------------------------------------------------------------

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
    config = EngineConfig(
        model=str(DEMO_MODEL), dtype="float32", device="cpu", num_threads=1, max_num_batched_tokens=64
    )
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


# --- bad input -----------------------------------------------------------------------------------------------------

COMPLETION, CHAT_COMPLETION = "/v1/completions", "/v1/chat/completions"
DEEP = "[" * 100_000 + "]" * 100_000


def with_fields(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "a", **fields}


def with_message(**message: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi", **message}]}


BAD: list[tuple[str, Any, int, str]] = [
    # endpoint, body (str: as it is), status, param
    (COMPLETION, "", 400, "body"),
    (COMPLETION, "{", 400, "body"),
    (COMPLETION, "null", 400, "body"),
    (COMPLETION, "[]", 400, "body"),
    (COMPLETION, '"text"', 400, "body"),
    (COMPLETION, "{'model': 'scripted'}", 400, "body"),
    (COMPLETION, b'{"model": "\xff"}', 400, "body"),
    (COMPLETION, '{"model": "scripted", "prompt": "\\ud800"}', 400, "body"),
    (COMPLETION, DEEP, 400, "body"),
    (COMPLETION, f'{{"model": "scripted", "prompt": {DEEP}}}', 400, "body"),
    (COMPLETION, f'{{"model": "scripted", "prompt": "a", "frobnicate": {DEEP}}}', 400, "body"),
    (COMPLETION, f'{{"model": "scripted", "prompt": "a", "max_tokens": {"9" * 5000}}}', 400, "body"),
    (COMPLETION, "{}", 400, "model"),
    (COMPLETION, {"prompt": "a"}, 400, "model"),
    (COMPLETION, {"model": None, "prompt": "a"}, 400, "model"),
    (COMPLETION, {"model": 5, "prompt": "a"}, 400, "model"),
    (COMPLETION, {"model": "nope", "prompt": "a"}, 404, "model"),
    (COMPLETION, {"model": "", "prompt": "a"}, 404, "model"),
    (COMPLETION, {"model": MODEL}, 400, "prompt"),
    (COMPLETION, with_fields(prompt=None), 400, "prompt"),
    (COMPLETION, with_fields(prompt=""), 400, "prompt"),
    (COMPLETION, with_fields(prompt=[]), 400, "prompt"),
    (COMPLETION, with_fields(prompt=[[]]), 400, "prompt"),
    (COMPLETION, with_fields(prompt={"a": 1}), 400, "prompt"),
    (COMPLETION, with_fields(prompt=[1, "a"]), 400, "prompt"),
    (COMPLETION, with_fields(prompt=[-1]), 400, "prompt"),
    (COMPLETION, with_fields(prompt=[10**6]), 400, "prompt"),
    (COMPLETION, with_fields(prompt=[10**30]), 400, "prompt"),
    (COMPLETION, with_fields(prompt=[5] * MAX_MODEL_LEN), 400, "prompt"),
    (COMPLETION, with_fields(prompt="水" * 5000), 400, "prompt"),
    (COMPLETION, with_fields(max_tokens=MAX_MODEL_LEN), 400, "max_tokens"),
    (COMPLETION, with_fields(max_tokens=0), 400, "max_tokens"),
    (COMPLETION, with_fields(max_tokens=-1), 400, "max_tokens"),
    (COMPLETION, with_fields(max_tokens=1.5), 400, "max_tokens"),
    (COMPLETION, with_fields(max_tokens="5"), 400, "max_tokens"),
    (COMPLETION, with_fields(max_tokens=True), 400, "max_tokens"),
    (COMPLETION, with_fields(max_tokens=10**40), 400, "max_tokens"),
    (COMPLETION, '{"model": "scripted", "prompt": "a", "max_tokens": 1e999}', 400, "max_tokens"),
    (COMPLETION, with_fields(temperature=2.1), 400, "temperature"),
    (COMPLETION, with_fields(temperature=-0.1), 400, "temperature"),
    (COMPLETION, with_fields(temperature="hot"), 400, "temperature"),
    (COMPLETION, with_fields(temperature=float("nan")), 400, "temperature"),
    (COMPLETION, with_fields(temperature=float("inf")), 400, "temperature"),
    (COMPLETION, with_fields(temperature=10**400), 400, "temperature"),
    (COMPLETION, with_fields(temperature=[1]), 400, "temperature"),
    (COMPLETION, with_fields(top_p=0), 400, "top_p"),
    (COMPLETION, with_fields(top_p=1.01), 400, "top_p"),
    (COMPLETION, with_fields(top_k=-2), 400, "top_k"),
    (COMPLETION, with_fields(top_k=1.5), 400, "top_k"),
    (COMPLETION, with_fields(min_p=-1), 400, "min_p"),
    (COMPLETION, with_fields(seed=-1), 400, "seed"),
    (COMPLETION, with_fields(seed=2**63), 400, "seed"),
    (COMPLETION, with_fields(seed="x"), 400, "seed"),
    (COMPLETION, with_fields(stop=""), 400, "stop"),
    (COMPLETION, with_fields(stop=["a"] * 17), 400, "stop"),
    (COMPLETION, with_fields(stop=[1]), 400, "stop"),
    (COMPLETION, with_fields(stop={"a": 1}), 400, "stop"),
    (COMPLETION, with_fields(stop_token_ids=[-1]), 400, "stop_token_ids"),
    (COMPLETION, with_fields(stop_token_ids=[10**6]), 400, "stop_token_ids"),
    (COMPLETION, with_fields(stop_token_ids=["a"]), 400, "stop_token_ids[0]"),
    (COMPLETION, with_fields(stop_token_ids=5), 400, "stop_token_ids"),
    (COMPLETION, with_fields(ignore_eos="yes"), 400, "ignore_eos"),
    (COMPLETION, with_fields(stream="yes"), 400, "stream"),
    (COMPLETION, with_fields(stream_options={"include_usage": True}), 400, "stream_options"),
    (COMPLETION, with_fields(stream=True, stream_options=5), 400, "stream_options"),
    (COMPLETION, with_fields(stream=True, stream_options={"include_usage": 5}), 400, "stream_options.include_usage"),
    (COMPLETION, with_fields(n="x"), 400, "n"),
    (COMPLETION, with_fields(best_of=2), 400, "best_of"),
    (COMPLETION, with_fields(suffix="end"), 400, "suffix"),
    (COMPLETION, with_fields(guided_json={}), 400, "guided_json"),
    (COMPLETION, with_fields(guided_regex="x" * 100_000), 400, "guided_regex"),
    (COMPLETION, with_fields(structured_outputs={"regex": "a"}), 400, "structured_outputs"),
    (CHAT_COMPLETION, {"model": MODEL}, 400, "messages"),
    (CHAT_COMPLETION, {"model": MODEL, "messages": []}, 400, "messages"),
    (CHAT_COMPLETION, {"model": MODEL, "messages": "hi"}, 400, "messages"),
    (CHAT_COMPLETION, {"model": MODEL, "messages": {"role": "user"}}, 400, "messages"),
    (CHAT_COMPLETION, {"model": MODEL, "messages": [None]}, 400, "messages[0]"),
    (CHAT_COMPLETION, {"model": MODEL, "messages": [*CHAT, "hi"]}, 400, "messages[1]"),
    (CHAT_COMPLETION, {"model": MODEL, "messages": [*CHAT, {"role": "system", "content": "x"}]}, 400, "messages"),
    (CHAT_COMPLETION, with_message(role="tool"), 400, "messages[0].role"),
    (CHAT_COMPLETION, with_message(role=None), 400, "messages[0].role"),
    (CHAT_COMPLETION, with_message(role=["user"]), 400, "messages[0].role"),
    (CHAT_COMPLETION, with_message(content=None), 400, "messages[0].content"),
    (CHAT_COMPLETION, with_message(content=5), 400, "messages[0].content"),
    (CHAT_COMPLETION, with_message(content=["hi"]), 400, "messages[0].content[0]"),
    (CHAT_COMPLETION, with_message(content=[{"type": "image_url"}]), 400, "messages[0].content[0].type"),
    (
        CHAT_COMPLETION,
        with_message(content=[{"type": "text", "text": "a"}, {"type": "input_audio"}]),
        400,
        "messages[0].content[1].type",
    ),
    (CHAT_COMPLETION, with_message(content=[{"type": "text"}]), 400, "messages[0].content[0].text"),
    (CHAT_COMPLETION, with_message(tool_calls=[{"id": "x"}]), 400, "messages[0].tool_calls"),
    (CHAT_COMPLETION, with_message(content="水" * 5000), 400, "messages"),
    (CHAT_COMPLETION, {**with_message(), "max_completion_tokens": 0}, 400, "max_completion_tokens"),
    (CHAT_COMPLETION, {**with_message(), "max_completion_tokens": 10**6}, 400, "max_completion_tokens"),
    (CHAT_COMPLETION, {**with_message(), "max_completion_tokens": 1, "max_tokens": 2}, 400, "max_completion_tokens"),
    (CHAT_COMPLETION, {**with_message(), "tools": [{"type": "function"}]}, 400, "tools"),
    (CHAT_COMPLETION, {**with_message(), "tool_choice": "auto"}, 400, "tool_choice"),
    (CHAT_COMPLETION, {**with_message(), "functions": [{}]}, 400, "functions"),
    (CHAT_COMPLETION, {**with_message(), "response_format": {"type": "json_object"}}, 400, "response_format"),
    (CHAT_COMPLETION, {**with_message(), "top_logprobs": 3}, 400, "top_logprobs"),
]


@pytest.mark.parametrize("case", range(len(BAD)), ids=lambda i: f"{i}-{BAD[i][3]}")
async def test_bad_input_gets_a_named_4xx(http: httpx.AsyncClient, backend: ScriptedBackend, case: int) -> None:
    endpoint, body, status, param = BAD[case]
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    response = await http.post(endpoint, content=content, headers={"Content-Type": "application/json"})
    check_error(response, status, param)
    assert backend.started.empty()


def check_error(response: httpx.Response, status: int, param: str | None) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    if param is not None:
        assert error["message"].startswith(f"{param}: ")
    assert len(error["message"]) < 1500


async def test_messages_say_the_numbers(http: httpx.AsyncClient) -> None:
    too_long = (await completion(http, prompt=[5] * 190, max_tokens=20)).json()["error"]
    assert too_long["message"] == "max_tokens: 20 is not in [1, 10]: prompt has 190 tokens and max_model_len is 200"
    assert too_long["code"] == "context_length_exceeded"
    out_of_range = (await completion(http, temperature=3)).json()["error"]["message"]
    assert out_of_range == "temperature: 3.0 is not a number in [0, 2]"
    unknown = (await completion(http, model="x")).json()["error"]
    assert (unknown["code"], unknown["param"]) == ("model_not_found", "model")
    assert MODEL in unknown["message"]


@pytest.mark.parametrize(
    "media_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
async def test_other_media_types_are_refused(http: httpx.AsyncClient, media_type: str) -> None:
    response = await http.post(COMPLETION, content=json.dumps(with_fields()), headers={"Content-Type": media_type})
    check_error(response, 415, "Content-Type")


async def test_charset_is_no_other_media_type(http: httpx.AsyncClient) -> None:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert (await http.post(COMPLETION, content=json.dumps(with_fields()), headers=headers)).status_code == 200


async def test_unknown_routes_and_methods_get_the_same_shape(http: httpx.AsyncClient) -> None:
    check_error(await http.get("/v1/nothing"), 404, None)
    not_allowed = await http.get(COMPLETION)
    check_error(not_allowed, 405, None)
    assert not_allowed.headers["allow"] == "POST"
    check_error(await http.get("/v1/models/nope"), 404, "model")


async def test_a_body_without_end_is_refused(http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_body, "MAX_BODY_BYTES", 1000)
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while read < 100:
            read += 1
            yield b"x" * 100

    response = await http.post(COMPLETION, content=endless(), headers={"Content-Type": "application/json"})
    check_error(response, 413, "body")


async def test_chat_without_template_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    bare = save_tokenizer(tmp_path_factory.mktemp("bare"), chat_template=None)
    app = create_app(await ServingState.create(ScriptedBackend(bare.vocab_size), bare, MODEL))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        response = await chat(http)
        check_error(response, 400, "messages")
        assert "no chat template" in response.json()["error"]["message"]
        assert (await completion(http)).status_code == 200


async def test_openapi_describes_the_bodies(http: httpx.AsyncClient) -> None:
    paths = (await http.get("/openapi.json")).json()["paths"]
    schema = paths[COMPLETION]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "prompt" in schema["required"]
