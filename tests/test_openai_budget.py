"""A server with a budget of experts over the API: what requests may say, and what answers say of themselves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from penstock.cluster.api.chat_tokenizer import ChatTokenizer
from penstock.cluster.api.generation import GenerationStats
from penstock.cluster.api.metrics import parse_samples
from penstock.cluster.api.openai_api import create_app
from penstock.cluster.api.serving_state import ServingState
from penstock.cluster.client.llm import make_ranks
from penstock.cluster.client.prompt_stream import stream_prompt
from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.async_engine import AsyncEngine
from penstock.cluster.engine.engine import Engine
from penstock.cluster.speculation.options import AUTO, SpeculationOptions

from .openai_app import MODEL, chat, client_of, completion, served
from .scripted_backend import ScriptedBackend

DEMO = str(Path(__file__).parents[1] / "demo" / "model")
BUDGET = "experts=5,scope=request"
OPTIONS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "num_threads": 1, "max_model_len": 512, "draft_len": 7}
ASKED: dict[str, Any] = {"prompt": "class Parser:\n    def parse(self, text):\n", "temperature": 0, "max_tokens": 40}


@pytest.mark.parametrize("endpoint", [completion, chat])
async def test_the_field_reaches_the_engine(http: httpx.AsyncClient, backend: ScriptedBackend, endpoint: Any) -> None:
    await endpoint(http)
    await endpoint(http, expert_budget="auto")
    await endpoint(http, expert_budget="off", speculation={"mode": "fixed", "max_draft_len": 5})
    await endpoint(http, expert_budget=None)
    assert backend.speculation == [AUTO, AUTO, SpeculationOptions("fixed", 5, expert_budget="off"), AUTO]
    assert not backend.unknown_fields


@pytest.mark.parametrize("value", ["on", "", 5, ["off"]])
async def test_a_bad_value_is_named(http: httpx.AsyncClient, value: Any) -> None:
    answer = await http.post("/v1/completions", json={"model": MODEL, "prompt": "a", "expert_budget": value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "expert_budget"


async def test_clients_send_it(backend: ScriptedBackend, tokenizer: ChatTokenizer) -> None:
    from penstock.cluster.client.http_client import HttpClient

    async with served(backend, tokenizer) as sdk:
        client = HttpClient(str(sdk.base_url))
        generation = await client.agenerate("a", max_tokens=2, expert_budget="off")
        assert not generation.stats.lossy
        with pytest.raises(ValueError, match="expert_budget: 'x' is not one of auto, off"):
            await client.agenerate("a", expert_budget="x")
        await client.aclose()
    assert backend.speculation == [SpeculationOptions(expert_budget="off")]


async def test_the_handle_sends_it(backend: ScriptedBackend, tokenizer: ChatTokenizer) -> None:
    async for _ in stream_prompt(backend, tokenizer, 64, "a", {"max_tokens": 2, "expert_budget": "off"}):
        pass
    assert backend.speculation == [SpeculationOptions(expert_budget="off")]


@pytest.fixture(scope="module")
async def demo() -> AsyncIterator[httpx.AsyncClient]:
    config = EngineConfig(model=DEMO, **OPTIONS, expert_budget=BUDGET)
    engine = AsyncEngine(Engine(config, make_ranks(config)))
    state = await ServingState.create(engine, ChatTokenizer(DEMO), MODEL, budgets=config.budgets)
    async with client_of(create_app(state)) as client:
        yield client
    await engine.close()


async def test_answers_say_whether_they_are_lossy(demo: httpx.AsyncClient) -> None:
    exact = await completion(demo, **ASKED, expert_budget="off")
    plain = await completion(demo, **ASKED, speculation={"mode": "off"})
    lossy = await completion(demo, **ASKED)
    assert exact["choices"][0]["text"] == plain["choices"][0]["text"] != lossy["choices"][0]["text"]
    for answer in (exact, plain):
        found = answer["penstock"]
        assert (found["lossy"], found["budgeted_rows"], found["kept_weight"]) == (False, 0, None)
    assert exact["penstock"]["draft_tokens"] > 0
    found = lossy["penstock"]
    assert found["lossy"]
    assert found["budgeted_rows"] > found["draft_tokens"]
    assert 0 < found["kept_weight"] < 1


async def test_a_stop_string_hides_no_loss(demo: httpx.AsyncClient) -> None:
    whole = (await completion(demo, **ASKED))["choices"][0]["text"]
    stopped = await completion(demo, **ASKED, stop=whole[12:18])
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert stopped["penstock"]["lossy"]
    assert stopped["penstock"]["budgeted_rows"] > 0
    # Known if the engine has ended by itself before the string is seen
    kept = stopped["penstock"]["kept_weight"]
    assert kept is None or 0 < kept < 1


async def test_several_choices_are_lossy_together(demo: httpx.AsyncClient) -> None:
    answer = await completion(demo, **ASKED, n=2)
    parts = [choice["penstock"] for choice in answer["choices"]]
    found = answer["penstock"]
    assert found["lossy"]
    assert found["budgeted_rows"] == sum(part["budgeted_rows"] for part in parts)
    assert found["kept_weight"] == pytest.approx(parts[0]["kept_weight"])


async def test_the_card_and_the_metrics_say_so(demo: httpx.AsyncClient) -> None:
    card = (await demo.get(f"/v1/models/{MODEL}")).json()
    assert card["penstock"] == {"expert_budget": BUDGET, "lossy": True}
    before = parse_samples((await demo.get("/metrics")).text)
    found = (await completion(demo, **ASKED))["penstock"]
    after = parse_samples((await demo.get("/metrics")).text)

    def moved(name: str) -> float:
        return after[f"penstock:{name}"] - before[f"penstock:{name}"]

    rows = moved("expert_budgeted_rows_total")
    assert rows == 4 * found["budgeted_rows"], "the model has four layers"
    assert moved("expert_budget_kept_weight_total") / rows == pytest.approx(found["kept_weight"])


async def test_a_budget_that_can_change_nothing_is_not_lossy(
    backend: ScriptedBackend, tokenizer: ChatTokenizer
) -> None:
    config = EngineConfig(model="m", expert_budget="coverage=1")
    state = await ServingState.create(backend, tokenizer, MODEL, budgets=config.budgets)
    assert state.expert_budget is None
    plain = await ServingState.create(backend, tokenizer, MODEL)
    assert state.system_fingerprint == plain.system_fingerprint
    lossy = EngineConfig(model="m", expert_budget="coverage=0.5")
    state = await ServingState.create(backend, tokenizer, MODEL, budgets=lossy.budgets)
    assert state.expert_budget == "coverage=0.5"
    assert state.system_fingerprint != plain.system_fingerprint


def stats_of(rows: int, kept: float | None) -> GenerationStats:
    fields: dict[str, Any] = dict.fromkeys(GenerationStats.__dataclass_fields__, 0)
    return GenerationStats(**{**fields, "budgeted_rows": rows, "kept_weight": kept, "lossy": rows > 0})


def test_means_over_choices_weigh_their_rows() -> None:
    assert GenerationStats.together([stats_of(10, 0.9), stats_of(0, None), stats_of(30, 0.5)]).kept_weight == 0.6
    assert GenerationStats.together([stats_of(10, 0.9), stats_of(5, None)]).kept_weight is None
    assert GenerationStats.together([stats_of(0, None), stats_of(0, None)]).kept_weight is None
