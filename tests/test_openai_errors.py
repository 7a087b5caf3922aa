"""Bodies that are wrong in any way get a 4xx that names the field."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from penstock.cluster.api.chat_tokenizer import ChatTokenizer
from penstock.cluster.api.openai_api import create_app
from penstock.cluster.api.serving_state import ServingState, default_max_body_bytes

from .openai_app import CHAT, MODEL, check_error, client_of, post_chat, post_completion
from .scripted_backend import MAX_MODEL_LEN, ScriptedBackend, save_tokenizer

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


async def test_messages_say_the_numbers(http: httpx.AsyncClient) -> None:
    too_long = (await post_completion(http, prompt=[5] * 190, max_tokens=20)).json()["error"]
    assert too_long["message"] == "max_tokens: 20 is not in [1, 10]: prompt has 190 tokens and max_model_len is 200"
    assert too_long["code"] == "context_length_exceeded"
    out_of_range = (await post_completion(http, temperature=3)).json()["error"]["message"]
    assert out_of_range == "temperature: 3.0 is not a number in [0, 2]"
    unknown = (await post_completion(http, model="x")).json()["error"]
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
    for path, meant in (
        ("/chat/completions", CHAT_COMPLETION),
        ("/v1/v1/completions", COMPLETION),
        ("/models", "/v1/models"),
    ):
        response = await http.post(path, json={})
        check_error(response, 404, None)
        assert response.json()["error"]["message"] == f"POST {path}: Not Found; it is at {meant}"
    not_allowed = await http.get(COMPLETION)
    check_error(not_allowed, 405, None)
    assert not_allowed.headers["allow"] == "POST"
    check_error(await http.get("/v1/models/nope"), 404, "model")


@pytest.mark.parametrize(
    "path", ["/health", "/metrics", "/events", "/version", "/v1/models", f"/v1/models/{MODEL}", "/nowhere", COMPLETION]
)
async def test_head_is_get_without_the_body(http: httpx.AsyncClient, path: str) -> None:
    head, get = await http.head(path), await http.get(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert get.content
    for name in ("content-type", "content-length"):
        assert head.headers[name] == get.headers[name]
    assert "x-request-id" in head.headers


async def test_a_body_that_is_too_long_is_refused_unread(backend: ScriptedBackend, tokenizer: ChatTokenizer) -> None:
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while read < 100:
            read += 1
            yield b"x" * 100

    state = await ServingState.create(backend, tokenizer, MODEL, max_body_bytes=1024)
    async with client_of(create_app(state)) as http:
        for path in (COMPLETION, CHAT_COMPLETION, "/tokenize", "/detokenize"):
            for headers, most in (({}, 11), ({"Content-Length": "10000"}, 0)):
                read = 0
                response = await http.post(
                    path, content=endless(), headers={"Content-Type": "application/json", **headers}
                )
                check_error(response, 413, "body")
                assert "longer than 1024 bytes (max_body_bytes)" in response.json()["error"]["message"]
                assert read <= most
        text = "a" * (1024 - len(json.dumps(with_fields(prompt=""))))
        for longer, status in (("", 400), ("a", 413)):  # 400: it has a body's length, and too many tokens
            response = await http.post(COMPLETION, content=json.dumps(with_fields(prompt=text + longer)))
            assert response.status_code == status


@pytest.mark.parametrize(("tokens", "mib"), [(1, 4), (2048, 4), (131_072, 8), (1 << 20, 32)])
def test_bodies_may_be_as_long_as_contexts_can_use(tokens: int, mib: int) -> None:
    assert default_max_body_bytes(tokens) == mib << 20


async def test_chat_without_template_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    bare = save_tokenizer(tmp_path_factory.mktemp("bare"), chat_template=None)
    app = create_app(await ServingState.create(ScriptedBackend(bare.vocab_size), bare, MODEL))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        response = await post_chat(http)
        check_error(response, 400, "messages")
        assert "no chat template" in response.json()["error"]["message"]
        assert (await post_completion(http)).status_code == 200


async def test_openapi_describes_the_bodies(http: httpx.AsyncClient) -> None:
    paths = (await http.get("/openapi.json")).json()["paths"]
    schema = paths[COMPLETION]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "prompt" in schema["required"]
