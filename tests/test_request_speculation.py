"""What requests say of their own speculation: their draft lengths, their predictions, and what is counted of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penstock.cluster.config import EngineConfig
from penstock.cluster.engine import engine as engine_module
from penstock.cluster.engine.engine import Engine
from penstock.cluster.engine.output import RequestOutput
from penstock.cluster.engine.ranks import LocalRanks, Ranks, Replacement, make_runner
from penstock.cluster.speculation.batch import Batch
from penstock.cluster.speculation.fixed import FixedController
from penstock.cluster.speculation.observation import StepObservation
from penstock.cluster.speculation.options import SpeculationOptions
from penstock.cluster.speculation.proposal import Proposal
from penstock.cluster.transport.process_ranks import ProcessRanks
from penstock.workers.plan import StepFailedError, StepPlan, StepResult
from penstock.workers.sampling_params import SamplingParams

from .scripted_ranks import ScriptedRanks, continuation

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True, seed=0)
PROMPT = [4, 7, 5]
NEVER = [0, 1, 2, 3]
"""Ids that scripted ranks never answer."""
OFF = SpeculationOptions("off")


class Recording:
    """Ranks, and what they were asked and answered; fails the calls it is told to, after they have run."""

    def __init__(self, ranks: Ranks, failed: Sequence[int] = ()) -> None:
        self._ranks, self._failed, self.infos = ranks, failed, ranks.infos
        self.plans: list[StepPlan] = []
        self.results: list[StepResult] = []

    def step(self, plan: StepPlan) -> StepResult:
        result = self._ranks.step(plan)
        self.plans.append(plan)
        if len(self.plans) in self._failed:
            raise StepFailedError("planted")
        self.results.append(result)
        return result

    def recover(self, generation: int) -> Sequence[Replacement]:
        return self._ranks.recover(generation)

    def close(self) -> None:
        self._ranks.close()

    @property
    def collectives(self) -> list[list[tuple[int, int]]]:
        """What every rank says of its sequence of collectives, by step."""
        return [[(rank.num_collectives, rank.collectives_crc) for rank in result.ranks] for result in self.results]


class Witness(FixedController):
    """Counts what was proposed from predictions and what became of it, by the controller's contract alone."""

    def __init__(self, draft_len: int) -> None:
        super().__init__(draft_len)
        self.sources: dict[int, str] = {}
        self.num_drafted = self.num_accepted = 0

    def draft_lens(self, batch: Batch, proposals: Sequence[Proposal]) -> list[int]:
        self.sources = {
            request.key: proposal.evidence.source for request, proposal in zip(batch.requests, proposals, strict=True)
        }
        return super().draft_lens(batch, proposals)

    def observe(self, step: StepObservation) -> None:
        for outcome in step.requests:
            if self.sources.get(outcome.key) == "prediction":
                self.num_drafted += outcome.num_drafted
                self.num_accepted += outcome.num_accepted


def scripted(
    failed: Sequence[int] = (), controller: Any = None, blocks: Sequence[int] = (40,), **options: Any
) -> Engine:
    config = EngineConfig(model="m", **{"block_size": 4, "max_num_seqs": 8, "draft_len": 3, **options})
    return Engine(config, Recording(ScriptedRanks(blocks, 4, 64), failed), controller=controller)


Wish = tuple[list[int], SpeculationOptions]


def run(engine: Engine, wishes: Sequence[Wish], sampling: SamplingParams = GREEDY) -> list[RequestOutput]:
    """Serve requests side by side; return their outputs as if each had come in one piece."""
    whole: dict[str, RequestOutput] = {}
    for index, (prompt, speculation) in enumerate(wishes):
        engine.add_request(str(index), prompt, sampling, speculation)
    while engine.has_requests:
        for output in engine.step():
            earlier = whole.get(output.request_id)
            whole[output.request_id] = output if earlier is None else earlier.followed_by(output)
        engine.scheduler.check_integrity()
    return [whole[str(index)] for index in range(len(wishes))]


def counts(output: RequestOutput) -> tuple[int, int]:
    assert output.stats is not None
    stats = output.stats
    drafts = output.prediction_drafts
    counted = (stats.num_accepted_prediction_tokens, stats.num_rejected_prediction_tokens)
    drafted, accepted = sum(d.num_drafted for d in drafts), sum(d.num_accepted for d in drafts)
    assert counted == (accepted, drafted - accepted), "the outputs say the same as the statistics"
    return counted


# --- predictions -----------------------------------------------------------------------------------------------------


def predicting(*token_ids: int) -> SpeculationOptions:
    return SpeculationOptions(prediction_token_ids=token_ids)


def test_a_right_prediction_is_accepted_to_the_last_token() -> None:
    answer = continuation(PROMPT, 20)
    [output] = run(scripted(), [(PROMPT, predicting(*answer))])
    assert output.token_ids == answer
    # The first token comes with the prompt, then 3 drafts and one more four times, then the 2 that leave room for one
    assert counts(output) == (14, 0)
    assert output.stats is not None
    assert output.stats.num_steps == 6
    assert output.stats.mean_draft_len == 14 / 6


@pytest.mark.parametrize("drafter", ["prediction", "ngram"])
def test_accepted_and_rejected_are_what_the_controller_saw(drafter: str) -> None:
    answer = continuation(PROMPT, 20)
    witness = Witness(3)
    half_right = predicting(*answer[:9], *NEVER, *answer[12:])
    [output] = run(scripted(controller=witness, drafter=drafter), [(PROMPT, half_right)])
    assert output.token_ids == answer
    accepted, rejected = counts(output)
    assert (accepted, accepted + rejected) == (witness.num_accepted, witness.num_drafted)
    assert accepted >= 6
    assert rejected >= 3
    assert output.stats is not None
    if drafter == "prediction":
        assert accepted + rejected == output.stats.num_draft_tokens
    else:
        assert accepted + rejected < output.stats.num_draft_tokens, "the n-grams' are not the prediction's"


def test_a_prediction_of_something_else_counts_nothing() -> None:
    [output] = run(scripted(), [(PROMPT, predicting(*NEVER))])
    assert output.token_ids == continuation(PROMPT, 20)
    assert counts(output) == (0, 0)


def test_without_a_prediction_drafts_count_as_none() -> None:
    [output] = run(scripted(drafter="suffix"), [(PROMPT * 4, SpeculationOptions())])
    assert output.stats is not None
    assert output.stats.num_draft_tokens > 0
    assert counts(output) == (0, 0)


@pytest.mark.parametrize("options", [{"speculation": "off"}, {"draft_len": 0}])
def test_a_server_that_does_not_speculate_takes_a_prediction_and_counts_nothing(options: dict[str, Any]) -> None:
    answer = continuation(PROMPT, 20)
    [output] = run(scripted(**options), [(PROMPT, predicting(*answer))])
    assert output.token_ids == answer
    assert counts(output) == (0, 0)
    assert output.stats is not None
    assert (output.stats.phase, output.stats.num_draft_tokens) == ("off", 0)


def test_steps_planned_again_count_once() -> None:
    wish = (PROMPT, predicting(*continuation(PROMPT, 9), *NEVER))
    engine = scripted(failed=(2, 3, 5, 8))
    [expected], [output] = run(scripted(), [wish]), run(engine, [wish])
    assert engine.stats().num_failed_steps == 4
    assert output.token_ids == expected.token_ids
    assert counts(output) == counts(expected)


def test_a_request_that_is_replayed_keeps_its_prediction() -> None:
    prompts = [PROMPT, [6, 4, 8, 8], [5] * 6]
    wishes = [(prompt, predicting(*continuation(prompt, 20))) for prompt in prompts]
    engine = scripted(blocks=(16,))
    outputs = run(engine, wishes, replace(GREEDY, max_tokens=40))
    assert engine.stats().num_preemptions > 0
    replayed = [output for output in outputs if output.stats is not None and output.stats.num_preemptions]
    assert replayed
    for output, prompt in zip(outputs, prompts, strict=True):
        assert output.token_ids == continuation(prompt, 40)
        assert counts(output)[0] >= 12


def test_a_prediction_that_is_no_prediction_of_this_model_is_refused() -> None:
    engine = scripted()
    with pytest.raises(ValueError, match=r"^prediction.content: 65 tokens are more than max_model_len, 64"):
        engine.add_request("a", PROMPT, GREEDY, predicting(*[5] * 65))
    with pytest.raises(ValueError, match=r"^prediction.content: token ids must be in \[0, 8\]"):
        engine.add_request("a", PROMPT, GREEDY, predicting(9))
    assert not engine.has_requests


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

    expected = steps(SpeculationOptions(), speculation="off")
    assert all(length == 0 for plan in expected.plans for length in drafted(plan).values())
    others = [steps(wish, speculation=policy) for wish in LENGTH_0 for policy in ("fixed", "cascade", "shadow")]
    for other in [*others, steps(SpeculationOptions(), speculation="fixed", draft_len=0)]:
        assert other.plans == expected.plans
        assert other.collectives == expected.collectives
        assert [[r.counts for r in s.ranks] for s in other.results] == [
            [r.counts for r in s.ranks] for s in expected.results
        ]
    return expected


PROMPTS = [[5, 17, 60, 33, 8, 71, 11, 44], [3, 9, 3, 9, 3, 9, 3, 9, 3, 9, 3], [41], [50, 51, 52, 50, 51, 52, 50]]


def real_config(directory: Path, num_ranks: int) -> EngineConfig:
    return EngineConfig(
        model=str(directory),
        expert_parallel_size=num_ranks,
        num_threads=1,
        device="cpu",
        block_size=4,
        max_model_len=96,
        kv_cache_bytes=1 << 20,
        max_num_batched_tokens=16,
        max_num_seqs=4,
        max_draft_len=5,
        draft_len=5,
    )


@pytest.fixture(scope="module")
def one_rank(checkpoint: Callable[[str], Path]) -> tuple[LocalRanks, EngineConfig]:
    config = real_config(checkpoint("qwen3_moe"), 1)
    return LocalRanks(make_runner(config, 0)), config


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


# --- the tokens ------------------------------------------------------------------------------------------------------


def predictions(answer: Sequence[int]) -> list[SpeculationOptions]:
    """Return right, half right and nonsensical predictions of ``answer``."""
    wrong = [token + 1 for token in answer]
    middle = len(answer) // 2
    return [
        predicting(*tokens)
        for tokens in (
            answer,
            answer[:5],
            [*answer[:middle], *wrong[middle:]],
            [*wrong[:middle], *answer[middle:]],
            [token for pair in zip(answer, wrong, strict=True) for token in pair],
            wrong,
            [90] * 30,
        )
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_no_prediction_changes_a_token(one_rank: tuple[LocalRanks, EngineConfig], temperature: float) -> None:
    ranks, config = one_rank
    sampling = replace(GREEDY, temperature=temperature, seed=5)
    answers = [
        output.token_ids for output in run(Engine(config, ranks), [(prompt, OFF) for prompt in PROMPTS], sampling)
    ]
    accepted = rejected = 0
    for wishes in zip(*map(predictions, answers), strict=True):
        outputs = run(Engine(config, ranks), list(zip(PROMPTS, wishes, strict=True)), sampling)
        assert [output.token_ids for output in outputs] == answers
        accepted += sum(counts(output)[0] for output in outputs)
        rejected += sum(counts(output)[1] for output in outputs)
    assert accepted > 100
    assert rejected > 10


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
