from __future__ import annotations

import random

import pytest

from penstock.cluster.calibration.paired import PairedMatches, paired_matches


def test_pairs_are_counted_by_who_was_right() -> None:
    answers = ["1", "2", "3", "4", "5"]
    found = paired_matches(["1", " 2\n", "3", "x", "x"], ["1", "x", "x ", "4", "y"], answers)
    assert found == PairedMatches(num_pairs=5, num_reference_right=3, num_lost=2, num_gained=1)
    assert (found.reference_share, found.share, found.loss) == pytest.approx((0.6, 0.4, 0.2))
    low, high = found.interval
    assert low < found.loss < high


def test_the_interval_is_not_a_point_where_nothing_is_lost() -> None:
    narrow, wide = PairedMatches(2000, 1900, 0, 0).interval, PairedMatches(100, 95, 0, 0).interval
    assert wide[0] == -wide[1]
    # By hand: 1.96 x sqrt(1) / (n + 2)
    assert (narrow[1], wide[1]) == pytest.approx((1.959964 / 2002, 1.959964 / 102))


@pytest.mark.parametrize(("lost", "gained"), [(0.0, 0.0), (0.02, 0.0), (0.03, 0.02), (0.2, 0.05)])
def test_the_interval_holds_the_true_loss_nineteen_times_in_twenty(lost: float, gained: float) -> None:
    draw = random.Random(4)
    inside, num_runs, num_pairs = 0, 400, 300
    for _ in range(num_runs):
        pairs = [draw.random() for _ in range(num_pairs)]
        found = PairedMatches(
            num_pairs, 250, sum(p < lost for p in pairs), sum(lost <= p < lost + gained for p in pairs)
        )
        inside += found.interval[0] <= lost - gained <= found.interval[1]
    assert inside / num_runs >= 0.92
    assert inside / num_runs <= 0.99 or lost + gained == 0


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ValueError, match="paired: expected as many of each, got 0, 0 and 0"):
        paired_matches([], [], [])
    with pytest.raises(ValueError, match="paired: expected as many of each, got 1, 2 and 1"):
        paired_matches(["a"], ["a", "b"], ["a"])
