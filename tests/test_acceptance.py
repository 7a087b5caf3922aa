from __future__ import annotations

import random

import pytest

from penstock.cluster.speculation.acceptance import AcceptanceModel
from penstock.cluster.speculation.observation import ShadowTrial
from penstock.cluster.speculation.proposal import Evidence


def evidence(match_len: int = 2, frequency: float | None = 0.6, source: str = "ngram") -> Evidence:
    return Evidence(source, match_len, () if frequency is None else (frequency,) * 8)


def teach(model: AcceptanceModel, key: int, seen: Evidence, right: float, num_trials: int, seed: int = 0) -> None:
    """Trials of eight tokens, each right with probability ``right``."""
    rng = random.Random(seed)
    for _ in range(num_trials):
        run = 0
        while run < 8 and rng.random() < right:
            run += 1
        model.learn(ShadowTrial(key, seen, 0, run, min(run + 1, 8)))


def test_the_prior_believes_longer_matches_more() -> None:
    model = AcceptanceModel()
    first = [model.probabilities(0, evidence(match_len), 1)[0] for match_len in range(6)]
    assert first == sorted(first)
    assert 0.2 < first[0] < first[-1] < 0.9
    assert model.probabilities(0, evidence(), 0) == []


@pytest.mark.parametrize("right", [0.1, 0.5, 0.9])
def test_it_learns_the_probability_of_every_position(right: float) -> None:
    model = AcceptanceModel()
    teach(model, 0, evidence(), right, 400)
    model.forget(0)
    tested = 1 if right < 0.3 else 4  # further positions are reached too seldom to be known
    assert model.probabilities(1, evidence(), tested) == pytest.approx([right] * tested, abs=0.1)


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (evidence(match_len=4), evidence(match_len=1)),
        (evidence(frequency=0.9), evidence(frequency=0.2)),
        (evidence(source="suffix"), evidence(source="ngram")),
        (evidence(frequency=0.5), evidence(frequency=None)),
    ],
)
def test_evidence_tells_proposals_apart(good: Evidence, bad: Evidence) -> None:
    model = AcceptanceModel()
    for round_ in range(60):
        teach(model, 2 * round_, good, 0.9, 2, round_)
        teach(model, 2 * round_ + 1, bad, 0.1, 2, round_ + 1000)
    assert model.probabilities(999, good, 1)[0] > 0.8
    assert model.probabilities(999, bad, 1)[0] < 0.25


def test_positions_differ() -> None:
    model = AcceptanceModel()
    for _ in range(200):
        model.learn(ShadowTrial(0, evidence(), 0, 1, 2))
    model.forget(0)
    first, second = model.probabilities(1, evidence(), 2)
    assert first > 0.9
    assert second < 0.15


def test_requests_differ_and_are_shrunk_to_all_others() -> None:
    model = AcceptanceModel()
    for round_ in range(40):
        teach(model, 0, evidence(), 0.85, 3, round_)
        teach(model, 1, evidence(), 0.15, 3, round_ + 500)
    good, bad, new = (model.probabilities(key, evidence(), 1)[0] for key in (0, 1, 2))
    assert bad < 0.3 < new < 0.6 < good
    # One observation moves a new request a little
    teach(model, 2, evidence(), 0.0, 1)
    assert new - 0.3 < model.probabilities(2, evidence(), 1)[0] < new


def test_drift_is_followed_within_a_few_dozen_tokens() -> None:
    model = AcceptanceModel()
    teach(model, 0, evidence(), 0.9, 300)
    assert model.probabilities(0, evidence(), 1)[0] > 0.8
    teach(model, 0, evidence(), 0.05, 20)
    assert model.probabilities(0, evidence(), 1)[0] < 0.35


def test_continued_trials_teach_only_what_is_new() -> None:
    whole, parts = AcceptanceModel(), AcceptanceModel()
    whole.learn(ShadowTrial(0, evidence(), 0, 3, 4))
    for first, right, known in ((0, 1, 1), (1, 3, 3), (3, 3, 4)):
        parts.learn(ShadowTrial(0, evidence(), first, right, known))
    assert whole.probabilities(0, evidence(), 4) == parts.probabilities(0, evidence(), 4)
