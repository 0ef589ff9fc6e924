"""The books of the block pool."""

from __future__ import annotations

import pytest

from trtkit.engine.block_pool import BlockPool


def test_a_fresh_pool_is_all_free() -> None:
    pool = BlockPool(3)
    pool.check([])
    assert (pool.num_free, pool.num_used, pool.peak) == (3, 0, 0)


def test_blocks_come_back_and_the_peak_stays() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(2, "a")
    pool.check([("a", blocks)])
    pool.free(blocks, "a")
    pool.check([])
    assert (pool.num_used, pool.peak) == (0, 2)


def test_the_last_freed_block_is_the_next_one_out() -> None:
    pool = BlockPool(4)
    a, b = pool.allocate(1, "a"), pool.allocate(1, "b")
    pool.free(b, "b")
    pool.free(a, "a")
    assert pool.allocate(1, "c") == a


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        BlockPool(0)


def test_taking_more_than_is_free_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="4 blocks of 3"):
        BlockPool(3).allocate(4, "a")


def test_freeing_a_strangers_block_is_a_bug() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1, "a")
    with pytest.raises(AssertionError, match="belongs to a"):
        pool.free(blocks, "b")


def test_check_finds_a_block_in_two_tables() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1, "a")
    with pytest.raises(AssertionError, match="in the tables of a and b"):
        pool.check([("a", blocks), ("b", blocks)])


def test_check_finds_a_lost_block() -> None:
    pool = BlockPool(2)
    pool.allocate(1, "a")
    with pytest.raises(AssertionError, match="lost"):
        pool.check([])


def test_check_finds_a_block_that_is_free_and_in_use() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1, "a")
    pool.free(blocks, "a")
    with pytest.raises(AssertionError, match="belongs to None"):
        pool.check([("a", blocks)])
