"""The HTTP client: what it asks for arrives, and what comes is what it says."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from penstock.cluster.api.chat_tokenizer import ChatTokenizer
from penstock.cluster.api.metrics import engine_samples
from penstock.cluster.client.http_client import HttpClient, _all
from penstock.cluster.speculation.options import SpeculationOptions

from .scripted_backend import LoopbackServer, ScriptedBackend
from .served_backend import CHAT, MODEL, client, served, server

__all__ = ["client", "server"]


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_address_with_and_without_v1(server: LoopbackServer, suffix: str) -> None:
    client = HttpClient(server.url + suffix)
    assert client.models() == [MODEL]
    assert client.stats()["penstock:engine_up"] == 1.0
    client.close()


def test_generate_takes_every_kind_of_prompt(
    client: HttpClient, backend: ScriptedBackend, tokenizer: ChatTokenizer
) -> None:
    backend.script = tokenizer.encode("the stone ☕")
    for prompt in ["water", tokenizer.encode("water"), CHAT]:
        generation = client.generate(prompt, max_tokens=50)
        assert (generation.text, generation.finish_reason) == ("the stone ☕", "length")
        assert generation.num_output_tokens == len(backend.script)
        expected = tokenizer.encode_chat(CHAT) if prompt is CHAT else tokenizer.encode("water")
        assert generation.num_prompt_tokens == len(expected)
        assert generation.stats.seed == backend.requests[-1].seed


def test_every_sampling_parameter_arrives(client: HttpClient, backend: ScriptedBackend) -> None:
    given = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": 3,
        "max_tokens": 4,
        "stop": ("a", "b"),
        "stop_token_ids": (5, 6),
        "ignore_eos": True,
    }
    for prompt in ["water", CHAT]:
        client.generate(prompt, **given)
        assert {name: getattr(backend.requests[-1], name) for name in given} == given


@pytest.mark.parametrize("prompt", ["water", CHAT])
@pytest.mark.parametrize("prediction", ["the stone", {"type": "content", "content": "the stone"}])
def test_what_is_said_of_speculation_arrives(
    client: HttpClient, backend: ScriptedBackend, tokenizer: ChatTokenizer, prompt: Any, prediction: Any
) -> None:
    wish = {"mode": "fixed", "max_draft_len": 2}
    generation = client.generate(prompt, max_tokens=3, speculation=wish, prediction=prediction)
    assert backend.speculation == [SpeculationOptions("fixed", 2, tuple(tokenizer.encode("the stone")))]
    assert (generation.stats.phase, generation.stats.accepted_prediction_tokens) == ("off", 0)
    with client.stream(prompt, max_tokens=3, speculation={"mode": "off"}) as stream:
        list(stream)
    assert backend.speculation[1] == SpeculationOptions("off")
    for name, mistake in (("speculation.mode", {"speculation": {"mode": "x"}}), ("prediction", {"prediction": 5})):
        with pytest.raises(ValueError, match=f"^{name}: "):
            client.generate(prompt, **mistake)


@pytest.mark.parametrize("prompt", ["water", CHAT])
def test_stream_adds_up_to_the_generation(client: HttpClient, backend: ScriptedBackend, prompt: object) -> None:
    whole = client.generate(prompt, max_tokens=30, seed=1)  # type: ignore[arg-type]
    with client.stream(prompt, max_tokens=30, seed=1) as stream:  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="not been read"):
            _ = stream.generation
        pieces = list(stream)
    assert len(pieces) > 3
    assert "".join(pieces) == stream.generation.text == whole.text
    assert stream.generation == whole


@pytest.mark.parametrize("prompt", ["water", CHAT])
def test_async_twins_say_the_same(client: HttpClient, prompt: object) -> None:
    whole = client.generate(prompt, max_tokens=30, seed=1)  # type: ignore[arg-type]

    async def main() -> None:
        assert await client.amodels() == [MODEL]
        assert await client.agenerate(prompt, max_tokens=30, seed=1) == whole  # type: ignore[arg-type]
        async with client.astream(prompt, max_tokens=30, seed=1) as stream:  # type: ignore[arg-type]
            pieces = [piece async for piece in stream]
        assert "".join(pieces) == whole.text
        assert stream.generation == whole
        assert await client.astats() == client.stats()
        await client.aclose()

    asyncio.run(main())


def test_a_client_outlives_an_event_loop(client: HttpClient) -> None:
    first, second = (asyncio.run(client.agenerate("water", temperature=0)) for _ in range(2))
    assert first.text == second.text


def test_stats_have_the_engines_names(client: HttpClient, backend: ScriptedBackend) -> None:
    stats = client.stats()
    expected = engine_samples(asyncio.run(backend.stats()))
    assert expected['penstock:spec_decode_num_accepted_tokens_per_pos_total{position="0"}'] == 5.0
    assert {name: stats[name] for name in expected} == expected


def test_closing_a_stream_aborts_the_request(
    client: HttpClient, backend: ScriptedBackend, tokenizer: ChatTokenizer
) -> None:
    aborted = threading.Event()
    backend.aborted.put_nowait = lambda _: aborted.set()  # type: ignore[method-assign]
    backend.script = tokenizer.encode("turns the wheel")
    backend.gate = asyncio.Semaphore(1)
    with client.stream("water", max_tokens=50) as stream:
        next(stream)
    assert aborted.wait(10)


def test_many_outputs_come_prompt_by_prompt(client: HttpClient, tokenizer: ChatTokenizer) -> None:
    texts = ["water", "the stone"]
    for prompts in (texts, [tokenizer.encode(text) for text in texts], [CHAT, CHAT], [CHAT, "water"]):
        outputs = client.generate_many(prompts, n=3, seed=5, max_tokens=9)
        assert [output.choice for output in outputs[:3]] == [0, 1, 2]
        assert len(outputs) == 6
        assert all(output.num_output_tokens == len(output.token_ids or []) == 9 for output in outputs)
        assert len({output.text for output in outputs[:3]}) == 3
        for i, prompt in enumerate(prompts):
            alone = client.generate(prompt, seed=5, max_tokens=9)  # type: ignore[arg-type]
            assert (alone.text, alone.num_prompt_tokens) == (outputs[3 * i].text, outputs[3 * i].num_prompt_tokens)
        assert asyncio.run(many_async(client, prompts)) == [(o.text, o.token_ids) for o in outputs]
    assert client.generate_many([]) == []


async def many_async(client: HttpClient, prompts: list) -> list:
    outputs = await client.agenerate_many(prompts, n=3, seed=5, max_tokens=9)
    await client._client().close()
    return [(output.text, output.token_ids) for output in outputs]


async def test_of_requests_side_by_side_one_that_is_refused_aborts_the_others() -> None:
    sent, aborted = asyncio.Event(), asyncio.Event()

    async def unanswered() -> None:
        sent.set()
        try:
            await asyncio.Event().wait()
        finally:
            aborted.set()

    async def refused() -> None:
        await sent.wait()
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        await _all([unanswered(), refused()])
    await asyncio.wait_for(aborted.wait(), 10)


def test_one_output_is_one(client: HttpClient) -> None:
    for call in (client.generate, client.stream):
        with pytest.raises(ValueError, match=r"^n: one output"):
            call("water", n=2)
    with pytest.raises(ValueError, match=r"^choice: not a field"):
        client.generate("water", choice=1)


@pytest.mark.parametrize("prompt", ["water", CHAT])
def test_logprobs_come_as_words(client: HttpClient, tokenizer: ChatTokenizer, prompt: object) -> None:
    asked = {"max_tokens": 9, "seed": 2, "logprobs": 2}
    whole = client.generate(prompt, **asked, prompt_logprobs=1)  # type: ignore[arg-type]
    assert whole.token_ids is not None
    assert whole.logprobs is not None
    assert [entry.token for entry in whole.logprobs] == [tokenizer.token_texts.to_text(i) for i in whole.token_ids]
    assert [entry.logprob for entry in whole.logprobs] == [-1.0 - i / 1024 for i in whole.token_ids]
    assert [[top.logprob for top in entry.top_logprobs] for entry in whole.logprobs] == [[-0.5, -0.51]] * 9
    assert whole.prompt_logprobs is not None
    first, *others = whole.prompt_logprobs
    assert first.logprob is None
    assert all(entry.logprob == -1.0 - (entry.token_id or 0) / 1024 for entry in others)
    with client.stream(prompt, **asked) as stream:  # type: ignore[arg-type]
        for _ in stream:
            pass
    assert stream.generation.logprobs == whole.logprobs


def test_the_key_is_sent(backend: ScriptedBackend, tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(backend, tokenizer, api_key="sesame") as server:
        monkeypatch.delenv("PENSTOCK_API_KEY", raising=False)
        stranger = HttpClient(server.url, max_retries=0)
        with pytest.raises(PermissionError, match="API key"):
            stranger.models()
        assert stranger.stats()["penstock:engine_up"] == 1.0
        given = HttpClient(server.url, api_key="sesame")
        assert given.models() == [MODEL]
        monkeypatch.setenv("PENSTOCK_API_KEY", "sesame")
        found = HttpClient(server.url)
        assert found.generate("water", max_tokens=2).num_output_tokens == 2
        for client in (stranger, given, found):
            client.close()
