"""Every bad value of every field gets a 400 that names it, over the real application."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from penstock.cluster.api.chat_tokenizer import ChatTokenizer
from penstock.cluster.api.openai_api import create_app
from penstock.cluster.api.serving_state import ServingState
from penstock.workers.sampling_params import SamplingParams

from .scripted_backend import MAX_MODEL_LEN, ScriptedBackend, save_tokenizer

MODEL = "scripted"
COMPLETION, CHAT, TOKENIZE, DETOKENIZE = "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"
NAN, INFINITY = float("nan"), float("inf")
NOT_INTEGERS: list[Any] = ["1", 1.5, [], {}, True, NAN, 10**40]
NOT_NUMBERS: list[Any] = ["1", [], {}, True, NAN, INFINITY, 10**400]
NOT_FLAGS: list[Any] = [0, 1, "true", [], {}]
NOT_TOKEN_IDS: list[Any] = [5, "5", {"5": 1}, [1.5], ["a"], [None], [True], [-1], [10**6], [10**30], [5] * 1025]

# field: values that both endpoints refuse
SHARED: dict[str, list[Any]] = {
    "n": [0, -1, 129, *NOT_INTEGERS],
    "max_tokens": [-1, MAX_MODEL_LEN, *NOT_INTEGERS],
    "min_tokens": [-1, MAX_MODEL_LEN + 1, *NOT_INTEGERS],
    "temperature": [-0.1, 2.01, *NOT_NUMBERS],
    "top_p": [0, -1, 1.01, *NOT_NUMBERS],
    "top_k": [-2, 2**31, *NOT_INTEGERS],
    "min_p": [-0.1, 1.01, *NOT_NUMBERS],
    "repetition_penalty": [0, -1, 0.009, 100.1, *NOT_NUMBERS],
    "presence_penalty": [-2.01, 2.01, *NOT_NUMBERS],
    "frequency_penalty": [-2.01, 2.01, *NOT_NUMBERS],
    "logit_bias": [
        5,
        [],
        "x",
        {"-1": 1},
        {"a": 1},
        {"": 1},
        {"1.5": 1},
        {"\u0665": 1},
        {" 5": 1},
        {"9" * 30: 1},
        {"1000000": 1},
        {"5": 100.1},
        {"5": -101},
        {"5": NAN},
        {str(i): 0 for i in range(1025)},
    ],
    "allowed_token_ids": [[], *NOT_TOKEN_IDS],
    "stop_token_ids": NOT_TOKEN_IDS,
    "seed": [-1, 2**63, *NOT_INTEGERS],
    "stop": ["", [""], ["a", ""], 5, [5], {}, [["a"]], ["a"] * 17, "a" * 1025, ["a" * 1025]],
    "prompt_logprobs": [-1, 21, *NOT_INTEGERS],
    "truncate_prompt_tokens": [0, -2, MAX_MODEL_LEN + 1, *NOT_INTEGERS],
    "ignore_eos": NOT_FLAGS,
    "include_stop_str_in_output": NOT_FLAGS,
    "skip_special_tokens": NOT_FLAGS,
    "add_special_tokens": NOT_FLAGS,
    "return_token_ids": NOT_FLAGS,
    "stream": NOT_FLAGS,
    "stream_options": [5, [], "x", {"include_usage": True}],
    "speculation": [
        5,
        [],
        "off",
        True,
        {"mode": "fast"},
        {"mode": ""},
        {"mode": 5},
        {"mode": ["off"]},
        {"mode": "off", "max_draft_len": 3},
        {"max_draft_len": -1},
        {"max_draft_len": 65},
        {"draft_len": 3},
        {"mode": "auto", "prediction_token_ids": [5]},
        *({"max_draft_len": value} for value in NOT_INTEGERS),
    ],
    "prediction": [
        5,
        [],
        "text",
        True,
        {},
        {"type": "content"},
        {"content": "text"},
        {"type": "text", "content": "text"},
        {"type": None, "content": "text"},
        {"type": "content", "content": None},
        {"type": "content", "content": 5},
        {"type": "content", "content": {"type": "text", "text": "a"}},
        {"type": "content", "content": ["a"]},
        {"type": "content", "content": [{"type": "image_url"}]},
        {"type": "content", "content": [{"type": "text"}]},
        {"type": "content", "content": [{"type": "text", "text": 5}]},
        {"type": "content", "content": "the water " * 10 * MAX_MODEL_LEN},
    ],
    "best_of": [2, 0, True],
    "bad_words": [["x"]],
    "suffix": ["end"],
    "response_format": [{"type": "json_object"}, {"type": "json_schema", "json_schema": {}}],
    "tools": [[{"type": "function"}]],
    "tool_choice": ["auto", "required"],
    "structured_outputs": [{"regex": "a"}],
    "guided_choice": [["a"]],
    "use_beam_search": [True],
    "length_penalty": [0.5],
    "prompt_embeds": ["AAAA"],
    "chat_template": ["{{ messages }}"],
    "chat_template_kwargs": [{"enable_thinking": False}],
    "return_tokens_as_token_ids": [True],
}
OWN: dict[str, dict[str, list[Any]]] = {
    COMPLETION: {
        "prompt": [None, "", [], [[]], 5, {}, [1, "a"], [[1], "a", 5], [None], [-1], [10**6], ["a"] * 1025],
        "logprobs": [-1, 21, *NOT_INTEGERS],
        "top_logprobs": [1, 5],
        "echo": NOT_FLAGS,
        "add_generation_prompt": [False],
        "continue_final_message": [True],
    },
    CHAT: {
        "logprobs": [1, 5, "true", [], {}],
        "top_logprobs": [-1, 21, 5, *NOT_INTEGERS],
        "echo": [True],
        "max_completion_tokens": [0, -1, MAX_MODEL_LEN, *NOT_INTEGERS],
        "add_generation_prompt": NOT_FLAGS,
        "continue_final_message": [True, *NOT_FLAGS],
    },
}
# endpoint, fields, param: values that do not go together, or are wrong only for one prompt of several
TOGETHER: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETION, {"max_tokens": 0}, "max_tokens"),
    (COMPLETION, {"max_tokens": 0, "logprobs": 1}, "max_tokens"),
    (CHAT, {"max_tokens": 0, "prompt_logprobs": 1}, "max_tokens"),
    (CHAT, {"max_completion_tokens": 0, "prompt_logprobs": 1}, "max_completion_tokens"),
    (CHAT, {"max_completion_tokens": 3, "max_tokens": 4}, "max_completion_tokens"),
    (COMPLETION, {"max_tokens": 4, "min_tokens": 5}, "min_tokens"),
    (COMPLETION, {"min_tokens": 17}, "min_tokens"),
    (COMPLETION, {"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens"),
    (COMPLETION, {"min_tokens": 1, "allowed_token_ids": [0]}, "allowed_token_ids"),
    (COMPLETION, {"min_tokens": 1, "stop_token_ids": [7], "allowed_token_ids": [0, 7]}, "allowed_token_ids"),
    (COMPLETION, {"min_tokens": 1, "stop_token_ids": list(range(1000))}, "stop_token_ids"),
    (COMPLETION, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    (CHAT, {"top_logprobs": 5, "logprobs": False}, "top_logprobs"),
    (CHAT, {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    (COMPLETION, {"prompt": ["a", ""]}, "prompt[1]"),
    (COMPLETION, {"prompt": [[5], [10**6]]}, "prompt[1]"),
    (COMPLETION, {"prompt": [[5], [5] * MAX_MODEL_LEN]}, "prompt[1]"),
    (COMPLETION, {"prompt": [[5]] * 9, "n": 128}, "n"),
    (COMPLETION, {"prompt": [5] * (MAX_MODEL_LEN + 1), "max_tokens": 0, "echo": True}, "prompt"),
    (CHAT, {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
]
TOKENS: list[tuple[str, Any, str]] = [
    (TOKENIZE, {}, "prompt"),
    (TOKENIZE, {"prompt": None}, "prompt"),
    (TOKENIZE, {"prompt": "a", "messages": []}, "prompt"),
    (TOKENIZE, {"prompt": 5}, "prompt"),
    (TOKENIZE, {"prompt": ["a"]}, "prompt"),
    (TOKENIZE, {"messages": []}, "messages"),
    (TOKENIZE, {"messages": [{"role": "tool", "content": ""}]}, "messages[0].role"),
    (TOKENIZE, {"prompt": "a", "add_special_tokens": "yes"}, "add_special_tokens"),
    (TOKENIZE, {"prompt": "a", "return_token_strs": 1}, "return_token_strs"),
    (
        TOKENIZE,
        {"messages": [{"role": "user", "content": "a"}], "continue_final_message": True},
        "continue_final_message",
    ),
    (TOKENIZE, [], "body"),
    (DETOKENIZE, {}, "tokens"),
    (DETOKENIZE, {"tokens": None}, "tokens"),
    (DETOKENIZE, {"tokens": "5"}, "tokens"),
    (DETOKENIZE, {"tokens": [-1]}, "tokens"),
    (DETOKENIZE, {"tokens": [10**6]}, "tokens"),
    (DETOKENIZE, {"tokens": [10**30]}, "tokens"),
    (DETOKENIZE, {"tokens": [True]}, "tokens[0]"),
    (DETOKENIZE, {"tokens": ["5"]}, "tokens[0]"),
]


@pytest.fixture(scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[httpx.AsyncClient, ScriptedBackend]]:
    tokenizer: ChatTokenizer = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    backend = ScriptedBackend(tokenizer.vocab_size)
    app = create_app(await ServingState.create(backend, tokenizer, MODEL))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client, backend


def body_of(endpoint: str, fields: dict[str, Any]) -> dict[str, Any]:
    prompt = {"prompt": "a"} if endpoint == COMPLETION else {"messages": [{"role": "user", "content": "hi"}]}
    return {"model": MODEL, **prompt, **fields}


async def check_refused(served: tuple[httpx.AsyncClient, ScriptedBackend], endpoint: str, body: Any, param: str) -> str:
    """Send ``body``, check that it is refused by name, and return the message."""
    http, backend = served
    content = json.dumps(body)
    response = await http.post(endpoint, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, f"{content[:300]}: {response.text[:300]}"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    named = error["param"]
    assert named == param or named.startswith((f"{param}.", f"{param}[")), f"{content[:300]}: {error}"
    assert error["message"].startswith(f"{named}: ")
    assert len(error["message"]) < 1500
    assert backend.started.empty()
    return error["message"]


@pytest.mark.parametrize("endpoint", [COMPLETION, CHAT])
@pytest.mark.parametrize("field", SHARED)
async def test_shared_fields(served: tuple[httpx.AsyncClient, ScriptedBackend], endpoint: str, field: str) -> None:
    for value in SHARED[field]:
        await check_refused(served, endpoint, body_of(endpoint, {field: value}), field)


@pytest.mark.parametrize(("endpoint", "field"), [(endpoint, field) for endpoint in OWN for field in OWN[endpoint]])
async def test_fields_of_one_endpoint(
    served: tuple[httpx.AsyncClient, ScriptedBackend], endpoint: str, field: str
) -> None:
    for value in OWN[endpoint][field]:
        await check_refused(served, endpoint, body_of(endpoint, {field: value}), field)


@pytest.mark.parametrize("case", range(len(TOGETHER)), ids=lambda i: f"{i}-{TOGETHER[i][2]}")
async def test_fields_that_do_not_go_together(served: tuple[httpx.AsyncClient, ScriptedBackend], case: int) -> None:
    endpoint, fields, param = TOGETHER[case]
    await check_refused(served, endpoint, body_of(endpoint, fields), param)


@pytest.mark.parametrize("case", range(len(TOKENS)), ids=lambda i: f"{i}-{TOKENS[i][2]}")
async def test_tokenization(served: tuple[httpx.AsyncClient, ScriptedBackend], case: int) -> None:
    endpoint, body, param = TOKENS[case]
    await check_refused(served, endpoint, body, param)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n", 129, "n: 129 is not an integer in [1, 128]"),
        ("repetition_penalty", 0, "repetition_penalty: 0.0 is not a number in [0.01, 100]"),
        ("presence_penalty", 3, "presence_penalty: 3.0 is not a number in [-2, 2]"),
        ("logit_bias", {"5": 101}, "logit_bias: 101.0 is not a number in [-100, 100]"),
        ("logit_bias", {"400000": 1}, "logit_bias: 400000 is not in [0, 300]"),
        ("logprobs", 21, "logprobs: 21 is not an integer in [0, 20]"),
        ("min_tokens", 17, "min_tokens: 17 is not in [0, max_tokens=16]"),
        ("speculation", {"mode": "on"}, "speculation.mode: 'on' is not one of auto, off, fixed"),
        ("speculation", {"max_draft_len": 65}, "speculation.max_draft_len: 65 is not an integer in [0, 64]"),
        ("speculation", {"length": 3}, "speculation: unknown key 'length'; valid: mode, max_draft_len"),
        ("prediction", {"type": "text"}, "prediction.type: 'text' is not supported; valid: 'content'"),
        ("truncate_prompt_tokens", 0, f"truncate_prompt_tokens: 0 is not -1 or in [1, {MAX_MODEL_LEN}]"),
    ],
)
async def test_messages_say_the_range(
    served: tuple[httpx.AsyncClient, ScriptedBackend], field: str, value: Any, message: str
) -> None:
    assert await check_refused(served, COMPLETION, body_of(COMPLETION, {field: value}), field) == message


async def test_null_is_as_good_as_nothing(served: tuple[httpx.AsyncClient, ScriptedBackend]) -> None:
    http, backend = served
    for endpoint in (COMPLETION, CHAT):
        nulls = dict.fromkeys([*SHARED, *OWN[endpoint]])
        nulls.pop("prompt", None)
        response = await http.post(endpoint, json=body_of(endpoint, {**nulls, "max_tokens": 3, "seed": 1}))
        assert response.status_code == 200, response.text
        backend.started.get_nowait()
    assert backend.requests[-2:] == [SamplingParams(max_tokens=3, seed=1)] * 2


OUTSIDE: dict[str, list[Any]] = {
    "n": [0, 129, 1.5, "1"],
    "max_tokens": [-1, 2**31],
    "min_tokens": [-1],
    "temperature": [-0.1, 2.1, "1"],
    "top_p": [0, 1.1],
    "top_k": [-2, 2**31],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, 101],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "logit_bias": [[], {"a": 1}, {"-1": 1}, {"5": 101}],
    "allowed_token_ids": [[], [-1], ["a"], [5] * 1025],
    "stop_token_ids": [[-1], [1.5], [5] * 1025],
    "seed": [-1, 2**64],
    "stop": ["", [""], [5], ["a"] * 17, "a" * 1025, ["a" * 1025]],
    "prompt_logprobs": [-1, 21],
    "truncate_prompt_tokens": [-2],
    "ignore_eos": [1],
    "stream_options": [5, {"include_usage": 5}],
    "speculation": [5, {"mode": "fast"}, {"max_draft_len": 65}, {"max_draft_len": -1}, {"draft_len": 3}],
    "prediction": ["text", {}, {"type": "text", "content": "a"}, {"type": "content", "content": [{"type": "text"}]}],
}


async def test_the_schema_says_the_same(served: tuple[httpx.AsyncClient, ScriptedBackend]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    http, _ = served
    paths = (await http.get("/openapi.json")).json()["paths"]
    own = {
        COMPLETION: {"prompt": [None, 5, [], [[]], [1.5]], "logprobs": [-1, 21, True], "echo": [1]},
        CHAT: {"messages": [None, "a"], "logprobs": [1], "top_logprobs": [-1, 21], "max_completion_tokens": [0]},
    }
    for endpoint, fields in own.items():
        schema = paths[endpoint]["post"]["requestBody"]["content"]["application/json"]["schema"]
        validator = jsonschema.Draft202012Validator(schema)
        assert validator.is_valid(body_of(endpoint, {"logit_bias": {"5": -1}, "stop": ["a"], "seed": None, "top_k": 0}))
        assert validator.is_valid(body_of(endpoint, {"stop": None, "stream_options": {"include_usage": True}}))
        assert set(SHARED) - set(schema["properties"]) == UNSUPPORTED
        for field, values in {**OUTSIDE, **fields}.items():
            for value in values:
                assert not validator.is_valid(body_of(endpoint, {field: value})), f"{endpoint} {field} {value!r}"
    for prompt in ("a", ["a", "b"], [1, 2], [[1], [2]]):
        schema = paths[COMPLETION]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert jsonschema.Draft202012Validator(schema).is_valid({"model": "m", "prompt": prompt})


UNSUPPORTED = {
    "bad_words",
    "best_of",
    "chat_template",
    "chat_template_kwargs",
    "guided_choice",
    "length_penalty",
    "prompt_embeds",
    "response_format",
    "return_tokens_as_token_ids",
    "structured_outputs",
    "suffix",
    "tool_choice",
    "tools",
    "use_beam_search",
}
