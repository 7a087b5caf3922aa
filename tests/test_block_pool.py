from __future__ import annotations

import pytest

from penstock.cluster.engine.block_pool import BlockPool


def test_blocks_hold_what_they_must() -> None:
    pool = BlockPool(10, 4)
    assert [pool.blocks_for(n) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


def test_growing_takes_only_the_blocks_that_are_lacking() -> None:
    pool = BlockPool(10, 4)
    pool.reserve(20)
    blocks: list[int] = []
    pool.grow(blocks, 5)
    first = list(blocks)
    assert len(set(first)) == 2
    assert pool.num_used == 2
    pool.grow(blocks, 8)
    pool.grow(blocks, 3)
    assert blocks == first
    pool.grow(blocks, 20)
    assert blocks[:2] == first
    assert len(set(blocks)) == 5
    assert pool.num_used == 5
    pool.check_integrity([blocks])
    pool.release(blocks, 20)
    assert pool.num_used == 0
    pool.check_integrity([])


def test_reservations_never_exceed_the_pool() -> None:
    pool = BlockPool(10, 4)
    pool.reserve(21)  # 6 blocks, though none is taken yet
    assert pool.num_used == 0
    assert pool.can_reserve(16)
    assert not pool.can_reserve(17)
    with pytest.raises(AssertionError):
        pool.reserve(17)
    pool.reserve(16)
    assert not pool.can_reserve(1)
    assert pool.can_reserve(0)
    one: list[int] = []
    pool.grow(one, 21)
    other: list[int] = []
    pool.grow(other, 16)
    assert sorted(one + other) == list(range(10))
    pool.release(one, 21)
    assert pool.can_reserve(24)
    assert not pool.can_reserve(25)


def test_integrity_sees_leaked_shared_and_promised_blocks() -> None:
    pool = BlockPool(4, 4)
    pool.reserve(8)
    blocks: list[int] = []
    pool.grow(blocks, 8)
    with pytest.raises(RuntimeError, match="leaked or are shared"):
        pool.check_integrity([])
    with pytest.raises(RuntimeError, match="leaked or are shared"):
        pool.check_integrity([blocks, blocks[:1]])
    pool.release(blocks, 4)
    with pytest.raises(RuntimeError, match="1 KV blocks are promised to no request"):
        pool.check_integrity([])
