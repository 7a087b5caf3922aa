"""Which experts move: few, to ranks that have less to do, and the placement is whole after every move."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.router.balanced import balanced
from penstock.router.moves import Move, moves_between, relabelled
from penstock.router.placement import Placement, contiguous
from penstock.router.rebalance import imbalance, rank_loads, rebalancing_moves


def loads_of(num_ranks: int, num_layers: int, num_experts: int, seed: int) -> np.ndarray:
    """[R, L, E]: some experts are far hotter than others, and ranks differ."""
    generator = np.random.default_rng(seed)
    rates = np.exp(1.3 * generator.normal(size=(1, num_layers, num_experts)))
    return generator.poisson(100 * rates, size=(num_ranks, num_layers, num_experts))


def sizes(placement: Placement) -> list[list[int]]:
    ranks = range(placement.num_ranks)
    return [[len(placement.experts_of(layer, rank)) for rank in ranks] for layer in range(placement.num_layers)]


def follow(placement: Placement, moves: list[Move]) -> Placement:
    """Make moves one by one, checked as a whole placement would be."""
    for move in moves:
        placement = placement.moved({move.layer: move.applied(placement.holders[move.layer])})
        assert Placement(placement.num_experts, placement.num_ranks, placement.holders) == placement
    return placement


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_moves_even_out_the_work_and_keep_every_place(data: st.DataObject) -> None:
    num_ranks = data.draw(st.integers(2, 5))
    num_experts = data.draw(st.integers(num_ranks, 16))
    redundant = data.draw(st.integers(0, num_experts * (num_ranks - 1)))
    loads = loads_of(num_ranks, 2, num_experts, data.draw(st.integers(0, 999)))
    before = balanced(np.ones((2, num_experts)), num_ranks, redundant)
    moves = list(rebalancing_moves(before, loads))
    after = follow(before, moves)
    assert sizes(after) == sizes(before)
    for layer in range(2):
        was, now = rank_loads(before, loads)[layer], rank_loads(after, loads)[layer]
        assert was.sum() == now.sum() == loads[:, layer].sum()
        assert imbalance(now) <= imbalance(was) + 0.01
        # About as good as what forgets where experts are
        packed = rank_loads(balanced(loads.sum(axis=0), num_ranks, redundant), loads)[layer]
        assert imbalance(now) <= max(1.1, imbalance(packed)) + 0.06
    assert moves == list(rebalancing_moves(before, loads)), "it is a function"


def test_a_hot_expert_gets_copies_and_little_else_moves() -> None:
    before = balanced(np.ones((1, 32)), 4, 4)
    hot = before.experts_of(0, 0)[3]
    loads = np.full((4, 1, 32), 10)
    loads[:, :, hot] = 200
    moves = list(rebalancing_moves(before, loads))
    after = follow(before, moves)
    assert imbalance(rank_loads(before, loads)) > 1.9
    assert imbalance(rank_loads(after, loads)) < 1.1
    assert len(after.holders[0][hot]) > len(before.holders[0][hot])
    assert sum(len(move.changes) for move in moves) <= 8
    assert list(rebalancing_moves(after, loads)) == [], "it is even enough"


def test_loads_are_those_of_the_owner_tables() -> None:
    placement = Placement(3, 3, (((0, 2), (1,), (0, 1, 2)),))
    loads = np.array([[[1, 2, 4]], [[8, 16, 32]], [[64, 128, 256]]])
    wanted = np.zeros(3)
    for rank in range(3):
        for expert in range(3):
            wanted[placement.owner_table(0, rank)[expert]] += loads[rank, 0, expert]
    assert rank_loads(placement, loads)[0].tolist() == wanted.tolist()
    assert imbalance(np.zeros((2, 3))) == 1.0
    assert imbalance(np.array([[3.0, 1.0], [1.0, 3.0]])) == 1.5, "each layer has its own busiest rank"


@pytest.mark.parametrize("seed", range(6))
def test_there_is_a_way_from_any_placement_to_any_other(seed: int) -> None:
    num_ranks, num_experts = 4, 9
    redundant = (0, 3)[seed % 2]
    made = [
        balanced(loads_of(1, 1, num_experts, number)[0], num_ranks, redundant) for number in (2 * seed, 2 * seed + 1)
    ]
    present, target = made
    renamed = relabelled(target.holders[0], present.holders[0], num_ranks)
    assert sizes(Placement(num_experts, num_ranks, (tuple(renamed),))) == sizes(present)

    def overlap(holders) -> int:
        return sum(len({*one} & {*other}) for one, other in zip(holders, present.holders[0], strict=True))

    assert overlap(renamed) >= overlap(target.holders[0])
    moves = moves_between(0, present.holders[0], renamed, num_ranks)
    assert follow(present, moves).holders[0] == tuple(renamed)
    assert sum(len(move.changes) for move in moves) == sum(map(len, renamed)) - overlap(renamed)


def test_experts_that_all_change_places_do_so_in_rings() -> None:
    present = contiguous(1, 6, 3)
    target = [(1,), (1,), (2,), (2,), (0,), (0,)]
    moves = moves_between(0, present.holders[0], target, 3)
    assert [len(move.changes) for move in moves] == [3, 3]
    assert follow(present, moves).holders[0] == tuple(target)
