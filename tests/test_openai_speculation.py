"""What requests may say of drafting over the API and its clients, and what answers say of what came of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

import penstock
from penstock.cluster.api.chat_tokenizer import ChatTokenizer
from penstock.cluster.api.openai_api import create_app
from penstock.cluster.api.serving_state import ServingState
from penstock.cluster.api.text_stream import RequestText
from penstock.cluster.client.llm import make_ranks
from penstock.cluster.client.prompt_stream import stream_prompt
from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.async_engine import AsyncEngine
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.output import PredictionDraft, RequestOutput
from penstock.cluster.speculation.options import AUTO, SpeculationOptions
from penstock.workers.sampling_params import SamplingParams

from .openai_app import MODEL, chat, client_of, completion, served
from .scripted_backend import ScriptedBackend

DEMO = str(Path(__file__).parents[1] / "demo" / "model")
OPTIONS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "num_threads": 1, "max_model_len": 512}
PROMPT = "import os\nimport sys\n"
ASKED: dict[str, Any] = {"prompt": PROMPT, "temperature": 0, "max_tokens": 40}


def content(text: Any) -> dict[str, Any]:
    return {"type": "content", "content": text}


# --- to the engine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("endpoint", [completion, chat])
async def test_the_fields_reach_the_engine(
    http: httpx.AsyncClient, backend: ScriptedBackend, tokenizer: ChatTokenizer, endpoint: Any
) -> None:
    tokens = tuple(tokenizer.encode("the stone ☕"))
    parts = [{"type": "text", "text": "the st"}, {"type": "text", "text": "one ☕"}]
    await endpoint(http)
    await endpoint(http, speculation={}, prediction=content(""))
    await endpoint(http, speculation={"mode": "fixed", "max_draft_len": 5}, prediction=content("the stone ☕"))
    await endpoint(http, speculation={"mode": "off", "max_draft_len": None}, prediction=content(parts), n=2)
    assert backend.speculation == [
        AUTO,
        AUTO,
        SpeculationOptions("fixed", 5, tokens),
        *[SpeculationOptions("off", None, tokens)] * 2,
    ]
    assert not backend.unknown_fields


async def test_openais_own_client_sends_a_prediction(backend: ScriptedBackend, tokenizer: ChatTokenizer) -> None:
    async with served(backend, tokenizer) as client:
        answer = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "turn"}],
            max_tokens=5,
            prediction={"type": "content", "content": "the stone"},
            extra_body={"speculation": {"max_draft_len": 2}},
        )
    assert backend.speculation == [SpeculationOptions("auto", 2, tuple(tokenizer.encode("the stone")))]
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens == 0
    assert answer.usage.completion_tokens_details.reasoning_tokens is None


@pytest.mark.parametrize("prediction", ["the stone", content("the stone")])
async def test_a_client_in_the_cluster_says_the_same(
    backend: ScriptedBackend, tokenizer: ChatTokenizer, prediction: Any
) -> None:
    params = {"max_tokens": 3, "speculation": {"mode": "fixed", "max_draft_len": 1}, "prediction": prediction}
    deltas = [delta async for delta in stream_prompt(backend, tokenizer, 200, "the water", params)]
    assert deltas[-1].generation is not None
    assert backend.speculation == [SpeculationOptions("fixed", 1, tuple(tokenizer.encode("the stone")))]


@pytest.mark.parametrize("size", [1, 2, 9])
@pytest.mark.parametrize("stop", [None, "stone", "wheel", "water"])
def test_tokens_behind_a_stop_string_were_not_predicted_however_they_arrive(
    tokenizer: ChatTokenizer, stop: str | None, size: int
) -> None:
    """Steps of three tokens, two of them drafted of four, come ``size`` at a time."""
    tokens = tokenizer.encode("the stone turns the wheel and goes on, the water turns it")
    outputs = []
    for offset in range(0, len(tokens), 3):
        step = RequestOutput(
            "r", offset, tokens[offset : offset + 3], prediction_drafts=[PredictionDraft(offset, 4, 2)]
        )
        if len(outputs) and len(outputs[-1].token_ids) < 3 * size:
            outputs[-1] = outputs[-1].followed_by(step)
        else:
            outputs.append(step)
    text = RequestText(tokenizer, [5], SamplingParams(max_tokens=100, stop=() if stop is None else (stop,)))
    generation = None
    for output in outputs:
        last = output is outputs[-1] and stop is None
        generation = text.take(replace(output, finish_reason="length" if last else None)).generation
        if generation is not None:
            break
    assert generation is not None
    num_tokens = generation.num_output_tokens
    shown = [min(2, num_tokens - offset) for offset in range(0, num_tokens, 3)]
    stats = generation.stats
    assert (stats.accepted_prediction_tokens, stats.rejected_prediction_tokens) == (
        sum(shown),
        4 * len(shown) - sum(shown),
    )


# --- what came of it -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def demo() -> AsyncIterator[httpx.AsyncClient]:
    config = EngineConfig(model=DEMO, **OPTIONS, draft_len=4)
    engine = AsyncEngine(Engine(config, make_ranks(config)))
    tokenizer = ChatTokenizer(DEMO)
    async with client_of(create_app(await ServingState.create(engine, tokenizer, MODEL))) as client:
        yield client
    await engine.close()


def details(answer: Any) -> tuple[int, int]:
    found = answer["usage"]["completion_tokens_details"]
    assert set(found) == {"accepted_prediction_tokens", "rejected_prediction_tokens"}
    return found["accepted_prediction_tokens"], found["rejected_prediction_tokens"]


async def test_usage_counts_what_a_prediction_was_worth(demo: httpx.AsyncClient) -> None:
    plain = await completion(demo, **ASKED, speculation={"mode": "off"})
    text = plain["choices"][0]["text"]
    assert details(plain) == (0, 0)
    assert (plain["penstock"]["phase"], plain["penstock"]["draft_tokens"]) == ("off", 0)
    right = await completion(demo, **ASKED, prediction=content(text))
    edited = await completion(demo, **ASKED, prediction=content(text[:30] + "~~~~~~~~" + text[38:]))
    wrong = await completion(demo, **ASKED, prediction=content("☕☕☕☕"))
    unpredicted = await completion(demo, **ASKED)
    for answer in (right, edited, wrong, unpredicted):
        assert answer["choices"][0]["text"] == text
        stats = answer["penstock"]
        assert (stats["accepted_prediction_tokens"], stats["rejected_prediction_tokens"]) == details(answer)
        assert sum(details(answer)) <= stats["draft_tokens"]
        assert stats["phase"] == "fixed"
        assert stats["mean_draft_len"] == stats["draft_tokens"] / stats["steps"]
    assert details(right)[0] > 20
    assert details(edited)[0] > 5
    assert details(edited)[1] > 0
    assert details(wrong) == details(unpredicted) == (0, 0)
    assert right["penstock"]["steps"] < unpredicted["penstock"]["steps"]


async def test_a_stream_counts_the_same(demo: httpx.AsyncClient) -> None:
    text = (await completion(demo, **ASKED))["choices"][0]["text"]
    asked = {**ASKED, "prediction": content(text[:25] + "~~~~" + text[29:])}
    whole = await completion(demo, **asked)
    *_, last, usage = await completion(demo, **asked, stream=True, stream_options={"include_usage": True})
    assert usage["usage"] == whole["usage"]
    for name in ("draft_tokens", "mean_draft_len", "phase", "utility", "accepted_prediction_tokens"):
        assert last["penstock"][name] == usage["penstock"][name] == whole["penstock"][name]


async def test_every_choice_counts(demo: httpx.AsyncClient) -> None:
    asked = {**ASKED, "temperature": 0.3, "seed": 4}
    text = (await completion(demo, **asked))["choices"][0]["text"]
    alone = await completion(demo, **asked, prediction=content(text))
    both = await completion(demo, **asked, prediction=content(text), n=2)
    parts = [choice["penstock"] for choice in both["choices"]]
    for name, index in (("accepted_prediction_tokens", 0), ("rejected_prediction_tokens", 1)):
        assert sum(part[name] for part in parts) == details(both)[index]
        assert parts[0][name] == alone["penstock"][name], "beside others a request is drafted for as it is alone"


async def test_a_prediction_is_the_answer_of_a_chat_alone(demo: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "851 - 72"}]
    asked = {"messages": messages, "temperature": 0, "max_tokens": 60}
    text = (await chat(demo, **asked))["choices"][0]["message"]["content"]
    answer = await chat(demo, **asked, prediction=content(text))
    assert answer["choices"][0]["message"]["content"] == text
    assert details(answer)[0] > 5


@pytest.fixture(scope="module")
def llm() -> Iterator[penstock.LLM]:
    with penstock.LLM(DEMO, **OPTIONS, speculation="cascade") as made:
        yield made


def test_the_object_without_a_server_takes_both(llm: penstock.LLM) -> None:
    sampling: dict[str, Any] = {"temperature": 0, "max_tokens": 40}
    [plain] = llm.generate(PROMPT, speculation={"mode": "off"}, **sampling)
    assert (plain.stats.num_draft_tokens, plain.stats.phase) == (0, "off")
    for prediction in (plain.text, content(plain.text)):
        wish = {"mode": "fixed", "max_draft_len": 3}
        [output] = llm.generate(PROMPT, speculation=wish, prediction=prediction, **sampling)
        assert output.token_ids == plain.token_ids
        assert output.stats.num_accepted_prediction_tokens > 20
        assert output.stats.phase == "fixed"
    [measured] = llm.generate(PROMPT, **sampling)
    assert measured.stats.phase in ("baseline", "test", "set", "disabled")
    assert measured.stats.baseline_s is not None
    assert measured.stats.utility is not None
    assert 0 < measured.stats.baseline_s < 10
    assert measured.stats.utility > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"speculation": {"mode": "fast"}}, "speculation.mode: 'fast' is not one of auto, off, fixed"),
        ({"speculation": "off"}, "speculation: expected a mapping of mode and max_draft_len, got 'off'"),
        ({"prediction": 5}, "prediction: expected text or a mapping of type and content, got 5"),
        ({"prediction": {"content": "a"}}, "prediction.type: None is not supported; valid: 'content'"),
        ({"prediction": "~" * 5000}, "prediction.content: "),
    ],
)
def test_mistakes_are_named(llm: penstock.LLM, given: dict[str, Any], message: str) -> None:
    steps = llm.stats().num_steps
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the message is compared whole
        llm.generate("a", max_tokens=2, **given)
    assert str(caught.value).startswith(message)
    assert llm.stats().num_steps == steps
