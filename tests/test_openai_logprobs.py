"""Log-probabilities of outputs and prompts, and echo."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from penstock.cluster.api.chat_tokenizer import ChatTokenizer

from .openai_app import CHAT, TEXT, chat, completion, gathered, piece
from .scripted_backend import ScriptedBackend


def check_tokens(choice: dict[str, Any], start: int = 0) -> None:
    """Check what holds for any completion's log-probabilities: the tokens are the text, at their offsets."""
    logprobs = choice["logprobs"]
    raw = [piece(token) for token in logprobs["tokens"]]
    assert b"".join(raw).decode(errors="replace") == choice["text"]
    for i, offset in enumerate(logprobs["text_offset"]):
        before = b"".join(raw[:i]).decode(errors="ignore")
        assert offset == len(before)
    assert {len(values) for values in logprobs.values()} == {len(raw)}


@pytest.mark.parametrize("num_top", [0, 1, 3])
async def test_completion_logprobs(
    http: httpx.AsyncClient, backend: ScriptedBackend, tokenizer: ChatTokenizer, num_top: int
) -> None:
    backend.script = tokenizer.encode(TEXT)
    choice = (await completion(http, max_tokens=100, logprobs=num_top))["choices"][0]
    assert choice["text"] == TEXT
    check_tokens(choice)
    assert any(token.startswith("bytes:") for token in choice["logprobs"]["tokens"]), "水 is split"
    assert choice["logprobs"]["token_logprobs"] == [-1.0 - token / 1024 for token in backend.script]
    for token, top in zip(choice["logprobs"]["tokens"], choice["logprobs"]["top_logprobs"], strict=True):
        assert top[token] <= -0.5
        assert len(top) in (num_top, num_top + 1)
        assert sorted(top.values())[-1] == (-0.5 if num_top else top[token])


async def test_streamed_logprobs_add_up(
    http: httpx.AsyncClient, backend: ScriptedBackend, tokenizer: ChatTokenizer
) -> None:
    backend.script = tokenizer.encode(TEXT)
    for fields in ({}, {"echo": True}, {"stop": "wheel"}, {"n": 2}, {"stop": "☕", "echo": True, "n": 2}):
        whole = await completion(http, max_tokens=100, logprobs=2, seed=1, **fields)
        events = await completion(http, max_tokens=100, logprobs=2, seed=1, stream=True, **fields)
        wanted = [{k: v for k, v in choice.items() if k != "penstock"} for choice in whole["choices"]]
        assert gathered(events) == wanted


async def test_a_stop_string_cuts_the_logprobs_after_it(
    http: httpx.AsyncClient, backend: ScriptedBackend, tokenizer: ChatTokenizer
) -> None:
    backend.script = tokenizer.encode("the water turns the wheel and goes on and on")
    body = await completion(http, max_tokens=100, logprobs=0, stop="wheel", return_token_ids=True)
    kept = tokenizer.encode("the water turns the wheel")
    assert body["choices"][0]["logprobs"]["token_logprobs"] == [-1.0 - token / 1024 for token in kept]
    assert body["choices"][0]["token_ids"] == kept
    assert body["usage"]["completion_tokens"] == len(kept)


async def test_chat_logprobs(http: httpx.AsyncClient, backend: ScriptedBackend, tokenizer: ChatTokenizer) -> None:
    backend.script = tokenizer.encode(TEXT)
    whole = (await chat(http, max_tokens=100, logprobs=True, top_logprobs=2))["choices"][0]
    content = whole["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == TEXT
    assert [entry["logprob"] for entry in content] == [-1.0 - token / 1024 for token in backend.script]
    assert [[top["logprob"] for top in entry["top_logprobs"]] for entry in content] == [[-0.5, -0.51]] * len(content)
    assert whole["logprobs"]["refusal"] is None
    events = await chat(http, max_tokens=100, logprobs=True, top_logprobs=2, stream=True)
    assert gathered(events)[0]["logprobs"]["content"] == content
    bare = (await chat(http, max_tokens=100, logprobs=True))["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in bare] == [[]] * len(content)


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("as_ids", [False, True])
async def test_echo_scores_prompts_as_evaluation_harnesses_ask(
    http: httpx.AsyncClient, tokenizer: ChatTokenizer, max_tokens: int, as_ids: bool
) -> None:
    texts = ["the water turns", TEXT]
    ids = [tokenizer.encode(text) for text in texts]
    prompt = ids if as_ids else texts
    body = await completion(http, prompt=prompt, echo=True, max_tokens=max_tokens, logprobs=1, temperature=0, seed=3)
    assert body["usage"]["completion_tokens"] == max_tokens * 2
    for text, token_ids, choice in zip(texts, ids, body["choices"], strict=True):
        assert choice["text"].startswith(text)
        assert choice["finish_reason"] == "length"
        check_tokens(choice)
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(token_ids) + max_tokens
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        assert logprobs["token_logprobs"][1 : len(token_ids)] == [-1.0 - token / 1024 for token in token_ids[1:]]
        assert all(max(top.values()) == -0.5 for top in logprobs["top_logprobs"][1:])


async def test_echo_without_logprobs_is_text_alone(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    plain = await completion(http, temperature=0)
    echoed = await completion(http, temperature=0, echo=True)
    assert echoed["choices"][0]["text"] == "the water" + plain["choices"][0]["text"]
    assert echoed["choices"][0]["logprobs"] is None
    assert backend.requests[-1].prompt_logprobs is None
    nothing = await completion(http, echo=True, max_tokens=0)
    assert nothing["choices"][0]["text"] == "the water"
    assert nothing["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("endpoint", [completion, chat])
async def test_prompt_logprobs(http: httpx.AsyncClient, tokenizer: ChatTokenizer, endpoint: Any) -> None:
    body = await endpoint(http, prompt_logprobs=2)
    ids = tokenizer.encode("the water") if endpoint is completion else tokenizer.encode_chat(CHAT)
    found = body["choices"][0]["prompt_logprobs"] if endpoint is completion else body["prompt_logprobs"]
    assert found[0] is None
    for token_id, entry in zip(ids[1:], found[1:], strict=True):
        text = tokenizer.token_texts.to_text(token_id)
        assert entry[str(token_id)] == {"logprob": -1.0 - token_id / 1024, "rank": 2, "decoded_token": text}
        assert entry["5"]["rank"] == 1 if token_id != 5 else 2
