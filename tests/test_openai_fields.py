"""What else a request may ask for, and what answers say of themselves."""

from __future__ import annotations

import httpx

from penstock import __version__
from penstock.cluster.api.chat_tokenizer import ChatTokenizer
from penstock.workers.sampling_params import SamplingParams

from .openai_app import CHAT, NAMES, TEXT, chat, completion, piece, post_completion
from .scripted_backend import MAX_MODEL_LEN, ScriptedBackend


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


async def test_a_request_is_its_users_or_else_that_of_its_address(
    http: httpx.AsyncClient, backend: ScriptedBackend
) -> None:
    await completion(http, user="ada", n=2, temperature=1.0)
    await chat(http)
    await completion(http, user="ada" * 1_000_000)
    await completion(http, user="127.0.0.1")
    ada, again, address, long, in_disguise = backend.clients
    assert (ada, address) == (again, "127.0.0.1")
    assert len({ada, address, long, in_disguise}) == 4, "no user is taken for another, or for an address"
    assert len(long) == 64, "a name that is remembered is short"
    response = await post_completion(http, user=7)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "user")


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
    by_default = await completion(http, prompt=ids * 10, truncate_prompt_tokens=-1, max_tokens=None)
    assert by_default["usage"]["prompt_tokens"] == MAX_MODEL_LEN - 16


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
