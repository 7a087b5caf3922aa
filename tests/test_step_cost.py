from __future__ import annotations

import random
from itertools import pairwise

import pytest

from penstock.cluster.speculation.budget_level import BudgetLevel
from penstock.cluster.speculation.experts_curve import ExpertsCurve
from penstock.cluster.speculation.step_cost import StepCost, _bin_of

from .simulated_machine import NUM_EXPERTS, TOP_K, Machine, measured_experts


def taught(machine: Machine, sizes: list[int], num_steps: int, seed: int = 0) -> StepCost:
    """A cost model that saw steps of these sizes, the rows spread evenly over the ranks."""
    rng, cost = random.Random(seed), StepCost(NUM_EXPERTS, TOP_K, machine.num_ranks)
    for step in range(num_steps):
        num_rows = rng.choice(sizes)
        max_rows = -(-num_rows // machine.num_ranks)
        experts, sent = machine.experts(num_rows, rng), [0.9 * max_rows * (machine.num_ranks > 1)] * machine.num_ranks
        cost.learn_experts(num_rows, max(experts))
        time_s = machine.clock_s(machine.step_s([max_rows] * machine.num_ranks, experts, sent, step), rng)
        cost.learn(num_rows, max_rows, max(experts), max(sent), time_s)
    return cost


def true_s(machine: Machine, num_rows: int, step: int = 0) -> float:
    max_rows = -(-num_rows // machine.num_ranks)
    sent = 0.9 * max_rows * (machine.num_ranks > 1)
    imbalance = 1.07 if machine.num_ranks > 1 else 1.0
    experts = measured_experts(num_rows) / machine.num_ranks * imbalance
    return machine.step_s([max_rows], [experts], [sent], step)


def relative(cost: StepCost, machine: Machine, num_rows: int, step: int = 0) -> float:
    return cost.step_s(num_rows, -(-num_rows // machine.num_ranks)) / true_s(machine, num_rows, step)


MACHINES = {
    "priced": Machine(),
    "memory bound": Machine(fixed_s=0.0, per_expert_s=1e-3),
    "compute bound": Machine(fixed_s=1e-3, per_row_s=1e-3, per_expert_s=0.0),
    "two ranks": Machine(num_ranks=2, per_row_s=1e-4, per_row_sent_s=3e-4),
}


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_sizes_seen_and_between_are_priced(machine: Machine) -> None:
    cost = taught(machine, [2, 4, 8, 16], 200)
    for num_rows in (2, 4, 8, 16):
        assert relative(cost, machine, num_rows) == pytest.approx(1, abs=0.04)
    for num_rows in (3, 6, 12):
        assert relative(cost, machine, num_rows) == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize("seed", range(3))
def test_noise_and_outliers_do_not_mislead_it(seed: int) -> None:
    noisy = Machine(noise=0.2, outliers=0.02)
    cost = taught(noisy, [1, 2, 4, 8], 400, seed)
    for num_rows in (1, 2, 4, 8):
        assert relative(cost, noisy, num_rows) == pytest.approx(1, abs=0.12)
    # what counts is the ratio to the plain step
    assert cost.step_s(4, 4) / cost.step_s(1, 1) == pytest.approx(true_s(noisy, 4) / true_s(noisy, 1), rel=0.12)


def test_the_padding_of_graphs_is_learned_where_it_is_seen() -> None:
    padded = Machine(fixed_s=1e-3, per_row_s=0.5e-3, row_buckets=(1, 2, 4, 8, 16), per_expert_s=0.2e-3, experts_noise=0)
    cost = taught(padded, list(range(1, 17)), 600)
    for num_rows in range(1, 17):
        assert relative(cost, padded, num_rows) == pytest.approx(1, abs=0.04)


def test_before_larger_steps_are_seen_a_prior_prices_them() -> None:
    cost = taught(Machine(), [1], 20)
    plain = cost.step_s(1, 1)
    assert plain == pytest.approx(true_s(Machine(), 1), rel=0.03)
    # Dearer than free, cheaper than a plain step for every row
    assert 1.1 * plain < cost.step_s(2, 2) < 1.6 * plain
    assert cost.step_s(2, 2) < cost.step_s(4, 4) < 4 * plain


def test_a_machine_that_changes_is_followed() -> None:
    slower = Machine(drift=lambda step: 1.0 if step < 300 else 2.0)
    cost = taught(slower, [1, 2, 4], 600)
    for num_rows in (1, 2, 4):
        assert relative(cost, slower, num_rows, 600) == pytest.approx(1, abs=0.06)


def test_what_was_measured_at_other_sizes_is_not_forgotten() -> None:
    machine = Machine()
    rng, cost = random.Random(0), taught(machine, [1, 8], 100)
    for _ in range(500):
        experts = max(machine.experts(1, rng))
        cost.learn_experts(1, experts)
        cost.learn(1, 1, experts, 0.0, machine.step_s([1], [experts], [0.0], 0))
    assert relative(cost, machine, 8) == pytest.approx(1, abs=0.04)


def test_it_says_how_well_a_size_is_known() -> None:
    cost = StepCost(NUM_EXPERTS, TOP_K, 1)
    assert not cost.is_known
    assert (cost.num_seen(1), cost.relative_error(1)) == (0, 1)
    cost = taught(Machine(noise=0.2), [1], 20)
    assert (cost.is_known, cost.num_seen(1), cost.steps_since(1)) == (True, 20, 0)
    assert 0.02 < cost.relative_error(1) < 0.08
    assert cost.steps_since(4) == float("inf")
    assert cost.least_s(1, 1) <= cost.step_s(1, 1)


def test_a_size_is_vouched_for_by_one_that_is_near() -> None:
    cost = taught(Machine(noise=0.1), [16], 20)
    assert cost.is_measured(12)
    assert cost.steps_since(12) == 0
    assert cost.relative_error(16) < cost.relative_error(15) < cost.relative_error(12) < 0.5
    assert not cost.is_measured(8), "half of it is too far"
    assert cost.relative_error(8) == 1


def test_the_error_of_a_size_between_knows_of_steps_in_time() -> None:
    """As padded graphs make them: half a size on, a step takes as long, or half as long again."""
    smooth, padded = (
        taught(Machine(per_row_s=1e-3, row_buckets=buckets), [4, 5, 8, 9, 16, 17], 400)
        for buckets in ((), (4, 8, 16, 32))
    )
    assert padded.relative_error(12) > 1.3 * smooth.relative_error(12)
    assert padded.relative_error(16) == pytest.approx(smooth.relative_error(16), abs=0.01)


def test_powers_of_two_end_a_bin() -> None:
    assert [_bin_of(n) for n in (1, 2, 31, 32, 33, 34, 35, 64, 65, 68, 69, 128)] == [
        1, 2, 31, 32, 34, 34, 36, 64, 68, 68, 72, 128,
    ]  # fmt: skip


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_experts_curve_starts_at_uniform_routing_and_learns_what_is_counted(num_ranks: int) -> None:
    curve = ExpertsCurve(32, 4, num_ranks)
    for rows in (1, 2, 8, 64):
        assert curve.experts(rows) == pytest.approx(32 / num_ranks * (1 - (1 - 4 / 32) ** rows))
    for _ in range(30):
        for rows in (1, 2, 3, 4, 6, 8):
            curve.learn(rows, measured_experts(rows) / num_ranks)
    for rows in range(1, 9):
        assert curve.experts(rows) == pytest.approx(measured_experts(rows) / num_ranks, rel=0.05)


@pytest.mark.parametrize("seed", range(10))
def test_the_experts_curve_rises_and_flattens_whatever_it_was_told(seed: int) -> None:
    rng, curve = random.Random(seed), ExpertsCurve(64, 8, 1)
    for _ in range(40):
        curve.learn(rng.randrange(1, 200), rng.uniform(1, 64))
    values = [curve.experts(rows) for rows in range(1, 300)]
    slopes = [after - before for before, after in pairwise(values)]
    assert min(slopes) >= 0
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(slopes))


@pytest.mark.parametrize("seed", range(20))
def test_no_step_is_expected_to_take_no_time(seed: int) -> None:
    rng = random.Random(seed)
    cost = StepCost(32, 4, 2, [BudgetLevel(0.4), BudgetLevel(0.0)])
    for _ in range(300):
        rows, level = rng.randint(1, 24), rng.choice([None, 0, 1])
        budgeted = rng.randint(1, rows) if level is not None else 0
        # A machine on which anything may hold up anything
        step_s = 10 ** rng.uniform(-4, 1)
        cost.learn_experts(rows, rng.uniform(1, 16), level, budgeted)
        cost.learn(rows, rng.randint(1, rows), rng.uniform(1, 16), rng.uniform(0, 30), step_s, level, budgeted)
        for asked in (1, 2, 5, 9, 40):
            for under in (None, 0, 1):
                assert cost.step_s(asked, rng.randint(1, asked), under, rng.randint(0, asked)) > 0
