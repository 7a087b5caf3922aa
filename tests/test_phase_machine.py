from __future__ import annotations

import pytest

from penstock.cluster.speculation.phase_machine import BASELINE, DISABLED, SET, TEST, PhaseMachine


def run(machine: PhaseMachine, utilities: dict[int, float], num_steps: int, baseline_s: float = 1.0) -> list[int]:
    """Feed steps whose length K has the given utility (1 token more a step costs as much time more); K per step."""
    lengths = []
    for _ in range(num_steps):
        draft_len = machine.draft_len
        lengths.append(draft_len)
        tokens = 1.0 + draft_len
        step_s = tokens / utilities[draft_len] if draft_len else 1.0
        machine.observe(tokens, step_s, baseline_s, drafted=draft_len > 0)
    return lengths


def blocks(lengths: list[int]) -> list[tuple[int, int]]:
    """Run-length encode."""
    found: list[tuple[int, int]] = []
    for length in lengths:
        found[-1:] = [(length, found[-1][1] + 1)] if found and found[-1][0] == length else [*found[-1:], (length, 1)]
    return found


def measured(max_draft_len: int = 7, start_len: int = 3) -> PhaseMachine:
    machine = PhaseMachine(max_draft_len, start_len)
    machine.observe(1.0, 1.0, 1.0, drafted=False)
    return machine


def test_nothing_is_drafted_before_the_plain_step_is_measured() -> None:
    machine = PhaseMachine(7, 3)
    for _ in range(5):
        assert (machine.phase, machine.draft_len) == (BASELINE, 0)
        machine.observe(1.0, 1.0, None, drafted=False)
    machine.observe(1.0, 1.0, 1.0, drafted=False)
    assert (machine.phase, machine.draft_len) == (TEST, 3)


def test_the_length_climbs_while_utility_rises_and_stops_at_a_decline() -> None:
    machine = measured()
    utilities = {1: 1.0, 2: 1.1, 3: 1.2, 4: 1.4, 5: 1.3, 6: 2.0, 7: 2.0}
    assert blocks(run(machine, utilities, 4 + 4 + 4 + 16)) == [(3, 4), (4, 4), (5, 4), (4, 16)]
    # The next test starts at the winner; its first step up declines, and so does the first down
    assert (machine.phase, machine.draft_len, machine.winner) == (TEST, 4, 4)
    assert blocks(run(machine, utilities, 12 + 16)) == [(4, 4), (5, 4), (3, 4), (4, 16)]


def test_the_length_climbs_down_if_the_first_step_up_is_none() -> None:
    utilities = {1: 1.3, 2: 1.2, 3: 1.1, 4: 1.0}
    assert blocks(run(measured(), utilities, 16 + 16)) == [(3, 4), (4, 4), (2, 4), (1, 20)]


def test_a_test_has_four_trials_at_most_and_stays_within_bounds() -> None:
    rising = {k: 1 + 0.1 * k for k in range(1, 9)}
    assert blocks(run(measured(), rising, 16 + 16)) == [(3, 4), (4, 4), (5, 4), (6, 20)]
    at_bound = measured(max_draft_len=3)
    assert blocks(run(at_bound, rising, 8 + 16)) == [(3, 4), (2, 4), (3, 16)]
    alone = measured(max_draft_len=1, start_len=1)
    assert blocks(run(alone, rising, 4 + 16)) == [(1, 20)]


def test_one_smaller_length_is_tried_before_speculation_is_disabled() -> None:
    machine = measured()
    # All drafts are right here, so two steps tell that the first trial cannot win
    assert blocks(run(machine, {1: 1.1, 3: 0.9}, 6 + 16)) == [(3, 2), (1, 20)]
    machine = measured()
    assert blocks(run(machine, {1: 0.9, 3: 0.8}, 6 + 16)) == [(3, 2), (1, 4), (0, 16)]
    machine = measured(start_len=1)
    assert blocks(run(machine, {1: 0.9}, 2 + 16)) == [(1, 2), (0, 16)]


def test_disabled_phases_double_and_only_length_one_is_probed() -> None:
    machine = measured()
    lengths = blocks(run(machine, dict.fromkeys(range(1, 8), 0.9), 700))
    assert lengths[:12] == [
        (3, 2), (1, 4), (0, 16), (1, 2), (0, 32), (1, 2), (0, 64), (1, 2), (0, 128), (1, 2), (0, 128), (1, 2),
    ]  # fmt: skip


def test_a_win_resets_the_disabled_phase() -> None:
    machine = measured()
    run(machine, dict.fromkeys(range(1, 8), 0.9), 6 + 16 + 2 + 32)
    assert (machine.phase, machine.draft_len) == (TEST, 1)
    # The probe wins, and climbs from there
    assert blocks(run(machine, {1: 1.1, 2: 1.2, 3: 1.1}, 12 + 16)) == [(1, 4), (2, 4), (3, 4), (2, 16)]
    lengths = blocks(run(machine, dict.fromkeys(range(1, 8), 0.9), 6 + 16 + 2))
    assert lengths == [(2, 2), (1, 4), (0, 16), (1, 2)]


def test_a_step_without_a_proposal_says_nothing_of_the_length() -> None:
    machine = measured()
    for _ in range(50):
        machine.observe(1.0, 1.0, 1.0, drafted=False)
    assert (machine.phase, machine.draft_len) == (TEST, 3)
    assert blocks(run(machine, {1: 0.5, 3: 0.5}, 6)) == [(3, 2), (1, 4)]
    assert machine.phase == DISABLED
    # but it is a step of the phase
    for _ in range(16):
        machine.observe(1.0, 1.0, 1.0, drafted=False)
    assert machine.phase == TEST


def test_one_slow_step_does_not_decide_a_trial() -> None:
    machine = measured()
    for factor in (1.0, 10.0, 1.0, 1.0):
        machine.observe(4.0, 2.0 * factor, 1.0, drafted=True)
    assert (machine.phase, machine.draft_len) == (TEST, 4), "utility 2, not below 1"


def test_a_lost_baseline_suspends_the_machine() -> None:
    machine = measured()
    run(machine, {3: 1.5, 4: 1.2, 2: 1.2}, 12)
    assert machine.phase == SET
    machine.observe(1.0, 1.0, None, drafted=True)
    assert (machine.phase, machine.draft_len, machine.winner) == (BASELINE, 0, 3)
    machine.observe(1.0, 1.0, 1.0, drafted=False)
    assert (machine.phase, machine.draft_len) == (TEST, 3)


@pytest.mark.parametrize("start_len", [0, 8])
def test_the_first_trial_lies_within_bounds(start_len: int) -> None:
    with pytest.raises(AssertionError):
        PhaseMachine(7, start_len)
