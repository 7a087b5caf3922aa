from __future__ import annotations

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from penstock.cluster.api.api_error import ApiError
from penstock.cluster.api.protocol import ChatCompletionRequest, CompletionRequest
from penstock.workers.sampling_params import SamplingParams


def completion(**fields: object) -> CompletionRequest:
    return CompletionRequest.model_validate_json(json.dumps({"model": "m", "prompt": "p", **fields}))


def chat(**fields: object) -> ChatCompletionRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return ChatCompletionRequest.model_validate_json(json.dumps(body))


def test_sampling_defaults_are_openais() -> None:
    assert completion().sampling_params() == SamplingParams(temperature=1.0, top_p=1.0, max_tokens=None)


def test_sampling_fields_are_passed_on() -> None:
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "seed": 7,
        "stop": ["a", "b"],
        "stop_token_ids": [3],
        "ignore_eos": True,
        "max_tokens": 5,
    }
    expected = SamplingParams(**{**given, "stop": ("a", "b"), "stop_token_ids": (3,)})  # type: ignore[arg-type]
    assert completion(**given).sampling_params() == expected
    assert chat(**given).sampling_params() == expected


def test_null_means_default() -> None:
    names = ["temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens"]
    nothing = dict.fromkeys([*names, "stream", "stream_options", "logprobs", "tools", "n"])
    body = completion(**nothing)
    body.check_supported()
    assert body.sampling_params() == SamplingParams()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("one", ["one"]),
        ("", [""]),
        ([1, 2], [[1, 2]]),
        ([], [[]]),
        (["one"], ["one"]),
        (["one", "two"], ["one", "two"]),
        ([[1, 2]], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompt_forms(prompt: object, expected: object) -> None:
    assert completion(prompt=prompt).prompts == expected


@pytest.mark.parametrize(
    "prompt", [[1, "a"], [[1], "a"], ["a", [1]], 5, {"a": 1}, None, True, [True], [1.5], ["a"] * 1025]
)
def test_other_prompts_are_refused_by_name(prompt: object) -> None:
    with pytest.raises(ValidationError) as caught:
        completion(prompt=prompt)
    assert ApiError.from_validation(caught.value).param == "prompt"


def test_chat_takes_either_limit() -> None:
    assert chat(max_completion_tokens=5).sampling_params().max_tokens == 5
    assert chat(max_tokens=5, max_completion_tokens=5).sampling_params().max_tokens == 5
    with pytest.raises(ValueError, match=r"^max_completion_tokens: differs"):
        chat(max_tokens=5, max_completion_tokens=6).check_supported()


@pytest.mark.parametrize(
    "neutral",
    [
        {"n": 1, "best_of": 1, "echo": False, "suffix": "", "logit_bias": {}},
        {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "min_tokens": 0},
        {"tools": [], "tool_choice": "none", "functions": [], "response_format": {"type": "text"}},
        {"logprobs": None, "top_logprobs": 0, "modalities": ["text"], "guided_json": None},
    ],
)
def test_fields_that_ask_for_nothing_pass(neutral: dict[str, object]) -> None:
    completion(**neutral).check_supported()
    chat(**neutral).check_supported()


def test_true_is_not_one() -> None:
    with pytest.raises(ValueError, match=r"^best_of: True is not supported; valid: 1 or null"):
        completion(best_of=True).check_supported()


def test_only_fields_no_api_has_count_as_unknown() -> None:
    body = completion(user="u", metadata={}, store=True, n=1, frobnicate=1, wibble=None)
    body.check_supported()
    assert body.num_unknown_fields == 2


def test_json_schema_stands_alone() -> None:
    for model in (CompletionRequest, ChatCompletionRequest):
        assert "$ref" not in json.dumps(model.model_json_schema())


def test_importing_the_protocol_is_cheap() -> None:
    code = (
        "import penstock.cluster.api.protocol, sys; sys.exit(bool({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
