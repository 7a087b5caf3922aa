"""Shadow against a simulated machine: it never loses, and it beats every fixed length over a mix."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest

from penstock.cluster.speculation.batch import Batch, RequestView
from penstock.cluster.speculation.controller import Controller
from penstock.cluster.speculation.drafter import drafter_factory
from penstock.cluster.speculation.fixed import FixedController
from penstock.cluster.speculation.observation import RequestOutcome, ShadowTrial, StepObservation
from penstock.cluster.speculation.options import SpeculationOptions
from penstock.cluster.speculation.proposal import Evidence, Proposal
from penstock.cluster.speculation.shadow import (
    LOSS_GRANT_STEPS,
    LOSS_SHARE,
    RESERVE_SHARE,
    RESERVE_STEPS,
    ShadowController,
)

from .simulated_jobs import FAMILIES, Job, bernoulli, jobs_of
from .simulated_machine import MACHINES, NOISY, NUM_EXPERTS, TOP_K, Machine, measured_experts
from .speculation_simulator import simulate

PRICED = Machine()
NO_LOSS = 0.98


def shadow(num_ranks: int = 1) -> ShadowController:
    return ShadowController(7, NUM_EXPERTS, TOP_K, num_ranks)


def relative_rate(jobs: list[Job], machine: Machine, **options: int) -> float:
    """Tokens per second of shadow over those of no speculation."""
    plain = simulate(FixedController(0), jobs, machine, **options).rate
    return simulate(shadow(machine.num_ranks), jobs, machine, **options).rate / plain


@pytest.mark.parametrize(("machine", "clock"), [*((machine, "noisy") for machine in MACHINES), ("priced", "exact")])
def test_no_curve_loses_on_any_machine_at_batch_1(machine: str, clock: str) -> None:
    subject = replace(MACHINES[machine], **NOISY) if clock == "noisy" else MACHINES[machine]
    for curve in ("never", "seldom", "sometimes", "drifting", "flipping fast"):
        assert relative_rate(jobs_of(curve, 4, 256), subject) >= NO_LOSS, curve


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("batch_size", [4, 16])
@pytest.mark.parametrize("machine", ["priced", "memory bound"])
def test_no_curve_loses_in_batches(machine: str, batch_size: int, num_ranks: int) -> None:
    subject = replace(MACHINES[machine], num_ranks=num_ranks, **NOISY)
    for curve in ("never", "seldom"):
        jobs = jobs_of(curve, 5 * batch_size, 96)
        assert relative_rate(jobs, subject, batch_size=batch_size) >= NO_LOSS, curve


@pytest.mark.parametrize("machine", ["priced", "memory bound", "measured table", "padded graphs"])
@pytest.mark.parametrize("clock", ["exact", "noisy"])
def test_an_adversary_gains_nothing(machine: str, clock: str) -> None:
    """Drafts that are right whenever the last step verified none, and wrong whenever it did."""
    subject = replace(MACHINES[machine], **NOISY) if clock == "noisy" else MACHINES[machine]
    controller = shadow()
    jobs = []
    for key in range(2):
        text = bernoulli(key, 400, lambda i: 0.0)

        def runs(num_output: int, key: int = key) -> int:
            return 0 if controller.report(key).draft_len else 7

        jobs.append(Job(text.prompt, text.output, runs))
    plain = simulate(FixedController(0), jobs, subject).rate
    assert simulate(controller, jobs, subject).rate >= NO_LOSS * plain


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("right", [0.0, 0.3])
def test_prompts_that_come_between_do_not_mislead_it(right: float, batch_size: int) -> None:
    machine = replace(PRICED, **NOISY)
    # Of many lengths, so that prompts meet decoding requests with drafts and without alike
    jobs = [bernoulli(key, 150 + 53 * key % 160, lambda i: right, num_prompt=100) for key in range(4 * batch_size)]
    assert relative_rate(jobs, machine, batch_size=batch_size, prefill_chunk=16) >= NO_LOSS


@pytest.mark.parametrize("num_right", [0, 4])
def test_beside_prompts_drafts_are_priced_by_what_they_add(num_right: int) -> None:
    controller, evidence = shadow(), Evidence("scripted", 3)
    proposal = Proposal([1] * 4, evidence)
    views = [RequestView(key, 0, 64, 7) for key in range(2)]
    for step in range(60):
        lengths = controller.draft_lens(Batch(views), [proposal] * 2)
        rows = [2 + sum(lengths)]
        experts = [measured_experts(rows[0])]
        step_s = PRICED.step_s(rows, experts, [0.0], step)
        accepted = [min(length, num_right) for length in lengths]
        outcomes = [RequestOutcome(key, lengths[key], accepted[key], accepted[key] + 1) for key in range(2)]
        trials = [ShadowTrial(key, evidence, 0, num_right, min(num_right + 1, 4)) for key in range(2)]
        controller.observe(StepObservation(step_s, outcomes, rows, False, experts, [0.0]))
        controller.learn(trials)
    alone = views[:1]
    assert controller.draft_lens(Batch(alone), [proposal]) == [0], "a plain step of one row was never measured"
    beside = controller.draft_lens(Batch(alone, prompt_rows=[48]), [proposal])
    assert beside == [num_right]


@pytest.mark.parametrize("seed", range(10))
def test_a_machine_on_which_anything_takes_any_time_is_decided_for_all_the_same(seed: int) -> None:
    rng, controller, evidence = random.Random(seed), shadow(), Evidence("scripted", 3)
    for _ in range(200):
        views = [RequestView(key, 0, 64, 7) for key in range(rng.randint(1, 4))]
        batch = Batch(views, prompt_rows=[rng.choice([0, 0, 0, 9, 40])])
        lengths = controller.draft_lens(batch, [Proposal([1] * rng.randint(0, 7), evidence) for _ in views])
        rows = [len(views) + sum(lengths) + sum(batch.prompt_rows)]
        outcomes = [RequestOutcome(view.key, length, 0, 1) for view, length in zip(views, lengths, strict=True)]
        step_s = 10 ** rng.uniform(-4, 1)
        controller.observe(StepObservation(step_s, outcomes, rows, batch.has_prefill, [rng.uniform(1, 16)], [0.0]))
        controller.learn([ShadowTrial(view.key, evidence, 0, rng.randint(0, 3), 4) for view in views])


@pytest.mark.parametrize(
    ("curve", "share"), [("sometimes", 0.98), ("often", 0.95), ("mostly", 0.94), ("nearly always", 0.97)]
)
def test_it_comes_near_the_best_length_where_one_length_is_best(curve: str, share: float) -> None:
    jobs = jobs_of(curve, 4, 512)
    best = max(simulate(FixedController(draft_len), jobs, PRICED).rate for draft_len in (1, 2, 3, 5, 7))
    assert simulate(shadow(), jobs, PRICED).rate >= share * best


@cache
def mix_rate(policy: str, drafter: str, batch_size: int, num_ranks: int) -> float:
    """Tokens per second over code, math, extraction and chat, by a noisy clock."""
    jobs = [family.job(100 * seed) for seed in range(6) for family in FAMILIES.values()]
    controller: Controller = shadow(num_ranks) if policy == "shadow" else FixedController(int(policy))
    machine = replace(PRICED, num_ranks=num_ranks, **NOISY)
    return simulate(controller, jobs, machine, batch_size=batch_size, make_drafter=drafter_factory(drafter)).rate


@pytest.mark.parametrize(
    ("drafter", "batch_size", "num_ranks", "gain"),
    [
        ("ngram", 1, 1, 1.08),
        ("suffix", 1, 1, 1.08),
        ("ngram", 4, 1, 1.08),
        ("suffix", 4, 1, 1.08),
        ("ngram", 4, 2, 1.04),
    ],
)
def test_it_beats_the_best_fixed_length_over_a_mix(drafter: str, batch_size: int, num_ranks: int, gain: float) -> None:
    best = max(mix_rate(str(draft_len), drafter, batch_size, num_ranks) for draft_len in range(8))
    assert mix_rate("shadow", drafter, batch_size, num_ranks) >= gain * best


def test_in_large_batches_it_comes_near_the_largest_length_when_that_is_best() -> None:
    best = max(mix_rate(str(draft_len), "ngram", 16, 1) for draft_len in (0, 3, 5, 7))
    assert mix_rate("shadow", "ngram", 16, 1) >= 0.94 * best


@pytest.mark.parametrize("family", FAMILIES)
def test_no_kind_of_text_loses(family: str) -> None:
    jobs = [FAMILIES[family].job(100 * seed + 7) for seed in range(8)]
    for machine in (PRICED, replace(PRICED, **NOISY)):
        plain = simulate(FixedController(0), jobs, machine).rate
        for drafter in ("ngram", "suffix"):
            assert simulate(shadow(), jobs, machine, make_drafter=drafter_factory(drafter)).rate >= 0.985 * plain


def test_good_requests_draft_and_bad_ones_do_not_in_the_same_batch() -> None:
    run = simulate(shadow(), jobs_of("bimodal", 8, 200), replace(PRICED, **NOISY), batch_size=8)
    tail = {key: lengths[20:] for key, lengths in run.draft_lens.items()}
    mean = {key: sum(lengths) / len(lengths) for key, lengths in tail.items()}
    assert max(mean[key] for key in (0, 2, 4, 6)) < 0.5
    assert min(mean[key] for key in (1, 3, 5, 7)) > 2


def test_a_cost_that_falls_is_found_out() -> None:
    """Rows that were dear become free: the next tries show it."""
    machine, cheap = MACHINES["memory bound"], MACHINES["free rows"]
    controller = shadow()
    before = simulate(controller, jobs_of("often", 3, 200), machine)
    after = simulate(controller, jobs_of("often", 8, 200), cheap)
    plain = simulate(FixedController(0), jobs_of("often", 8, 200), cheap)
    assert sum(map(sum, before.draft_lens.values())) < 0.3 * before.num_steps
    assert after.rate > 1.3 * plain.rate


def test_a_request_with_a_length_of_its_own_is_not_paid_for_by_the_others() -> None:
    hopeless = bernoulli(0, 200, lambda i: 0.0)
    fixed = Job(hopeless.prompt, hopeless.output, hopeless.runs, options=SpeculationOptions("fixed", 3))
    run = simulate(shadow(), [fixed, *jobs_of("nearly always", 3, 200)], PRICED, batch_size=4)
    assert set(run.draft_lens[0][:-3]) == {3}
    for key in (1, 2, 3):
        assert sum(run.draft_lens[key]) / len(run.draft_lens[key]) > 3


def test_after_a_loss_it_comes_back_soon_where_much_is_expected() -> None:
    """Without the reserve, half a percent of the time would have to pay for the next draft: 300 steps."""
    controller = shadow()
    proposal = Proposal([1] * 7, Evidence("scripted", 5))

    def step(key: int) -> int:
        (drafted,) = controller.draft_lens(Batch([RequestView(key, 0, 64, 7)]), [proposal])
        # Wrong whenever it is verified, though the text says of all others that they were right
        outcome = RequestOutcome(key, drafted, 0, 1)
        controller.observe(
            StepObservation(0.010 + 0.005 * drafted, [outcome], [1 + drafted], False, [4.0 + drafted], [0.0])
        )
        controller.learn([ShadowTrial(key, proposal.evidence, 0, 7, 7)] * 4)
        return drafted

    lengths = [step(0) for _ in range(400)]
    first, second, *_ = [place for place, drafted in enumerate(lengths) if drafted]
    assert first < 8
    assert second - first < 20
    lost_steps = 0.5 * sum(lengths)
    assert lost_steps <= LOSS_GRANT_STEPS + RESERVE_STEPS + (LOSS_SHARE + RESERVE_SHARE) * len(lengths)
