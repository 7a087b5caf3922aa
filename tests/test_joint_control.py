"""Draft lengths and budgets chosen together: a level where it saves time, none where it does not, and no loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from penstock.cluster.engine.budget import EngineBudget
from penstock.cluster.speculation.batch import Batch, RequestView
from penstock.cluster.speculation.budget_level import BudgetLevel
from penstock.cluster.speculation.cascade import CascadeController
from penstock.cluster.speculation.experts_curve import BudgetedCurve, ExpertsCurve
from penstock.cluster.speculation.fixed import FixedController
from penstock.cluster.speculation.observation import StepObservation
from penstock.cluster.speculation.options import SpeculationOptions
from penstock.cluster.speculation.prediction import PREDICTION
from penstock.cluster.speculation.proposal import Evidence, Proposal
from penstock.cluster.speculation.shadow import ShadowController
from penstock.cluster.speculation.step_cost import StepCost
from penstock.router.expert_budget import ExpertBudget

from .simulated_jobs import Job, bernoulli, jobs_of
from .simulated_machine import MACHINES, NOISY, NUM_EXPERTS, TOP_K, Machine, TrueLevel, at_most, measured_experts
from .speculation_simulator import Run, simulate

NO_LOSS = 0.98
PRICED = MACHINES["priced"]
LEVELS = [
    BudgetLevel(0.17),
    BudgetLevel(0.36),
]
TRUE = [TrueLevel(at_most(13)), TrueLevel(at_most(10))]
USELESS = [TrueLevel(), TrueLevel()]
TRAFFIC = BudgetLevel(0.0, ranks_kept=2 / 3)


def served(
    jobs: Sequence[Job],
    machine: Machine,
    levels: Sequence[BudgetLevel] = LEVELS,
    true: Sequence[TrueLevel] = TRUE,
    *,
    batch_size: int = 1,
    prefill_chunk: int = 0,
) -> Run:
    controller = ShadowController(7, NUM_EXPERTS, TOP_K, machine.num_ranks, levels)
    return simulate(controller, jobs, machine, batch_size=batch_size, levels=true, prefill_chunk=prefill_chunk)


def share(run: Run, level: int | None) -> float:
    """Of the steps that verified drafts, those under a level."""
    return run.levels.count(level) / len(run.levels)


@pytest.mark.parametrize(
    ("machine", "curve", "gain"),
    [("priced", "often", 1.08), ("priced", "nearly always", 1.25), ("memory bound", "nearly always", 1.4)],
)
@pytest.mark.parametrize("clock", ["exact", "noisy"])
def test_the_level_that_saves_most_is_found_where_experts_take_time(
    machine: str, curve: str, gain: float, clock: str
) -> None:
    subject = replace(MACHINES[machine], **NOISY) if clock == "noisy" else MACHINES[machine]
    jobs = jobs_of(curve, 4, 400)
    exact, joint = served(jobs, subject, [], []), served(jobs, subject)
    assert joint.rate >= gain * exact.rate
    assert share(joint, 1) > 0.6


def test_no_budget_is_kept_to_where_neither_experts_nor_traffic_take_time() -> None:
    for machine in (
        Machine(fixed_s=1e-3, per_row_s=2e-3, per_expert_s=0.0),
        Machine(fixed_s=5e-3, per_expert_s=0.0),
        Machine(fixed_s=1e-3, per_row_s=1e-3, per_expert_s=0.0, num_ranks=2),
    ):
        run = served(jobs_of("nearly always", 4, 400), machine, batch_size=machine.num_ranks)
        assert len(run.levels) > 80
        assert share(run, None) > 0.9


def test_a_budget_that_saves_less_than_choosing_costs_is_given_up() -> None:
    run = served(jobs_of("nearly always", 6, 400), replace(PRICED, choice_s=4e-3))
    assert set(run.levels[len(run.levels) // 2 :]) == {None}
    cheap = served(jobs_of("nearly always", 6, 400), replace(PRICED, choice_s=0.2e-3))
    assert share(cheap, 1) > 0.8


def test_of_budgets_that_bring_the_same_the_first_is_taken() -> None:
    twins = [LEVELS[1], LEVELS[1]]
    run = served(jobs_of("nearly always", 4, 400), PRICED, twins, [TRUE[1], TRUE[1]])
    assert share(run, 0) > 0.9
    assert 1 not in run.levels


def test_a_limit_on_ranks_is_chosen_where_traffic_takes_the_time() -> None:
    machine = Machine(num_ranks=4, fixed_s=2e-3, per_expert_s=0.0, per_row_sent_s=0.4e-3, **NOISY)
    levels, true = [LEVELS[1], TRAFFIC], [TRUE[1], TrueLevel(sent=0.5)]
    jobs = jobs_of("nearly always", 16, 300)
    exact = served(jobs, machine, [], [], batch_size=4)
    joint = served(jobs, machine, levels, true, batch_size=4)
    assert share(joint, 1) > 0.7
    assert joint.rate > 1.15 * exact.rate
    no_traffic = replace(machine, per_row_sent_s=0.0, per_row_s=0.4e-3)
    assert share(served(jobs, no_traffic, levels, true, batch_size=4), None) > 0.8


@pytest.mark.parametrize("true", [TRUE, USELESS], ids=["as calibrated", "useless"])
@pytest.mark.parametrize("machine", ["priced", "memory bound", "compute bound", "padded graphs"])
def test_no_curve_loses_at_batch_1(machine: str, true: list[TrueLevel]) -> None:
    """Whatever the levels save: as much as was calibrated, or nothing, at a price."""
    subject = replace(MACHINES[machine], **NOISY, choice_s=0.0 if true is TRUE else 0.5e-3)
    for curve in ("never", "seldom", "sometimes", "drifting", "flipping fast"):
        jobs = jobs_of(curve, 4, 256)
        plain = simulate(FixedController(0), jobs, subject).rate
        assert served(jobs, subject, true=true).rate >= NO_LOSS * plain, curve


@pytest.mark.parametrize(("batch_size", "num_ranks"), [(4, 1), (16, 2)])
def test_no_curve_loses_in_batches(batch_size: int, num_ranks: int) -> None:
    subject = replace(PRICED, num_ranks=num_ranks, **NOISY)
    for curve in ("never", "seldom"):
        jobs = jobs_of(curve, 5 * batch_size, 96)
        plain = simulate(FixedController(0), jobs, subject, batch_size=batch_size).rate
        for true in (TRUE, USELESS):
            assert served(jobs, subject, true=true, batch_size=batch_size).rate >= NO_LOSS * plain, curve


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("right", [0.0, 0.3])
def test_prompts_that_come_between_do_not_mislead_it(right: float, batch_size: int) -> None:
    machine, options = replace(PRICED, **NOISY), {"batch_size": batch_size, "prefill_chunk": 16}
    jobs = [bernoulli(key, 150 + 53 * key % 160, lambda i: right, num_prompt=100) for key in range(4 * batch_size)]
    plain = simulate(FixedController(0), jobs, machine, **options).rate
    for true in (TRUE, USELESS):
        assert served(jobs, machine, true=true, **options).rate >= NO_LOSS * plain


@pytest.mark.parametrize("true", [TRUE, USELESS], ids=["as calibrated", "useless"])
def test_an_adversary_gains_nothing(true: list[TrueLevel]) -> None:
    """Drafts that are right whenever the last step verified none, and wrong whenever it did."""
    subject = replace(PRICED, **NOISY)
    controller = ShadowController(7, NUM_EXPERTS, TOP_K, 1, LEVELS)

    def runs(num_output: int, key: int = 0) -> int:
        return 0 if controller.report(key).draft_len else 7

    texts = jobs_of("never", 2, 400)
    jobs = [Job(job.prompt, job.output, lambda n, key=key: runs(n, key)) for key, job in enumerate(texts)]
    plain = simulate(FixedController(0), jobs, subject).rate
    assert simulate(controller, jobs, subject, levels=true).rate >= NO_LOSS * plain


def test_requests_that_refuse_budgets_are_served_as_if_there_were_none() -> None:
    jobs = [replace(job, options=SpeculationOptions(expert_budget="off")) for job in jobs_of("nearly always", 4, 200)]
    with_levels, without = served(jobs, PRICED), served(jobs, PRICED, [], [])
    assert with_levels.draft_lens == without.draft_lens
    assert not with_levels.levels


def test_a_level_is_chosen_for_requests_with_lengths_of_their_own() -> None:
    jobs = [replace(job, options=SpeculationOptions("fixed", 7)) for job in jobs_of("sometimes", 4, 300)]
    run = served(jobs, PRICED)
    assert share(run, 1) > 0.9
    assert run.rate > 1.2 * served(jobs, PRICED, [], []).rate
    compute_bound = Machine(fixed_s=1e-3, per_row_s=2e-3, per_expert_s=0.0)
    assert share(served(jobs, compute_bound), None) > 0.9


def test_beside_prompts_the_level_is_what_it_saves_there() -> None:
    """A level that saves much alone saves nothing beside a long prompt, which reads every expert."""
    controller = ShadowController(7, NUM_EXPERTS, TOP_K, 1, LEVELS[1:])
    run = simulate(controller, jobs_of("nearly always", 4, 300), PRICED, levels=TRUE[1:])
    assert share(run, 0) > 0.9
    for rows in (64, 128, 256, 512):
        controller.observe(StepObservation(0.02, [], [rows], True, [measured_experts(rows)], [0.0]))
    views, proposal = [RequestView(0, 0, 64, 7)], Proposal([1] * 7, Evidence("scripted", 3))
    assert controller.draft_lens(Batch(views), [proposal]) == [7]
    assert controller.budget_level() == 0
    assert controller.draft_lens(Batch(views, prompt_rows=[400]), [proposal]) == [7]
    assert controller.budget_level() is None


def test_a_decision_is_the_same_when_asked_again_and_none_before_anything_is_known() -> None:
    controller = ShadowController(7, NUM_EXPERTS, TOP_K, 1, LEVELS)
    batch = Batch([RequestView(0, 0, 64, 5, is_fixed=True)])
    proposal = Proposal([1] * 5, Evidence("scripted", 3))
    assert controller.draft_lens(batch, [proposal]) == [5]
    assert controller.budget_level() is None
    simulate(controller, jobs_of("nearly always", 4, 200), PRICED, levels=TRUE)
    first = controller.draft_lens(batch, [proposal]), controller.budget_level()
    assert first == ([5], 1)
    assert (controller.draft_lens(batch, [proposal]), controller.budget_level()) == first


def test_others_keep_to_the_first_level() -> None:
    assert FixedController(3).budget_level() == CascadeController(7).budget_level() == 0


def test_drafts_of_the_requests_own_are_not_budgeted() -> None:
    view = RequestView(0, 0, 64, 7)
    assert view.keeps_to_budget(Proposal([1], Evidence("ngram", 3)))
    assert not view.keeps_to_budget(Proposal([1], Evidence(PREDICTION, 3)))
    assert not replace(view, allows_budget=False).keeps_to_budget(Proposal([1], Evidence("ngram", 3)))


# --- what a level is expected to leave -------------------------------------------------------------------------------


def curves(level: BudgetLevel) -> tuple[ExpertsCurve, BudgetedCurve]:
    exact = ExpertsCurve(NUM_EXPERTS, TOP_K, 1)
    for _ in range(30):
        for rows in (1, 2, 4, 8, 16):
            exact.learn(rows, measured_experts(rows))
    return exact, BudgetedCurve(NUM_EXPERTS, TOP_K, 1, exact, level)


def test_before_a_level_is_tried_it_is_expected_to_save_what_it_saved_when_calibrated() -> None:
    exact, curve = curves(LEVELS[1])
    assert curve.experts(1) == pytest.approx(exact.experts(1))
    assert curve.experts(8) == pytest.approx(0.64 * exact.experts(8), rel=0.01)
    assert 0.64 * exact.experts(4) < curve.experts(4) < exact.experts(4)
    _, traffic = curves(TRAFFIC)
    assert traffic.experts(8) == pytest.approx(exact.experts(8))


def test_what_is_counted_takes_its_place_and_is_forgotten_in_time() -> None:
    exact, curve = curves(LEVELS[1])
    expected = curve.experts(8)
    for _ in range(20):
        curve.learn(8, 15.0)
    assert curve.experts(8) == pytest.approx(15.0, rel=0.03)
    for _ in range(6000):
        exact.learn(8, measured_experts(8))
    assert curve.experts(8) == pytest.approx(expected, rel=0.05)
    for _ in range(20):
        curve.learn(8, 40.0)
    assert curve.experts(8) == exact.experts(8), "a budget never adds any"


def test_what_no_profile_tells_of_a_budget_is_assumed() -> None:
    experts, ranks = ExpertBudget(experts=10, scope="request"), ExpertBudget(min_rank_share=0.2)
    assert EngineBudget(experts).level == BudgetLevel(1 / 3)
    assert EngineBudget(ranks).level == BudgetLevel(0.0, ranks_kept=2 / 3)
    assert EngineBudget(experts, 0.4, 5).level == BudgetLevel(0.4, 5)


@pytest.mark.parametrize("share_kept", [0.5, 1.0])
def test_steps_of_which_a_part_keeps_to_a_level_are_priced_by_that_part(share_kept: float) -> None:
    machine = Machine(experts_noise=0.0)
    cost = StepCost(NUM_EXPERTS, TOP_K, 1, LEVELS[1:])
    for _ in range(40):
        for rows in (1, 2, 4, 8, 16):
            for level in (None, 0) if rows > 1 else (None,):
                budgeted = round(share_kept * rows) if level is not None else 0
                experts = measured_experts(rows) * (1 - budgeted / rows * (1 - TRUE[1].experts(rows)))
                cost.learn_experts(rows, experts, level, budgeted)
                cost.learn(rows, rows, experts, 0.0, machine.step_s([rows], [experts], [0.0], 0), level, budgeted)
    for budgeted in (0, 4, 8):
        read = measured_experts(8) * (1 - budgeted / 8 * (1 - TRUE[1].experts(8)))
        wanted = machine.step_s([8], [read], [0.0], 0)
        assert cost.step_s(8, 8, 0, budgeted) == pytest.approx(wanted, rel=0.04)
    assert cost.budgets_matter
