from __future__ import annotations

import pytest

from penstock.cluster.engine.block_pool import BlockPool


def test_blocks_hold_what_they_must() -> None:
    pool = BlockPool(10, 4)
    assert [pool.blocks_for(n) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


def test_growing_takes_only_the_blocks_that_are_lacking() -> None:
    pool = BlockPool(10, 4)
    blocks: list[int] = []
    pool.grow(blocks, 5)
    first = list(blocks)
    assert len(set(first)) == 2
    assert (pool.num_used, pool.num_free) == (2, 8)
    pool.grow(blocks, 8)
    pool.grow(blocks, 3)
    assert blocks == first
    pool.grow(blocks, 20)
    assert blocks[:2] == first
    assert len(set(blocks)) == 5
    assert pool.num_used == 5
    pool.check_integrity([blocks])


def test_shrinking_gives_back_what_is_not_needed() -> None:
    pool = BlockPool(10, 4)
    blocks: list[int] = []
    pool.grow(blocks, 20)
    kept = blocks[:2]
    pool.shrink(blocks, 5)
    assert blocks == kept
    pool.shrink(blocks, 8)
    assert blocks == kept
    pool.check_integrity([blocks])
    pool.shrink(blocks, 0)
    assert blocks == []
    assert pool.num_used == 0
    pool.check_integrity([])


def test_requests_grow_into_what_is_free_and_no_further() -> None:
    pool = BlockPool(5, 4)
    one: list[int] = []
    other: list[int] = []
    pool.grow(one, 9)
    assert (pool.room(one), pool.room(other)) == (20, 8)
    with pytest.raises(AssertionError):
        pool.grow(other, 9)
    pool.grow(other, 8)
    assert sorted(one + other) == list(range(5))
    assert (pool.room(one), pool.room(other)) == (12, 8)


def test_integrity_sees_leaked_and_shared_blocks() -> None:
    pool = BlockPool(4, 4)
    blocks: list[int] = []
    pool.grow(blocks, 8)
    with pytest.raises(RuntimeError, match="leaked or are shared"):
        pool.check_integrity([])
    with pytest.raises(RuntimeError, match="leaked or are shared"):
        pool.check_integrity([blocks, blocks[:1]])
    pool.check_integrity([blocks[:1], blocks[1:]])
