"""What the endpoints answer when all is well, and what an engine that cannot serve makes of them."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

from penstock.cluster.api import prompts
from penstock.cluster.api.chat_tokenizer import ChatTokenizer
from penstock.cluster.api.openai_api import create_app
from penstock.cluster.api.serving_state import ServingState

from .openai_app import CHAT, MODEL, post_chat, post_completion, served, sse
from .scripted_backend import MAX_MODEL_LEN, ScriptedBackend

STATS = {
    *("seed", "steps", "draft_tokens", "accepted_tokens", "acceptance", "mean_draft_len", "phase", "utility"),
    *("baseline_s", "accepted_prediction_tokens", "rejected_prediction_tokens", "tokens_per_s", "ttft_s", "queue_s"),
    *("budgeted_rows", "kept_weight", "lossy"),
}


# --- answers -------------------------------------------------------------------------------------------------------


async def test_completion_is_the_decoded_script(
    http: httpx.AsyncClient, backend: ScriptedBackend, tokenizer: ChatTokenizer
) -> None:
    backend.script = tokenizer.encode("turns the wheel ☕ 水車")
    body = (await post_completion(http, max_tokens=100)).json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {"index": 0, "text": "turns the wheel ☕ 水車", "logprobs": None, "finish_reason": "length"}
    ]
    prompt, output = len(tokenizer.encode("the water")), len(backend.script)
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "completion_tokens_details": {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0},
    }
    assert set(body["penstock"]) == STATS
    assert (body["penstock"]["acceptance"], body["penstock"]["queue_s"]) == (0.5, 0.25)


async def test_chat_is_the_decoded_script(
    http: httpx.AsyncClient, backend: ScriptedBackend, tokenizer: ChatTokenizer
) -> None:
    backend.script = [*tokenizer.encode("café"), 0]
    backend.stop_token_id = 0
    body = (await post_chat(http)).json()
    message = {"role": "assistant", "content": "café", "refusal": None}
    assert body["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"]["completion_tokens"] == len(backend.script)
    assert body["usage"]["prompt_tokens"] == len(tokenizer.encode_chat(CHAT))


async def test_an_ordinary_stop_token_is_not_text(
    http: httpx.AsyncClient, backend: ScriptedBackend, tokenizer: ChatTokenizer
) -> None:
    *text, stop = tokenizer.encode("the stone!")
    backend.script, backend.stop_token_id = [*text, stop], stop
    body = (await post_completion(http, stop_token_ids=[stop])).json()
    assert body["choices"][0]["text"] == tokenizer.decode(text)
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == len(text) + 1


@pytest.mark.parametrize("endpoint", [post_completion, post_chat])
@pytest.mark.parametrize("fields", [{}, {"temperature": 0}, {"stop": ["wheel"]}, {"seed": 5}])
async def test_stream_and_whole_say_the_same(
    http: httpx.AsyncClient, backend: ScriptedBackend, tokenizer: ChatTokenizer, endpoint: Any, fields: dict[str, Any]
) -> None:
    backend.script = tokenizer.encode("naïve café ☕ turns the wheel 水車")
    options = {"include_usage": True}
    whole = (await endpoint(http, max_tokens=60, **fields)).json()
    events = sse(await endpoint(http, max_tokens=60, stream=True, stream_options=options, **fields))

    assert events.pop() == "[DONE]"
    if endpoint is post_chat:
        for event in events:
            assert ChatCompletionChunk.model_validate(event).model_dump(exclude_unset=True) == event
    usage = events.pop()
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert set(usage["penstock"]) == STATS
    choices = [event["choices"][0] for event in events]
    if endpoint is post_chat:
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
    body = (await post_completion(http, max_tokens=100, stop=["wheel", "stone"])).json()
    assert body["choices"][0]["text"] == "the water turns the "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == len(tokenizer.encode("the water turns the wheel"))
    assert body["penstock"]["acceptance"] is None, "only the engine knows, and it was not asked"
    assert body["penstock"]["ttft_s"] >= 0
    assert backend.aborted.get_nowait() == backend.found_stop[0], "so that the engine counts it as a stop"


async def test_seed_is_drawn_and_reported(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    first, second = (await post_completion(http)).json(), (await post_completion(http)).json()
    drawn = [first["penstock"]["seed"], second["penstock"]["seed"]]
    assert drawn == [sampling.seed for sampling in backend.requests]
    assert drawn[0] != drawn[1]
    assert all(0 <= seed < 2**63 for seed in drawn)
    again = (await post_completion(http, seed=drawn[0])).json()
    assert again["choices"][0]["text"] == first["choices"][0]["text"]
    greedy = (await post_completion(http, temperature=0)).json()
    assert greedy["penstock"]["seed"] is None


async def test_limits_when_none_is_given(
    http: httpx.AsyncClient, backend: ScriptedBackend, tokenizer: ChatTokenizer
) -> None:
    await post_completion(http)
    await post_completion(http, prompt=[5] * (MAX_MODEL_LEN - 3))
    await post_chat(http)
    room = MAX_MODEL_LEN - len(tokenizer.encode_chat(CHAT))
    assert [sampling.max_tokens for sampling in backend.requests] == [16, 3, room]


async def test_prompt_may_fill_the_context_exactly(http: httpx.AsyncClient) -> None:
    assert (await post_completion(http, prompt=[5] * (MAX_MODEL_LEN - 4), max_tokens=4)).status_code == 200


async def test_long_prompts_are_tokenized_alike(
    http: httpx.AsyncClient, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    inline = (await post_chat(http, temperature=0)).json()
    monkeypatch.setattr(prompts, "_INLINE_CHARS", 0)
    assert (await post_chat(http, temperature=0)).json()["choices"] == inline["choices"]


async def test_text_parts_are_one_text(http: httpx.AsyncClient) -> None:
    parts = [{"type": "text", "text": "turn the"}, {"type": "text", "text": " wheel"}]
    in_parts = await post_chat(http, temperature=0, messages=[{"role": "user", "content": parts}])
    assert in_parts.json()["choices"] == (await post_chat(http, temperature=0)).json()["choices"]


async def test_models(http: httpx.AsyncClient) -> None:
    listed = (await http.get("/v1/models")).json()
    assert listed["object"] == "list"
    card = listed["data"][0]
    assert card == (await http.get(f"/v1/models/{MODEL}")).json()
    assert (card["id"], card["object"], card["max_model_len"]) == (MODEL, "model", MAX_MODEL_LEN)
    assert card["penstock"] == {"expert_budget": None, "lossy": False}


async def test_request_id_is_honoured_or_made(http: httpx.AsyncClient) -> None:
    given = await http.get("/v1/models", headers={"X-Request-Id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    made = {(await post_completion(http)).headers["x-request-id"] for _ in range(2)}
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
            await post_completion(http),
            await post_chat(http),
        ]:
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "engine_starting"
            assert int(response.headers["retry-after"]) > 0
        assert "penstock:engine_up 0.0" in (await http.get("/metrics")).text
        app.state.serving = await ServingState.create(ScriptedBackend(tokenizer.vocab_size), tokenizer, MODEL)
        assert (await http.get("/health")).status_code == 200
        assert (await post_completion(http)).status_code == 200


async def test_dead_engine_answers_503(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    assert (await http.get("/health")).status_code == 200
    backend.dead = True
    for response in [await http.get("/health"), await post_completion(http), await post_chat(http, stream=True)]:
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_dead"
        assert "rank 1 is gone" in response.json()["error"]["message"]
        assert "retry-after" in response.headers
    assert "penstock:engine_up 0.0" in (await http.get("/metrics")).text


async def test_metrics_count_what_was_served(http: httpx.AsyncClient, backend: ScriptedBackend) -> None:
    await post_completion(http, max_tokens=5)
    await post_completion(http, max_tokens=5, frobnicate=1, wibble=2, user="u")
    await post_completion(http, temperature=9)
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
