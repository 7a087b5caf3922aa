"""Random models whose routers choose as unevenly as trained ones: what unevenness is, and that they do."""

from __future__ import annotations

import pytest
import torch

from penstock.benchmarks.random_model import DEMO, NUM_TOPICS, UNEQUAL, tokens_of
from penstock.benchmarks.routing_skew import of_demo, of_random, unevenness


def test_a_random_model_routes_as_unevenly_as_the_demo() -> None:
    real, made = of_demo(32), of_random(DEMO, seed=1)
    assert made.distinct_in_text == pytest.approx(real.distinct_in_text, rel=0.06)
    assert made.distinct_of_texts == pytest.approx(real.distinct_of_texts, rel=0.04)
    assert made.load_spread == pytest.approx(real.load_spread, rel=0.35)
    unequal = of_random(UNEQUAL, seed=1)
    assert unequal.distinct_in_text < unequal.distinct_of_texts < 0.9 * made.distinct_of_texts
    assert unequal.load_spread > 2 * made.load_spread


def test_unevenness_counts_experts_of_neighbours_and_of_texts() -> None:
    texts = [torch.full((2, 16, 1), number) for number in range(8)]
    found = unevenness(texts, 16)
    assert (found.distinct_in_text, found.distinct_of_texts) == (1, 8)
    assert found.load_spread == pytest.approx(1.0)  # half of the experts do all
    even = [torch.arange(16).view(1, 16, 1)] * 8
    assert unevenness(even, 16).load_spread == pytest.approx(0.0, abs=1e-6)
    assert unevenness(even, 16).distinct_in_text == 8


def test_tokens_are_of_their_topic() -> None:
    generator = torch.Generator().manual_seed(0)
    for vocab_size in (96, 1024, 50304):
        for topic in (0, 31, 40, 63, 70):
            tokens = tokens_of(topic, 50, vocab_size, generator)
            assert {token % NUM_TOPICS for token in tokens} == {topic % NUM_TOPICS}
            assert all(0 <= token < vocab_size for token in tokens)
