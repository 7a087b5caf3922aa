"""What a request may ask for besides one plain text: choices, lists of prompts, log-probabilities, echo, tokens."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from penstock import __version__, demo
from penstock.cluster.api.chat_tokenizer import ChatTokenizer
from penstock.cluster.api.openai_api import create_app
from penstock.cluster.api.serving_state import ServingState
from penstock.cluster.client.llm import make_ranks
from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.async_engine import AsyncEngine
from penstock.cluster.engine.engine import Engine
from penstock.workers.sampling_params import SamplingParams

from .scripted_backend import MAX_MODEL_LEN, ScriptedBackend, save_tokenizer

NAMES = ("scripted", "other-name")
DEMO_MODEL = Path(demo.__file__).parent / "model"
CHAT = [{"role": "user", "content": "turn the wheel"}]
TEXT = "naïve café ☕ turns the wheel 水車"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def backend(tokenizer: ChatTokenizer) -> ScriptedBackend:
    return ScriptedBackend(tokenizer.vocab_size)


@pytest.fixture
async def http(backend: ScriptedBackend, tokenizer: ChatTokenizer) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(create_app(await ServingState.create(backend, tokenizer, NAMES, "/the/root"))) as client:
        yield client


def client_of(app: Any, **headers: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers)


async def completion(http: httpx.AsyncClient, **fields: Any) -> Any:
    body = {"model": NAMES[0], "prompt": "the water", "max_tokens": 12, **fields}
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return sse(response) if fields.get("stream") else response.json()


async def chat(http: httpx.AsyncClient, **fields: Any) -> Any:
    body = {"model": NAMES[0], "messages": CHAT, "max_tokens": 12, **fields}
    response = await http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return sse(response) if fields.get("stream") else response.json()


def sse(response: httpx.Response) -> list[Any]:
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


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


# --- prompts and choices ---------------------------------------------------------------------------------------------


async def test_choices_are_prompt_major_and_each_is_always_the_same(
    http: httpx.AsyncClient, backend: ScriptedBackend, tokenizer: ChatTokenizer
) -> None:
    prompts = ["the water", "the stone"]
    body = await completion(http, prompt=prompts, n=3, seed=7)
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    texts = [choice["text"] for choice in body["choices"]]
    assert len(set(texts)) == 6
    assert [sampling.choice for sampling in backend.requests] == [0, 1, 2] * 2
    assert all(sampling.n == 1 for sampling in backend.requests)
    for i, prompt in enumerate(prompts):
        alone = await completion(http, prompt=prompt, n=2, seed=7)
        assert [choice["text"] for choice in alone["choices"]] == texts[3 * i : 3 * i + 2]
    usage = body["usage"]
    assert usage["prompt_tokens"] == sum(len(tokenizer.encode(prompt)) for prompt in prompts)
    assert usage["completion_tokens"] == 6 * 12
    assert body["penstock"]["seed"] == 7
    assert [choice["penstock"]["seed"] for choice in body["choices"]] == [7] * 6


@pytest.mark.parametrize("as_ids", [False, True])
async def test_every_form_of_prompt(http: httpx.AsyncClient, tokenizer: ChatTokenizer, as_ids: bool) -> None:
    prompts: list[Any] = ["the water", "café ☕", "the wheel"]
    one = [(await completion(http, prompt=prompt, temperature=0))["choices"][0]["text"] for prompt in prompts]
    if as_ids:
        prompts = [tokenizer.encode(prompt) for prompt in prompts]
    together = await completion(http, prompt=prompts, temperature=0)
    assert [choice["text"] for choice in together["choices"]] == one
    single = await completion(http, prompt=prompts[:1], temperature=0)
    assert [choice["text"] for choice in single["choices"]] == one[:1]
    assert "penstock" not in single["choices"][0]


async def test_prompts_that_are_alike_get_seeds_of_their_own(http: httpx.AsyncClient) -> None:
    body = await completion(http, prompt=["the water"] * 3)
    seeds = [choice["penstock"]["seed"] for choice in body["choices"]]
    assert len(set(seeds)) == 3
    assert body["penstock"]["seed"] is None
    again = await completion(http, seed=seeds[1])
    assert again["choices"][0]["text"] == body["choices"][1]["text"]


@pytest.mark.parametrize("endpoint", [completion, chat])
async def test_a_stream_of_choices_adds_up(http: httpx.AsyncClient, endpoint: Any) -> None:
    whole = await endpoint(http, n=3, seed=3)
    events = await endpoint(http, n=3, seed=3, stream=True, stream_options={"include_usage": True})
    assert events.pop()["usage"] == whole["usage"]
    texts = [choice.get("text") or choice["message"]["content"] for choice in whole["choices"]]
    assert [choice["text"] for choice in gathered(events)] == texts
    assert [choice["finish_reason"] for choice in gathered(events)] == ["length"] * 3
    if endpoint is chat:
        assert [e["choices"][0]["delta"] for e in events[:3]] == [{"role": "assistant", "content": ""}] * 3


async def test_one_choice_that_stops_leaves_the_others_alone(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    full = [choice["text"] for choice in (await completion(http, n=4, seed=5, max_tokens=40))["choices"]]
    stop = next(full[2][i : i + 3] for i in range(5, 30) if sum(full[2][i : i + 3] in text for text in full) == 1)
    cut = (await completion(http, n=4, seed=5, max_tokens=40, stop=stop))["choices"]
    assert [choice["text"] for choice in cut] == [*full[:2], full[2][: full[2].index(stop)], full[3]]
    assert [choice["finish_reason"] for choice in cut] == ["length", "length", "stop", "length"]
    assert backend.aborted.qsize() == 1


async def test_a_client_that_leaves_ends_all_choices(backend: ScriptedBackend, tokenizer: ChatTokenizer) -> None:
    backend.gate = asyncio.Semaphore(4)
    app = create_app(await ServingState.create(backend, tokenizer, NAMES))
    async with client_of(app) as http:
        asking = asyncio.create_task(completion(http, n=3))
        started = {await backend.started.get() for _ in range(3)}
        asking.cancel()
        assert {await asyncio.wait_for(backend.aborted.get(), 10) for _ in range(3)} == started


@pytest.mark.parametrize("stream", [False, True])
async def test_one_failing_choice_fails_the_request_and_ends_the_others(
    http: httpx.AsyncClient, backend: ScriptedBackend, stream: bool
) -> None:
    generate = backend.generate

    async def fails_once(request_id: str, prompt: Any, sampling: SamplingParams) -> AsyncIterator[Any]:
        async for output in generate(request_id, prompt, sampling):
            if sampling.choice == 1 and output.offset > 0:
                raise RuntimeError("boom")
            yield output

    backend.generate = fails_once  # type: ignore[method-assign]
    body = {"model": NAMES[0], "prompt": "a", "n": 3, "max_tokens": 100, "stream": stream}
    response = await http.post("/v1/completions", json=body)
    if stream:
        *_, last = [line for line in response.text.split("\n\n") if line]
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "boom"
    else:
        assert (response.status_code, response.json()["error"]["message"]) == (500, "boom")


# --- log-probabilities -----------------------------------------------------------------------------------------------


def check_tokens(choice: dict[str, Any], start: int = 0) -> None:
    """Check what holds for any completion's log-probabilities: the tokens are the text, at their offsets."""
    logprobs = choice["logprobs"]
    raw = [piece(token) for token in logprobs["tokens"]]
    assert b"".join(raw).decode(errors="replace") == choice["text"]
    for i, offset in enumerate(logprobs["text_offset"]):
        before = b"".join(raw[:i]).decode(errors="ignore")
        assert offset == len(before)
    assert {len(values) for values in logprobs.values()} == {len(raw)}


def piece(token: str) -> bytes:
    if token.startswith("bytes:"):
        return bytes(int(part, 16) for part in token.removeprefix("bytes:\\x").split("\\x"))
    return token.encode()


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


# --- other fields ----------------------------------------------------------------------------------------------------


async def test_sampling_fields_reach_the_engine(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "presence_penalty": -1,
        "frequency_penalty": 2,
        "seed": 11,
        "min_tokens": 3,
        "stop_token_ids": [9],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "allowed_token_ids": [5, 6],
    }
    await completion(http, logit_bias={"5": 1, "7": -100}, stop="x", logprobs=3, prompt_logprobs=2, **fields)
    await chat(
        http, logit_bias={"5": 1, "7": -100}, stop="x", logprobs=True, top_logprobs=3, prompt_logprobs=2, **fields
    )
    wanted = SamplingParams.from_kwargs(
        logit_bias={5: 1.0, 7: -100.0}, stop=("x",), logprobs=3, prompt_logprobs=2, max_tokens=12, **fields
    )
    assert backend.requests == [wanted, wanted]


async def test_stop_strings_wait_for_min_tokens(
    http: httpx.AsyncClient, backend: ScriptedBackend, tokenizer: ChatTokenizer
) -> None:
    backend.script = tokenizer.encode("on and on and on and on")
    first = len(tokenizer.encode("on and on"))
    assert (await completion(http, max_tokens=50, stop="on"))["choices"][0]["text"] == ""
    late = await completion(http, max_tokens=50, stop="on", min_tokens=first)
    assert late["choices"][0]["text"] == "on and on and "
    kept = await completion(http, max_tokens=50, stop="on", min_tokens=first, include_stop_str_in_output=True)
    assert kept["choices"][0]["text"] == "on and on and on"


async def test_special_tokens_and_stop_tokens_may_be_shown(
    http: httpx.AsyncClient, backend: ScriptedBackend, tokenizer: ChatTokenizer
) -> None:
    backend.script, backend.stop_token_id = [*tokenizer.encode("the stone"), 1, 0], 0
    assert (await completion(http))["choices"][0]["text"] == "the stone"
    shown = await completion(http, skip_special_tokens=False)
    assert shown["choices"][0]["text"] == "the stone<|system|>"
    all_of_it = await completion(http, skip_special_tokens=False, include_stop_str_in_output=True)
    assert all_of_it["choices"][0]["text"] == "the stone<|system|><|eos|>"


async def test_token_ids_are_returned_on_request(http: httpx.AsyncClient, tokenizer: ChatTokenizer) -> None:
    prompt = tokenizer.encode("the water")
    choice = (await completion(http, return_token_ids=True, seed=1))["choices"][0]
    assert choice["prompt_token_ids"] == prompt
    assert tokenizer.decode(choice["token_ids"]) == choice["text"]
    events = await completion(http, return_token_ids=True, seed=1, stream=True)
    parts = [event["choices"][0] for event in events]
    assert [token for part in parts for token in part.get("token_ids", [])] == choice["token_ids"]
    assert [part["prompt_token_ids"] for part in parts if "prompt_token_ids" in part] == [prompt]
    answer = await chat(http, return_token_ids=True, seed=1)
    assert answer["prompt_token_ids"] == tokenizer.encode_chat(CHAT)
    assert len(answer["choices"][0]["token_ids"]) == 12


async def test_prompts_are_cut_from_the_left(
    http: httpx.AsyncClient, backend: ScriptedBackend, tokenizer: ChatTokenizer
) -> None:
    ids = list(range(4, 54))
    body = await completion(http, prompt=ids, truncate_prompt_tokens=8, return_token_ids=True, echo=True)
    assert body["choices"][0]["prompt_token_ids"] == ids[-8:]
    assert body["choices"][0]["text"].startswith(tokenizer.decode(ids[-8:]))
    assert body["usage"]["prompt_tokens"] == 8
    long = await completion(http, prompt=ids * 10, truncate_prompt_tokens=-1, max_tokens=20)
    assert long["usage"]["prompt_tokens"] == MAX_MODEL_LEN - 20


async def test_a_conversation_may_go_on_with_its_last_message(
    http: httpx.AsyncClient, tokenizer: ChatTokenizer
) -> None:
    messages = [*CHAT, {"role": "assistant", "content": "It turns"}]
    turn = {"add_generation_prompt": False, "continue_final_message": True}
    body = await chat(http, messages=messages, return_token_ids=True, **turn)
    assert tokenizer.decode(body["prompt_token_ids"], skip_special_tokens=False).endswith("<|assistant|>It turns")
    closed = await chat(http, return_token_ids=True, add_generation_prompt=False)
    assert tokenizer.decode(closed["prompt_token_ids"], skip_special_tokens=False).endswith("wheel")


async def test_answers_say_who_they_are(http: httpx.AsyncClient) -> None:
    fingerprints = set()
    for name in NAMES:
        body = await completion(http, model=name)
        assert body["model"] == name
        fingerprints.add(body["system_fingerprint"])
        for event in await chat(http, model=name, stream=True):
            assert event["model"] == name
            fingerprints.add(event["system_fingerprint"])
    assert len(fingerprints) == 1
    assert fingerprints.pop().startswith("fp_")


async def test_every_name_has_a_card(http: httpx.AsyncClient) -> None:
    cards = (await http.get("/v1/models")).json()["data"]
    assert [card["id"] for card in cards] == list(NAMES)
    for card in cards:
        assert card == (await http.get(f"/v1/models/{card['id']}")).json()
        assert (card["root"], card["parent"], card["owned_by"]) == ("/the/root", None, "penstock")
        assert card["max_model_len"] == MAX_MODEL_LEN
        assert card["permission"][0]["object"] == "model_permission"
        assert card["permission"][0]["allow_sampling"] is True


async def test_version(http: httpx.AsyncClient) -> None:
    assert (await http.get("/version")).json() == {"version": __version__}


# --- tokens ----------------------------------------------------------------------------------------------------------


async def test_tokenize_and_detokenize_undo_each_other(http: httpx.AsyncClient, tokenizer: ChatTokenizer) -> None:
    found = (await http.post("/tokenize", json={"prompt": TEXT, "return_token_strs": True})).json()
    ids = tokenizer.encode(TEXT)
    assert found["tokens"] == ids
    assert (found["count"], found["max_model_len"]) == (len(ids), MAX_MODEL_LEN)
    assert b"".join(map(piece, found["token_strs"])).decode() == TEXT
    assert (await http.post("/detokenize", json={"tokens": ids})).json() == {"prompt": TEXT}
    plain = (await http.post("/tokenize", json={"model": NAMES[1], "prompt": TEXT})).json()
    assert plain == {**found, "token_strs": None}


async def test_tokenize_a_conversation(http: httpx.AsyncClient, tokenizer: ChatTokenizer) -> None:
    found = (await http.post("/tokenize", json={"messages": CHAT})).json()
    assert found["tokens"] == tokenizer.encode_chat(CHAT)
    closed = (await http.post("/tokenize", json={"messages": CHAT, "add_generation_prompt": False})).json()
    assert closed["tokens"] == found["tokens"][:-1]
    shown = (await http.post("/detokenize", json={"tokens": found["tokens"]})).json()["prompt"]
    assert shown == "<|user|>turn the wheel<|assistant|>"


# --- the key ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": "sesame"},
        {"Authorization": "Basic sesame"},
        {"Authorization": b"Bearer sesam\xe9"},
        {"X-Api-Key": "sesame"},
    ],
)
async def test_without_the_key_nothing_but_health_and_metrics_answers(
    backend: ScriptedBackend, tokenizer: ChatTokenizer, headers: dict[str, Any]
) -> None:
    app = create_app(await ServingState.create(backend, tokenizer, NAMES), api_key="sesame")
    async with client_of(app, **headers) as http:
        asked = [
            await http.get("/v1/models"),
            await http.get("/version"),
            await http.get("/openapi.json"),
            await http.get("/nowhere"),
            await http.post("/tokenize", json={"prompt": "a"}),
            await http.post("/v1/completions", json={"model": NAMES[0], "prompt": "a"}),
            await http.post("/v1/chat/completions", content=b"not json"),
        ]
        for response in asked:
            assert response.status_code == 401
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
            assert "sesame" not in response.text
            assert response.headers["www-authenticate"] == "Bearer"
            assert "x-request-id" in response.headers
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/metrics")).status_code == 200
    assert backend.started.empty()
    async with client_of(app, Authorization="Bearer sesame") as http:
        assert (await http.get("/v1/models")).status_code == 200
        assert (await completion(http))["choices"][0]["text"]


# --- the real engine -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def demo_http() -> AsyncIterator[httpx.AsyncClient]:
    config = EngineConfig(
        model=str(DEMO_MODEL), dtype="float32", device="cpu", num_threads=1, max_num_batched_tokens=64
    )
    engine = AsyncEngine(Engine(config, make_ranks(config)))
    tokenizer = ChatTokenizer(config.tokenizer_source)
    async with client_of(create_app(await ServingState.create(engine, tokenizer, NAMES))) as client:
        yield client
    await engine.close()


async def test_a_harness_gets_the_models_own_loglikelihoods(demo_http: httpx.AsyncClient) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    tokenizer = ChatTokenizer(str(DEMO_MODEL))
    texts = ["import os\nimport sys\n", "def add(a, b):\n    return a + b\n" * 6, "x"]
    prompts = [tokenizer.encode(text) for text in texts]
    assert len(prompts[1]) > 64, "more than one chunk"
    body = await completion(demo_http, prompt=prompts, echo=True, max_tokens=1, logprobs=1, temperature=0, seed=1234)
    for prompt, text, choice in zip(prompts, texts, body["choices"], strict=True):
        assert choice["text"].startswith(text)
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        logprobs = choice["logprobs"]
        for i, token in enumerate(prompt[1:]):
            assert logprobs["token_logprobs"][i + 1] == pytest.approx(float(expected[i, token]), abs=1e-4)
            assert max(logprobs["top_logprobs"][i + 1].values()) == pytest.approx(float(expected[i].max()), abs=1e-4)
        assert logprobs["token_logprobs"][-1] == pytest.approx(float(expected[-1].max()), abs=1e-4)
        assert math.isclose(sum(map(math.exp, expected[-1].tolist())), 1.0, abs_tol=1e-3)


async def test_choices_of_the_demo_model_do_not_depend_on_their_number(demo_http: httpx.AsyncClient) -> None:
    asked = {"prompt": "def f(", "seed": 21, "max_tokens": 24, "frequency_penalty": 0.5}
    one, five = await completion(demo_http, **asked), await completion(demo_http, **asked, n=5)
    streamed = gathered(await completion(demo_http, **asked, n=5, stream=True))
    texts = [choice["text"] for choice in five["choices"]]
    assert len(set(texts)) == 5
    assert one["choices"][0]["text"] == texts[0]
    assert [choice["text"] for choice in streamed] == texts
