"""What requests say of their own draft lengths: what they get, side by side and on two ranks, and that off is off."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penstock.cluster.config import EngineConfig
from penstock.cluster.engine import engine as engine_module
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.ranks import Ranks
from penstock.cluster.speculation.options import SpeculationOptions
from penstock.cluster.transport.process_ranks import ProcessRanks
from penstock.workers.plan import StepPlan

from .recorded_wishes import GREEDY, OFF, PROMPT, PROMPTS, Recording, predicting, real_config, run, scripted
from .scripted_ranks import ScriptedRanks, continuation

# --- draft lengths ---------------------------------------------------------------------------------------------------


def drafted(plan: StepPlan) -> dict[int, int]:
    """Return how many tokens each decoding request drafts, by its key."""
    return {
        part.request_id: part.num_sampled_rows - 1
        for rank in plan.ranks
        for part in rank.requests
        if part.first_sampled_row == 0
    }


@pytest.mark.parametrize("policy", ["fixed", "cascade", "shadow"])
def test_one_request_is_off_while_its_batch_mate_drafts(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    factory = engine_module.drafter_factory

    def spying(name: str) -> Any:
        make = factory(name)
        return lambda context, store: made.append(context.num_prompt_tokens) or make(context, store)

    monkeypatch.setattr(engine_module, "drafter_factory", spying)
    engine = scripted(speculation=policy)
    on, off = [*PROMPT, *PROMPT], [5, 5, 5, 5]
    outputs = run(engine, [(on, predicting(*continuation(on, 40))), (off, OFF)], replace(GREEDY, max_tokens=40))
    assert [output.token_ids for output in outputs] == [continuation(on, 40), continuation(off, 40)]
    assert made == [len(on)], "no drafter is made, and so none called, for the request that is off"
    assert all(not drafted(plan).get(1, 0) for plan in engine.ranks.plans)  # type: ignore[attr-defined]
    first, second = (output.stats for output in outputs)
    assert first is not None
    assert second is not None
    assert (second.phase, second.num_draft_tokens) == ("off", 0)
    assert first.phase != "off"
    if policy == "fixed":
        assert first.num_draft_tokens > 0


@pytest.mark.parametrize(
    ("speculation", "wanted"),
    [
        (SpeculationOptions("fixed", 1), 1),
        (SpeculationOptions("fixed", 2), 2),
        (SpeculationOptions("fixed"), 3),
        (SpeculationOptions("fixed", 64), 3),
        (SpeculationOptions("auto", 2), 2),
        (SpeculationOptions("auto"), 3),
        (SpeculationOptions("auto", 0), 0),
    ],
)
def test_a_request_can_lower_its_draft_length_and_not_raise_it(speculation: SpeculationOptions, wanted: int) -> None:
    engine = scripted()
    wish = replace(speculation, prediction_token_ids=tuple(continuation(PROMPT, 20)))
    [output] = run(engine, [(PROMPT, wish)])
    assert output.token_ids == continuation(PROMPT, 20)
    assert max(length for plan in engine.ranks.plans for length in drafted(plan).values()) == wanted  # type: ignore[attr-defined]
    assert output.stats is not None
    assert output.stats.phase == ("fixed" if wanted else "off")


def test_a_fixed_length_outranks_the_controller() -> None:
    wish = SpeculationOptions("fixed", 2, tuple(continuation(PROMPT, 20)))
    engine = scripted(speculation="cascade")  # which would measure plain steps first
    [output] = run(engine, [(PROMPT, wish)])
    decoding = [length for plan in engine.ranks.plans for length in drafted(plan).values()]  # type: ignore[attr-defined]
    assert decoding[:5] == [2] * 5
    assert output.stats is not None
    assert output.stats.phase == "fixed"


def test_what_a_policy_measured_is_reported() -> None:
    ticks = iter(range(10**6))
    config = EngineConfig(model="m", block_size=4, speculation="cascade")
    engine = Engine(config, ScriptedRanks([40], 4, 64), clock=lambda: float(next(ticks)))
    [output] = run(engine, [(PROMPT, SpeculationOptions())], replace(GREEDY, max_tokens=40))
    assert output.stats is not None
    assert output.stats.phase in ("baseline", "test", "set", "disabled")
    assert output.stats.baseline_s is not None
    assert output.stats.baseline_s >= 1
    assert output.stats.utility is not None
    assert output.stats.utility > 0
    histogram = engine.stats().spec_decode_utility
    assert (sum(histogram.counts), histogram.total) == (1, output.stats.utility)


# --- off is off ------------------------------------------------------------------------------------------------------

LENGTH_0 = [OFF, SpeculationOptions("fixed", 0), SpeculationOptions("off", 0), SpeculationOptions("auto", 0)]


def refuse_drafters(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(context: Any, store: Any) -> Any:
        raise AssertionError("a drafter was called")

    monkeypatch.setattr(engine_module, "drafter_factory", lambda name: refuse)


def check_off_is_off(ranks: Ranks, config: EngineConfig, prompts: Sequence[list[int]]) -> Recording:
    """Assert that all ways to say off plan the same steps and run the same collectives; return what one did."""

    def steps(wish: SpeculationOptions, **changes: Any) -> Recording:
        recording = Recording(ranks)
        engine = Engine(replace(config, **changes), recording)
        engine.add_request("late", prompts[0], GREEDY, wish)
        engine.step()
        run(engine, [(prompt, replace(wish, prediction_token_ids=(5, 6, 7))) for prompt in prompts])
        return recording

    expected = steps(SpeculationOptions(), speculation="off", draft_len=None)
    assert all(length == 0 for plan in expected.plans for length in drafted(plan).values())
    lengths = {"fixed": config.draft_len, "cascade": None, "shadow": None}
    others = [
        steps(wish, speculation=policy, draft_len=draft_len)
        for wish in LENGTH_0
        for policy, draft_len in lengths.items()
    ]
    for other in [*others, steps(SpeculationOptions(), speculation="fixed", draft_len=0)]:
        assert other.plans == expected.plans
        assert other.collectives == expected.collectives
        assert [[r.counts for r in s.ranks] for s in other.results] == [
            [r.counts for r in s.ranks] for s in expected.results
        ]
    return expected


@pytest.fixture(scope="module")
def two_ranks(checkpoint: Callable[[str], Path]) -> Iterator[tuple[ProcessRanks, EngineConfig]]:
    config = real_config(checkpoint("qwen3_moe"), 2)
    ranks = ProcessRanks(config)
    yield ranks, config
    ranks.close()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_off_is_off_to_the_planner(num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_drafters(monkeypatch)
    config = EngineConfig(model="m", block_size=4, max_num_seqs=3, max_num_batched_tokens=12)
    prompts = [PROMPT, [4, 5] * 6, [8], [5] * 15]
    recording = check_off_is_off(ScriptedRanks([30] * num_ranks, 4, 64), config, prompts)
    assert len(recording.plans) > 20


@pytest.mark.distributed
def test_off_is_off_to_real_ranks(
    two_ranks: tuple[ProcessRanks, EngineConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_drafters(monkeypatch)
    recording = check_off_is_off(*two_ranks, PROMPTS)
    num_layers = two_ranks[0].infos[0].model.num_moe_layers
    assert {count for step in recording.collectives for count, _ in step} == {3 * num_layers}


@pytest.mark.distributed
def test_two_ranks_take_different_draft_lengths_in_one_step(two_ranks: tuple[ProcessRanks, EngineConfig]) -> None:
    ranks, config = two_ranks
    prompts = PROMPTS[:2]
    plain = Recording(ranks)
    answers = [output.token_ids for output in run(Engine(config, plain), [(prompt, OFF) for prompt in prompts])]
    wishes = [
        (prompt, SpeculationOptions("fixed", length, tuple(answer)))
        for prompt, length, answer in zip(prompts, (2, 5), answers, strict=True)
    ]
    recording = Recording(ranks)
    outputs = run(Engine(config, recording), wishes)
    assert [output.token_ids for output in outputs] == answers
    lengths = [
        tuple(part.num_sampled_rows - 1 for part in rank.requests)
        for plan in recording.plans
        for rank in plan.ranks
        if all(len(r.requests) == 1 for r in plan.ranks)
    ]
    assert ((2,), (5,)) in zip(lengths[::2], lengths[1::2], strict=True), "each rank has one of the two requests"
    for first, second in recording.collectives:
        assert first == second
    assert len(recording.plans) < len(plain.plans)
