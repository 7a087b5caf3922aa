"""Tokens chosen, and drafts accepted, on a GPU: the same as on a CPU."""

from __future__ import annotations

import random as plain_random

import pytest
import torch

from .triton_device import DEVICE, poisoned, random

import triton  # isort: skip
import triton.language as tl

from penstock.kernels.philox import philox4x32, split_seeds
from penstock.kernels.token_choice import choose_tokens, choose_tokens_reference, uniform_quads
from penstock.kernels.tree_acceptance import DraftTrees, accept_trees, accept_trees_reference
from penstock.workers.plan import RequestPlan
from penstock.workers.sampler import accept
from penstock.workers.sampling_params import TokenSampling
from penstock.workers.static_sampler import choose_tokens as static_choice

pytestmark = pytest.mark.usefixtures("poisoned")
__all__ = ["poisoned"]

SEEDS = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 0x0123456789ABCDEF]


@triton.jit
def _store_uniform(seeds, choices, positions, output, QUADS: tl.constexpr):
    row = tl.program_id(0)
    quads = tl.arange(0, QUADS)
    low, high = tl.load(seeds + 2 * row), tl.load(seeds + 2 * row + 1)
    choice, position = tl.load(choices + row).to(tl.uint32), tl.load(positions + row).to(tl.uint32)
    a, b, c, d = uniform_quads(low, high, choice, position, quads.to(tl.uint32))
    places = output + (row * QUADS + quads) * 4
    tl.store(places, a)
    tl.store(places + 1, b)
    tl.store(places + 2, c)
    tl.store(places + 3, d)


def test_uniform_numbers_are_those_of_the_cpu_to_the_bit():
    num_quads = 64
    seeds = split_seeds(SEEDS, DEVICE)
    choices = torch.arange(len(SEEDS), device=DEVICE)
    positions = torch.tensor([0, 1, 5, 4095, 2**20, 2**31 - 1, 7], device=DEVICE)
    output = torch.full((len(SEEDS), num_quads, 4), torch.nan, device=DEVICE)
    _store_uniform[(len(SEEDS),)](seeds, choices, positions, output, QUADS=num_quads)
    quads = torch.arange(num_quads)
    for row, (seed, choice, position) in enumerate(zip(SEEDS, choices.tolist(), positions.tolist(), strict=True)):
        counter = (quads, torch.full_like(quads, position), torch.full_like(quads, choice), torch.zeros_like(quads))
        words = torch.stack(philox4x32((seed & 0xFFFFFFFF, seed >> 32), counter), dim=-1)
        assert torch.equal(output[row].cpu(), ((words >> 9).float() + 0.5) * 2.0**-23)


@pytest.mark.parametrize(("num_rows", "vocabulary"), [(7, 1003), (2, 9000), (0, 64)])
def test_tokens_are_those_of_the_reference(num_rows, vocabulary):
    scores = random(num_rows, vocabulary, seed=3) * 2
    scores[:, ::3] = -torch.inf
    seeds = split_seeds(SEEDS[:num_rows], DEVICE).reshape(num_rows, 2)
    seeds[1::3] = -1  # greedy
    places = torch.arange(num_rows, device=DEVICE)
    result = choose_tokens(scores, seeds, places % 3, places + 40)
    assert torch.equal(result, choose_tokens_reference(scores, seeds, places % 3, places + 40))
    assert num_rows < 2 or result[1] == scores[1].argmax()


@pytest.mark.parametrize("vocabulary", [1000, 4096, 5000])
def test_scores_that_are_no_numbers_yield_a_token_that_can_be_embedded(vocabulary):
    """The device does so before the host has seen it."""
    scores = torch.full((2, vocabulary), torch.nan, device=DEVICE)
    scores[1, 7] = 1.0
    seeds = torch.full((2, 2), -1, device=DEVICE)
    places = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    tokens = choose_tokens(scores, seeds, places, places)
    assert ((tokens >= 0) & (tokens < vocabulary)).all()
    greedy = torch.zeros(2, device=DEVICE)
    tokens = static_choice(scores, greedy, seeds.clamp_min(0), places, places)
    assert ((tokens >= 0) & (tokens < vocabulary)).all()


def test_the_lowest_of_equal_tokens_is_chosen():
    scores = torch.zeros(3, 9001, device=DEVICE)
    scores[0, [8, 5000, 9000]] = 1.0
    scores[1, [8999, 9000]] = 1.0
    seeds = torch.full((3, 2), -1, device=DEVICE)
    places = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    assert choose_tokens(scores, seeds, places, places).tolist() == [8, 8999, 0]


def trees_of(requests: list[RequestPlan]) -> DraftTrees:
    rows = [len(request.token_ids) for request in requests]
    sampled = [request.num_sampled_rows for request in requests]

    def tensor(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=DEVICE)

    return DraftTrees(
        tensor([token for request in requests for token in request.token_ids]),
        tensor([parent for request in requests for parent in request.parents]),
        tensor([sum(rows[:i]) for i in range(len(rows))]),
        tensor(rows),
        tensor([request.first_sampled_row for request in requests]),
        tensor([sum(sampled[:i]) - request.first_sampled_row for i, request in enumerate(requests)]),
        max(rows),
    )


def request_of(rng: plain_random.Random, number: int) -> RequestPlan:
    known, yields = rng.randrange(1, 4), number % 5 != 0
    drafts = rng.randrange(12) if yields else 0
    parents = list(range(-1, known - 1))
    parents += [rng.randrange(max(known - 1, row - 3), row) for row in range(known, known + drafts)]
    return RequestPlan(
        request_id=number,
        committed_len=0,
        first_block=0,
        new_blocks=[],
        # Two tokens: many drafts are accepted, and siblings are alike
        token_ids=[rng.randrange(2) for _ in parents],
        parents=parents,
        first_sampled_row=known - 1 if yields else known,
        sampling=TokenSampling(),
    )


def test_walks_are_those_of_the_cpu():
    rng = plain_random.Random(5)
    requests = [request_of(rng, number) for number in range(40)]
    trees = trees_of(requests)
    tokens = [rng.randrange(2) for request in requests for _ in range(request.num_sampled_rows)]
    sampled = torch.tensor(tokens, device=DEVICE)
    result, expected = accept_trees(trees, sampled), accept_trees_reference(trees, sampled)
    for name in ("tokens", "path", "num_tokens"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name
    start, lengths = 0, result.num_tokens.tolist()
    for number, request in enumerate(requests):
        stop = start + request.num_sampled_rows
        emitted, path = accept(request, tokens[start:stop])
        assert result.tokens[number, : lengths[number]].tolist() == emitted
        assert result.path[number, : lengths[number]].tolist() == path[request.first_sampled_row :][: len(emitted)]
        start = stop
    assert max(lengths) > 4
    assert 0 in lengths
