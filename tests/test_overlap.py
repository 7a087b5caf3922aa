"""When a step is worth more for being sent early than for its drafts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from penstock.cluster.speculation.batch import Batch, RequestView
from penstock.cluster.speculation.observation import RequestOutcome, ShadowTrial, StepObservation
from penstock.cluster.speculation.overlap import Overlap
from penstock.cluster.speculation.proposal import NOTHING, Evidence, Proposal
from penstock.cluster.speculation.shadow import ShadowController

MATCH = Proposal([1, 2], Evidence("suffix", 5))
PLAIN = StepObservation(0.010, [RequestOutcome(7, 0, 0, 1)], [1], False, [4.0], [0.0], waited_s=0.003)
AHEAD = replace(PLAIN, step_s=0.0075, waited_s=0.0005, was_ahead=True)


def test_what_drafts_save_is_learned_by_the_evidence_of_the_position_before() -> None:
    overlap = Overlap()
    for place in range(200):
        before, after = (MATCH, NOTHING) if place % 2 else (NOTHING, MATCH)
        overlap.note([7], [before], {7: 0.4} if before is MATCH else {})
        assert after is not before
        overlap.observe(PLAIN)
    overlap.note([7], [NOTHING], {})
    assert overlap.expected([7]) == pytest.approx(0.4, abs=0.05)
    overlap.note([7], [MATCH], {7: 0.4})
    assert overlap.expected([7]) == pytest.approx(0.0, abs=0.05)
    assert overlap.expected([7, 8]) > 0.9, "of a request that nothing is known of, much is expected"


def test_of_evidence_that_was_never_seen_as_much_is_expected_as_of_all() -> None:
    overlap = Overlap()
    for _ in range(200):
        overlap.note([7], [NOTHING], {7: 0.3})
        overlap.observe(PLAIN)
    overlap.note([7], [MATCH], {})
    assert overlap.expected([7]) == pytest.approx(0.3, abs=0.05)


def test_a_position_behind_drafts_is_not_the_next_one() -> None:
    overlap = Overlap()
    for _ in range(50):
        overlap.note([7], [MATCH], {7: 0.4})
        overlap.observe(replace(PLAIN, requests=[RequestOutcome(7, 2, 2, 3)]))
    overlap.note([7], [MATCH], {7: 0.4})
    assert overlap.expected([7]) == 1.0, "nothing was learned"


def test_a_decision_that_is_made_again_teaches_once() -> None:
    once, again = Overlap(), Overlap()
    for overlap, times in ((once, 1), (again, 3)):
        for saved in (0.0, 0.6, 0.0):
            for _ in range(times):
                overlap.note([7], [MATCH], {7: saved})
            overlap.observe(PLAIN)
        overlap.note([7], [MATCH], {})
    assert once.expected([7]) == again.expected([7])


def test_times_are_those_of_steps_that_could_have_been_sent_ahead() -> None:
    overlap = Overlap()
    assert overlap.as_if_after(AHEAD) == AHEAD
    for _ in range(8):
        overlap.observe(replace(PLAIN, waited_s=None))
    assert overlap.wait_s == 0.0, "nobody waited"
    for waited_s in (0.003, 9.0, 0.003, 0.003):
        overlap.observe(replace(PLAIN, waited_s=waited_s))
    overlap.observe(AHEAD)
    assert overlap.wait_s == pytest.approx(0.0025), "a moment without requests is no wait"
    assert overlap.as_if_after(AHEAD).step_s == pytest.approx(PLAIN.step_s)
    assert overlap.as_if_after(PLAIN) is PLAIN


def controller_after(waited_s: float | None, match_is_right: bool, num_steps: int = 400) -> ShadowController:
    """Return a controller that has seen plain steps of 10 ms, two rows in 11 ms, and matches every other token."""
    controller = ShadowController(4, 8, 2, 1)
    for place in range(num_steps):
        batch = Batch([RequestView(7, 0, 10 + place, 4)])
        controller.max_draft_lens(batch)
        proposal = MATCH if place % 2 else NOTHING
        (drafted,) = controller.draft_lens(batch, [proposal])
        accepted = drafted if match_is_right else 0
        step_s = 0.010 + 0.001 * drafted
        outcome = RequestOutcome(7, drafted, accepted, accepted + 1)
        controller.observe(StepObservation(step_s, [outcome], [1 + drafted], False, [4.0], [0.0], None, 0, waited_s))
        right = len(proposal) if match_is_right else 0
        controller.learn(
            [ShadowTrial(7, proposal.evidence, 0, right, min(right + 1, len(proposal)))] if proposal else []
        )
    batch = Batch([RequestView(7, 0, 999, 4)])
    controller.draft_lens(batch, [NOTHING])
    return controller


def rests(controller: ShadowController) -> bool:
    return controller.rests(Batch([RequestView(7, 0, 1000, 4)]))


def test_shadow_waits_for_drafts_that_save_more_than_waiting_takes() -> None:
    assert not rests(controller_after(0.002, match_is_right=True))
    assert rests(controller_after(0.002, match_is_right=False))
    assert not rests(controller_after(None, match_is_right=False)), "where no step is ever sent ahead"
    assert rests(controller_after(0.030, match_is_right=True)), "ranks would wait for three steps' time"


def test_drafts_are_charged_with_the_wait_behind_them() -> None:
    batch = Batch([RequestView(7, 0, 1000, 4)])
    assert controller_after(0.002, match_is_right=True).draft_lens(batch, [MATCH]) == [2]
    assert controller_after(0.030, match_is_right=True).draft_lens(batch, [MATCH]) == [0]


def test_a_step_that_was_sent_verifies_nothing_and_teaches() -> None:
    controller = controller_after(0.002, match_is_right=True)
    batch = Batch([RequestView(7, 0, 1000, 4)], is_sent=True)
    assert controller.draft_lens(batch, [MATCH]) == [0]
    assert controller.budget_level() is None
    assert controller._overlap._noted[7][1] > 0


def test_what_drafts_save_is_less_by_the_wait_behind_them() -> None:
    """By as much of it as the drafts after them would not make up for: nothing, then a part."""
    for waited_s in (0.004, 0.015):
        controller = controller_after(waited_s, match_is_right=True)
        assert controller.draft_lens(Batch([RequestView(7, 0, 1000, 4)]), [MATCH]) == [2]
        charged = controller._overlap.gain_s([MATCH], 0.010) / 0.010
        assert (charged > 0.5) == (waited_s > 0.010)
        # Three tokens in a step of 12 ms save 1.8 plain steps of 10 ms
        assert controller._overlap._noted[7][1] == pytest.approx(1.8 - charged, abs=0.01)
