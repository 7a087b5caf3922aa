"""When a rank that does not answer counts as lost."""

from __future__ import annotations

import pytest

from penstock.cluster.transport.deadline import Deadline


@pytest.mark.parametrize(
    ("answers", "lost_at"),
    [
        ([], 120.0),  # all may be in a collective that they entered late
        ([100.2], 110.5),  # one is through: the others have the timeout, and a little more
        ([110.1], 110.6),  # one has given up
        ([100.2, 110.1], 110.5),  # who answers first decides
        ([119.9], 120.0),
    ],
)
def test_ranks_in_lock_step_answer_together(answers: list[float], lost_at: float) -> None:
    deadline = Deadline(10.0, 100.0)
    for now in answers:
        deadline.answered(now)
    assert deadline.at_s == pytest.approx(lost_at)


def test_a_rank_alone_waits_for_nobody() -> None:
    assert Deadline(10.0, 100.0, alone=True).at_s == pytest.approx(110.5)
