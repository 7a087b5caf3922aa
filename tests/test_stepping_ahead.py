"""Steps that are sent while the one before runs: the same tokens, nothing lost, leaked or sent too early."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.cluster.config import EngineConfig
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.output import ABORT, STOP, RequestOutput
from penstock.cluster.speculation.controller import Controller
from penstock.cluster.speculation.options import SpeculationOptions
from penstock.workers.plan import StepPlan, StepResult
from penstock.workers.sampling_params import SamplingParams

from .queued_ranks import QueuedRanks
from .scripted_ranks import FIRST, VOCAB, ScriptedRanks, continuation
from .static_steps import Padded
from .tiny_engine import GREEDY, PROMPTS, Published, drain, generate

MAX_MODEL_LEN = 40
BLOCK_SIZE = 4


def scripted(num_blocks: list[int], **options: Any) -> ScriptedRanks:
    return ScriptedRanks(num_blocks, BLOCK_SIZE, MAX_MODEL_LEN, **options)


def engine_over(ranks: Any, **options: Any) -> Engine:
    return Engine(EngineConfig(model="m", block_size=BLOCK_SIZE, **{"draft_len": 0, **options}), ranks)


def expected_of(prompt: list[int], sampling: SamplingParams) -> list[int]:
    assert sampling.max_tokens is not None
    tokens = continuation(prompt, sampling.max_tokens)
    ends = [place for place, token in enumerate(tokens) if token in sampling.stop_token_ids]
    return tokens[: ends[0] + 1] if ends else tokens


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    spare_blocks=st.lists(st.integers(0, 8), min_size=1, max_size=3),
    max_num_seqs=st.integers(1, 6),
    more_rows=st.integers(0, 20),
    failures=st.sampled_from([0.0, 0.1]),
    eager=st.booleans(),
)
def test_any_traffic_gets_its_exact_tokens(
    seed: int, spare_blocks: list[int], max_num_seqs: int, more_rows: int, failures: float, eager: bool
) -> None:
    rng = random.Random(seed)
    local = scripted([MAX_MODEL_LEN // BLOCK_SIZE + spare for spare in spare_blocks])
    ranks = QueuedRanks(local, lambda _: rng.random() < failures, eager=eager)
    engine = engine_over(
        ranks, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_seqs + more_rows, max_step_retries=100
    )
    readers, wanted = Published(), {}

    def step() -> None:
        readers.take(engine.step())
        engine.scheduler.check_integrity()

    for number in range(80):
        if rng.random() < 0.35:
            prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, MAX_MODEL_LEN - 1))]
            limit = rng.randint(1, MAX_MODEL_LEN - len(prompt))
            stops = (rng.randrange(FIRST, VOCAB),) if rng.random() < 0.5 else ()
            sampling = SamplingParams(temperature=0, max_tokens=limit, stop_token_ids=stops)
            engine.add_request(str(number), prompt, sampling)
            wanted[str(number)] = expected_of(prompt, sampling)
        if wanted and rng.random() < 0.06:
            gone = rng.choice(list(wanted))
            if engine.abort(gone) is not None:
                got = readers.pop(gone, [])
                assert got == wanted.pop(gone)[: len(got)]
        step()
    for _ in range(20_000):
        if not engine.has_requests:
            break
        step()
    assert not engine.has_requests, "every request ends"
    assert dict(readers) == wanted
    stats = engine.stats()
    assert stats.num_kv_blocks_used == 0
    if not failures:
        assert stats.num_steps == ranks.num_runs == len(ranks.plans)
    assert len({(plan.generation, plan.step_id) for plan in ranks.plans}) == len(ranks.plans)


@pytest.mark.parametrize("eager", [False, True])
def test_a_step_that_fails_takes_the_one_behind_it_along(eager: bool) -> None:
    """Whichever of them it is; what is counted is what a run without the fault counts."""
    prompts = [[(5 * key + place) % VOCAB for place in range(3 + 4 * key)] for key in range(4)]
    sampling = SamplingParams(temperature=0, max_tokens=9)

    def run(failed: int) -> tuple[QueuedRanks, Engine]:
        ranks = QueuedRanks(scripted([40, 40]), lambda call: call == failed, eager=eager)
        engine = engine_over(ranks, max_num_batched_tokens=8, max_num_seqs=8)
        for key, prompt in enumerate(prompts):
            engine.add_request(str(key), prompt, sampling)
        published = drain(engine)
        assert [published[str(key)] for key in range(4)] == [continuation(prompt, 9) for prompt in prompts]
        return ranks, engine

    ranks, plain = run(0)
    assert ranks.num_ahead == len(ranks.plans) - 1, "every step but the first"
    for failed in range(1, ranks.num_runs + 1):
        ranks, engine = run(failed)
        assert ranks.num_ahead >= len(ranks.plans) - 3
        stats, wanted = engine.stats(), plain.stats()
        assert stats.num_failed_steps == 1
        for name in ("num_steps", "num_generation_tokens", "num_prompt_tokens", "num_decode_steps"):
            assert getattr(stats, name) == getattr(wanted, name), name


def test_a_request_that_stops_leaves_a_row_behind_which_nobody_hears_of() -> None:
    prompt = [5, 7, 4]
    tokens = continuation(prompt, 12)
    stop = next(token for token in tokens[2:] if token not in tokens[:2])
    ranks = QueuedRanks(scripted([20]))
    engine, published = engine_over(ranks), Published()
    engine.add_request("a", prompt, SamplingParams(temperature=0, max_tokens=12, stop_token_ids=(stop,)))
    while "a" not in published.ended:
        published.take(engine.step())
    assert published.ended["a"].finish_reason == STOP
    assert published["a"] == tokens[: tokens.index(stop) + 1]
    assert engine.has_requests, "ranks run a step for it"
    assert engine.stats().num_kv_blocks_used == 0
    # Its blocks go to another in the step after that
    engine.add_request("b", [6] * 30, SamplingParams(temperature=0, max_tokens=10))
    drain(engine, published)
    assert published["b"] == continuation([6] * 30, 10)
    assert engine.stats().num_generation_tokens == len(published["a"]) + 10


def test_a_length_that_is_known_is_planned_no_further() -> None:
    ranks = QueuedRanks(scripted([20]))
    engine = engine_over(ranks)
    for name, limit in (("a", 3), ("b", 6)):
        engine.add_request(name, [5, 7], SamplingParams(temperature=0, max_tokens=limit))
    drain(engine)
    assert [len(plan.ranks[0].requests) for plan in ranks.plans] == [2, 2, 2, 1, 1, 1]
    assert ranks.num_ahead == 5


def test_an_abort_while_a_step_is_under_way() -> None:
    ranks = QueuedRanks(scripted([20]), eager=True)
    engine, published = engine_over(ranks, max_num_seqs=2), Published()
    for name in "ab":
        engine.add_request(name, [ord(name) % VOCAB] * 5, SamplingParams(temperature=0, max_tokens=20))
    for _ in range(4):
        published.take(engine.step())
    assert [part.is_deferred for part in ranks.plans[-1].ranks[0].requests] == [True, True]
    stats = engine.abort("a")
    assert stats is not None
    assert stats.num_output_tokens == len(published["a"]) == 4
    engine.add_request("a", [8] * 9, SamplingParams(temperature=0, max_tokens=5))
    published.pop("a")
    drain(engine, published)
    assert published == {"a": continuation([8] * 9, 5), "b": continuation([98 % VOCAB] * 5, 20)}
    assert engine.stats().num_requests_finished[ABORT] == 1


def test_ranks_that_meet_again_between_steps_run_what_was_under_way_anew() -> None:
    ranks = QueuedRanks(scripted([20]), eager=True)
    engine, published = engine_over(ranks), Published()
    engine.add_request("a", [5, 7], SamplingParams(temperature=0, max_tokens=10))
    for _ in range(3):
        published.take(engine.step())
    engine.recover()
    drain(engine, published)
    assert published["a"] == continuation([5, 7], 10)
    assert engine.stats().num_failed_steps == 0
    assert engine.stats().num_steps == 10


def test_an_interrupted_step_is_never_planned_again_under_its_number() -> None:
    class Interrupted(QueuedRanks):
        def collect(self, plan: StepPlan) -> StepResult:
            if len(self.plans) == 5:
                raise KeyboardInterrupt
            return super().collect(plan)

    ranks = Interrupted(scripted([20]))
    engine, published = engine_over(ranks), Published()
    engine.add_request("a", [5, 7], SamplingParams(temperature=0, max_tokens=10))
    with pytest.raises(KeyboardInterrupt):
        drain(engine, published)
    drain(engine, published)
    assert published["a"] == continuation([5, 7], 10)
    assert len({(plan.generation, plan.step_id) for plan in ranks.plans}) == len(ranks.plans)


# --- where drafts are possible ---------------------------------------------------------------------------------------


class Timed(ScriptedRanks):
    """Ranks whose steps take a second for each row, by a clock of their own."""

    now_s = 0.0

    def step(self, plan: StepPlan) -> StepResult:
        ran_s = float(sum(len(request.token_ids) for rank in plan.ranks for request in rank.requests))
        self.now_s += ran_s
        result = super().step(plan)
        return replace(result, ranks=[replace(rank, ran_s=ran_s) for rank in result.ranks])


@pytest.mark.parametrize("num_requests", [1, 3])
@pytest.mark.parametrize(("policy", "ahead"), [("off", 1.0), ("fixed", 0.0), ("cascade", 0.3), ("shadow", 0.0)])
def test_drafts_are_what_they_are_without(policy: str, ahead: float, num_requests: int) -> None:
    found = []
    for is_ahead in (False, True):
        timed = Timed([300], BLOCK_SIZE, 400)
        config = EngineConfig(model="m", block_size=BLOCK_SIZE, speculation=policy, async_scheduling=is_ahead)
        ranks = QueuedRanks(timed)
        engine = Engine(config, ranks, clock=lambda timed=timed: timed.now_s)
        for key in range(num_requests):
            engine.add_request(str(key), [4 + key, 5, 6], SamplingParams(temperature=0, max_tokens=300))
        tokens = drain(engine)
        phases = [tokens.ended[str(key)].stats for key in range(num_requests)]
        stats = engine.stats()
        drafts = [[len(part.token_ids) for part in plan.ranks[0].requests] for plan in ranks.plans]
        found.append((dict(tokens), phases, drafts, stats.spec_decode_num_draft_tokens, stats.latencies))
        assert (stats.spec_decode_num_draft_tokens > 0) == (policy in ("fixed", "cascade", "shadow"))
    assert found[0] == found[1]
    assert ranks.num_ahead >= ahead * (len(ranks.plans) - 1)
    if not ahead:
        assert ranks.num_ahead <= 1, "the last token of all, after which there is none to draft"


def test_a_request_may_draft_until_it_ends_and_the_others_go_ahead_then() -> None:
    ranks = QueuedRanks(scripted([40]))
    engine = engine_over(ranks, draft_len=3)
    engine.add_request("a", [5, 7], SamplingParams(temperature=0, max_tokens=30), SpeculationOptions(mode="off"))
    engine.add_request("b", [5, 7], SamplingParams(temperature=0, max_tokens=8))
    published = drain(engine)
    assert published["a"] == continuation([5, 7], 30)
    deferred = [any(part.is_deferred for part in plan.ranks[0].requests) for plan in ranks.plans]
    with_both = [len(plan.ranks[0].requests) == 2 for plan in ranks.plans]
    assert not any(ahead and both for ahead, both in zip(deferred, with_both, strict=True))
    assert sum(deferred) > 15


class _Unwilling:
    """What `rests` was asked of a controller, in the order of the other calls."""

    def __init__(self, controller: Controller) -> None:
        self._controller, self.calls = controller, []

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> Any:
            self.calls.append(name)
            return getattr(self._controller, name)(*given)

        value = getattr(self._controller, name)
        return call if callable(value) else value


def test_a_controller_is_asked_in_the_same_order() -> None:
    asked = []
    for is_ahead in (False, True):
        ranks = QueuedRanks(scripted([40]))
        config = EngineConfig(model="m", block_size=BLOCK_SIZE, draft_len=0, async_scheduling=is_ahead)
        spy = _Unwilling(Engine(config, ranks).controller)
        engine = Engine(config, ranks, controller=spy)  # type: ignore[arg-type]
        engine.add_request("a", [5, 7], SamplingParams(temperature=0, max_tokens=6))
        drain(engine)
        asked.append([call for call in spy.calls if call in ("max_draft_lens", "draft_lens", "observe", "forget")])
        assert (ranks.num_ahead > 0) == is_ahead
    assert asked[0] == asked[1]


# --- a model ---------------------------------------------------------------------------------------------------------

SAMPLINGS = [
    GREEDY,
    SamplingParams(temperature=0.9, seed=11, max_tokens=20, ignore_eos=True, logprobs=2, prompt_logprobs=1),
    SamplingParams(temperature=1.0, top_k=20, seed=3, max_tokens=20, logit_bias={7: 2.0}, min_tokens=5),
]
PENALISED = SamplingParams(temperature=0.8, seed=5, max_tokens=20, ignore_eos=True, frequency_penalty=0.4)


def _serve(engine: Engine, samplings: list[SamplingParams]) -> dict[str, RequestOutput]:
    merged: dict[str, RequestOutput] = {}
    waiting = [
        (f"{i} {j}", prompt, sampling) for i, prompt in enumerate(PROMPTS) for j, sampling in enumerate(samplings)
    ]
    while waiting or engine.has_requests:
        if waiting:
            engine.add_request(*waiting.pop(0))
        for output in engine.step():
            earlier = merged.get(output.request_id)
            merged[output.request_id] = output if earlier is None else earlier.followed_by(output)
    return {name: replace(output, stats=None) for name, output in merged.items()}


@pytest.mark.parametrize("wrap", [lambda ranks: ranks, Padded], ids=["launched", "padded"])
@pytest.mark.parametrize("eager", [False, True])
def test_a_model_publishes_the_same(
    make_engine: Callable[..., Engine], wrap: Callable[[Any], Any], eager: bool
) -> None:
    options = {"draft_len": 0, "max_num_batched_tokens": 16, "max_num_seqs": 6}
    expected = _serve(make_engine(**options), SAMPLINGS)
    engine = make_engine(lambda local: QueuedRanks(wrap(local), eager=eager), **options)
    found = _serve(engine, SAMPLINGS)
    ranks: Any = engine.ranks
    assert ranks.num_ahead > 0.9 * len(ranks.plans)
    assert {name: output.token_ids for name, output in found.items()} == {
        name: output.token_ids for name, output in expected.items()
    }
    for name, output in expected.items():
        for field in ("logprobs", "prompt_logprobs"):
            one, other = getattr(output, field), getattr(found[name], field)
            assert (one is None) == (other is None)
            if one is not None:
                assert one.token_ids == other.token_ids
                for mine, theirs in zip(one.values, other.values, strict=True):
                    assert mine == pytest.approx(theirs, abs=1e-4)


def test_penalties_wait_for_the_text(make_engine: Callable[..., Engine]) -> None:
    options = {"draft_len": 0, "max_num_batched_tokens": 16, "max_num_seqs": 6}
    expected = [generate(make_engine(**options), prompts, PENALISED) for prompts in (PROMPTS, PROMPTS[2:3])]
    engine = make_engine(QueuedRanks, **options)
    assert generate(engine, PROMPTS, PENALISED) == expected[0]
    ranks: Any = engine.ranks
    assert ranks.num_ahead == 0
    assert generate(engine, PROMPTS[2:3], PENALISED) == expected[1]
    assert ranks.num_ahead == 1, "the second chunk of a prompt"
    assert not any(part.is_deferred for plan in ranks.plans for part in plan.ranks[0].requests)
