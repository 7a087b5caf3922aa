from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.router.affine import affine
from penstock.router.balanced import balanced
from penstock.router.placement import Placement, contiguous
from penstock.router.rank_visits import (
    expert_loads,
    load_imbalance,
    payload_bytes_per_row,
    rank_loads,
    ranks_visited,
    rows_sent,
)

from .random_placement import random_ids

REPLICATED = Placement(
    6,
    4,
    (
        ((2,), (0,), (2,), (1,), (3,), (0, 1, 2, 3)),
        ((0, 2), (1, 2), (1,), (3,), (0,), (0, 1, 3)),
    ),
)


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(1, 1), (8, 1), (8, 2), (8, 3), (60, 8), (7, 7), (128, 5)])
def test_contiguous_gives_every_expert_to_one_rank_in_equal_runs(num_experts: int, num_ranks: int) -> None:
    placement = contiguous(3, num_experts, num_ranks)
    assert placement.num_layers == 3
    for layer in range(3):
        held = [placement.experts_of(layer, rank) for rank in range(num_ranks)]
        assert [expert for run in held for expert in run] == list(range(num_experts))
        sizes = [len(run) for run in held]
        assert sizes == sorted(sizes, reverse=True)
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1


def test_a_row_goes_to_its_own_rank_first_and_the_sentinel_to_nobody() -> None:
    assert REPLICATED.experts_of(0, 2) == [0, 2, 5]
    assert [REPLICATED.owner_table(0, rank)[5] for rank in range(4)] == [0, 1, 2, 3]
    # Ranks 1 and 3 do not hold expert 0 of layer 1, 0 and 3 not expert 1: one goes to each holder, in turns
    assert [REPLICATED.owner_table(1, rank)[0] for rank in range(4)] == [0, 0, 2, 2]
    assert [REPLICATED.owner_table(1, rank)[1] for rank in range(4)] == [2, 1, 2, 1]
    assert [REPLICATED.owner_table(1, rank)[5] for rank in range(4)] == [0, 1, 3, 3]
    for layer in range(2):
        for rank in range(4):
            owner, local = REPLICATED.owner_table(layer, rank).tolist(), REPLICATED.local_ids(layer, rank).tolist()
            assert (owner[6], len(owner), len(local)) == (4, 7, 7)
            for expert in range(6):
                assert REPLICATED.experts_of(layer, owner[expert])[local[expert]] == expert
                assert owner[expert] == rank or rank not in REPLICATED.holders[layer][expert]


@pytest.mark.parametrize("num_holders", [1, 2, 3, 5, 8])
def test_holders_share_the_other_ranks(num_holders: int) -> None:
    holders = tuple(sorted(np.random.default_rng(num_holders).permutation(8)[:num_holders].tolist()))
    placement = Placement(1, 8, ((holders,),))
    sources = np.bincount([placement.owner_table(0, rank)[0] for rank in range(8)], minlength=8)
    assert set(np.flatnonzero(sources)) == set(holders)
    assert sources[list(holders)].max() - sources[list(holders)].min() <= 1


@pytest.mark.parametrize(
    "holders", [(((0,), ()),), (((0,), (2,)),), (((0,), (1, 0)),), (((0,),),), (((0,), (-1,)),), (((0,), (1, 1)),)]
)
def test_what_is_no_placement_cannot_be_made(holders: Any) -> None:
    with pytest.raises(AssertionError):
        Placement(2, 2, holders)


@pytest.mark.parametrize(("num_experts", "num_ranks"), [(8, 0), (8, 9), (4, -1)])
def test_a_rank_without_experts_is_refused(num_experts: int, num_ranks: int) -> None:
    message = rf"^expert_parallel_size: {num_ranks} is not in \[1, {num_experts}\]"
    with pytest.raises(ValueError, match=message):
        contiguous(1, num_experts, num_ranks)
    with pytest.raises(ValueError, match=message):
        balanced(np.ones((1, num_experts)), num_ranks)
    with pytest.raises(ValueError, match=message):
        affine(np.zeros((1, 1, 1), dtype=np.int16), num_experts, num_ranks)


def test_makers_refuse_what_cannot_be() -> None:
    for wrong in (-1, 9):
        with pytest.raises(ValueError, match=rf"^num_redundant_experts: {wrong} is not in \[0, 8\]"):
            balanced(np.ones((1, 8)), 2, wrong)
    for imbalance in (0.9, float("nan")):
        with pytest.raises(ValueError, match=rf"^max_load_imbalance: {imbalance} is not in \[1, inf\)"):
            affine(np.zeros((1, 1, 1), dtype=np.int16), 8, 2, imbalance)


def brute_visits(placement: Placement, ids: np.ndarray, rank: int) -> list[list[int]]:
    """Other ranks that each row visits, per row and layer, by the definition."""
    tables = [placement.owner_table(layer, rank).tolist() for layer in range(placement.num_layers)]
    nobody = {rank, placement.num_ranks}
    return [[len({tables[l][e] for e in row[l]} - nobody) for l in range(len(tables))] for row in ids]  # noqa: E741


def test_visits_and_loads_are_what_the_tables_say() -> None:
    ids = random_ids(50, 2, 3, 6, seed=1)
    ids[::7, 1, 2] = 6  # none
    by_rank = [brute_visits(REPLICATED, ids, rank) for rank in range(4)]
    for rank in range(4):
        assert rows_sent(REPLICATED, ids, rank).tolist() == by_rank[rank]
    assert ranks_visited(REPLICATED, ids) == pytest.approx(np.mean(by_rank, axis=(0, 1)))
    assert payload_bytes_per_row(REPLICATED, ids, 64) == pytest.approx(128 * np.mean(by_rank, axis=(0, 1)).sum())
    loads = np.zeros((2, 4))
    for rank in range(4):
        for layer in range(2):
            for expert in ids[:, layer].ravel():
                if expert < 6:
                    loads[layer, REPLICATED.owner_table(layer, rank)[expert]] += 0.25
    assert rank_loads(REPLICATED, ids) == pytest.approx(loads)
    assert load_imbalance(REPLICATED, ids) == pytest.approx(loads.max(axis=1) / loads.mean(axis=1))


def numbers_held(placement: Placement, layer: int) -> list[int]:
    return [len(placement.experts_of(layer, rank)) for rank in range(placement.num_ranks)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_made_placements_are_whole_and_even(data: st.DataObject) -> None:
    num_ranks = data.draw(st.integers(1, 9))
    num_experts = data.draw(st.integers(num_ranks, 24))
    top_k = data.draw(st.integers(1, min(4, num_experts)))
    redundant = data.draw(st.integers(0, num_experts * (num_ranks - 1)))
    ids = random_ids(data.draw(st.integers(1, 60)), 3, top_k, num_experts, data.draw(st.integers(0, 99)))
    loads = expert_loads(ids, num_experts)
    # Placement itself asserts that every expert is held, by ranks that exist, once on each
    spread, joined = balanced(loads, num_ranks, redundant), affine(ids, num_experts, num_ranks)
    for layer in range(3):
        assert sum(numbers_held(spread, layer)) == num_experts + redundant
        assert sum(numbers_held(joined, layer)) == num_experts
        for placement in (spread, joined):
            held = numbers_held(placement, layer)
            assert max(held) - min(held) <= 1
    assert spread == balanced(loads, num_ranks, redundant)
    assert joined == affine(ids, num_experts, num_ranks)
    # The bound, or what balancing alone comes to
    bound = np.maximum(1.2, load_imbalance(balanced(loads, num_ranks), ids))
    assert (load_imbalance(joined, ids) <= bound + 1e-9).all()


def test_what_does_not_divide_goes_to_other_ranks_in_every_layer() -> None:
    placement = balanced(np.ones((4, 10)), 4)
    assert [numbers_held(placement, layer) for layer in range(2)] == [[3, 3, 2, 2], [2, 2, 3, 3]]
    assert np.sum([numbers_held(placement, layer) for layer in range(4)], axis=0).tolist() == [10] * 4


def test_balanced_finds_an_even_split_that_contiguous_misses() -> None:
    loads = np.array([[90, 80, 70, 60, 4, 3, 2, 1], [1, 1, 1, 1, 10, 10, 10, 10]])
    ids = np.repeat(np.tile(np.arange(8), (2, 1)).T[:, :, None], 1, axis=2)
    rows = [np.repeat(ids[:, layer, 0], loads[layer]) for layer in range(2)]
    for layer, chosen in enumerate(rows):
        traced = chosen[:, None, None]
        assert load_imbalance(contiguous(1, 8, 2), traced)[0] > 1.8
        made = balanced(loads[layer : layer + 1], 2)
        assert load_imbalance(made, traced)[0] < 1.02


def test_replicas_go_to_hot_experts_and_split_their_load() -> None:
    loads = np.array([[800, 10, 10, 10, 10, 10, 10, 10], [10, 10, 10, 10, 400, 10, 400, 10]])
    placement = balanced(loads, 4, num_redundant_experts=4)
    assert [len(ranks) for ranks in placement.holders[0]] == [4, 2, 1, 1, 1, 1, 1, 1]
    assert sorted(len(ranks) for ranks in placement.holders[1]) == [1, 1, 1, 1, 1, 1, 3, 3]
    for layer in range(2):
        rows = np.repeat(np.arange(8), loads[layer])[:, None, None]
        one = Placement(8, 4, (placement.holders[layer],))
        assert numbers_held(one, 0) == [3] * 4
        # Three holders serve four source ranks 2 : 1 : 1
        assert load_imbalance(one, rows)[0] < (1.1 if layer == 0 else 1.6)
        assert load_imbalance(balanced(loads[layer : layer + 1], 4), rows)[0] > 1.9


@pytest.mark.parametrize(("num_experts", "num_ranks", "top_k"), [(16, 4, 3), (30, 4, 4), (64, 8, 8), (12, 2, 2)])
def test_affine_finds_planted_blocks(num_experts: int, num_ranks: int, top_k: int) -> None:
    generator = np.random.default_rng(5)
    num_layers = 3
    ids = np.empty((1200, num_layers, top_k), dtype=np.int16)
    planted = []
    for layer in range(num_layers):
        blocks = np.array_split(generator.permutation(num_experts), num_ranks)
        planted.append({frozenset(block.tolist()) for block in blocks})
        sizes = np.array([len(block) for block in blocks])
        for row, block in enumerate(generator.choice(num_ranks, size=len(ids), p=sizes / sizes.sum())):
            ids[row, layer] = generator.permutation(blocks[block])[:top_k]
    placement = affine(ids, num_experts, num_ranks)
    for layer in range(num_layers):
        assert {frozenset(placement.experts_of(layer, rank)) for rank in range(num_ranks)} == planted[layer]
    # A row visits one rank: another than its own unless it is at home there
    assert ranks_visited(placement, ids) == pytest.approx((num_ranks - 1) / num_ranks)
    assert ranks_visited(contiguous(num_layers, num_experts, num_ranks), ids).min() > 1.2 * (num_ranks - 1) / num_ranks


def test_affine_gains_on_other_rows_than_it_was_made_from() -> None:
    generator = np.random.default_rng(0)
    topic = generator.integers(0, 8, size=4000)
    liked = np.stack([generator.permutation(64)[:8] for _ in range(8)])
    scores = generator.gumbel(size=(4000, 1, 64))
    scores[np.arange(4000)[:, None], 0, liked[topic]] += 2.5
    ids = np.argsort(-scores, axis=2)[:, :, :6].astype(np.int16)
    known, unknown = ids[:3000], ids[3000:]
    placement = affine(known, 64, 8, max_load_imbalance=1.1)
    assert ranks_visited(placement, unknown)[0] < 0.85 * ranks_visited(contiguous(1, 64, 8), unknown)[0]
    loose = affine(known, 64, 8, max_load_imbalance=4.0)
    assert load_imbalance(placement, known)[0] <= 1.1
    assert ranks_visited(loose, known)[0] <= ranks_visited(placement, known)[0]


def test_the_gain_of_an_exchange_is_exact() -> None:
    from penstock.router.affine import _Layer

    ids = random_ids(200, 1, 4, 12, seed=3)[:, 0].astype(np.int64)
    owner = np.random.default_rng(0).permutation(np.repeat(np.arange(3), 4))
    layer = _Layer(ids, 12, [4, 4, 4], 1.2)

    def num_visits(owner: np.ndarray) -> int:
        return sum(len(set(owner[row])) for row in ids)

    gains = layer._gains(owner)
    for one in range(12):
        for other in range(12):
            if owner[one] != owner[other]:
                exchanged = owner.copy()
                exchanged[[one, other]] = owner[[other, one]]
                assert gains[one, other] == num_visits(owner) - num_visits(exchanged)
