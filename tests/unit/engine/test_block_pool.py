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


def _kept(pool: BlockPool, owner: str, count: int) -> list[int]:
    blocks = pool.allocate(count, owner)
    for block in blocks:
        pool.keep(block)
    return blocks


def test_a_shared_block_is_free_when_its_last_owner_leaves() -> None:
    pool = BlockPool(2)
    blocks = _kept(pool, "a", 1)
    pool.share(blocks, "b")
    assert (pool.num_used, pool.owned(blocks[0])) == (1, True)
    pool.free(blocks, "a")
    pool.check([("b", blocks)])
    assert pool.num_free == 1
    pool.free(blocks, "b")
    pool.check([])
    assert (pool.num_free, pool.num_idle, pool.owned(blocks[0])) == (2, 1, False)


def test_kept_blocks_are_handed_out_last_and_the_longest_unused_first() -> None:
    pool = BlockPool(4)
    recycled: list[int] = []
    pool.on_recycle = recycled.append
    old, new = _kept(pool, "a", 1), _kept(pool, "b", 1)
    pool.free(old, "a")
    pool.free(new, "b")
    pool.allocate(2, "c")
    assert recycled == []
    assert pool.allocate(2, "d") == old + new
    assert recycled == old + new
    assert pool.num_idle == 0


def test_a_kept_block_that_is_taken_up_again_is_not_handed_out() -> None:
    pool = BlockPool(2)
    blocks = _kept(pool, "a", 1)
    pool.free(blocks, "a")
    pool.share(blocks, "b")
    assert pool.num_free == 1
    assert pool.allocate(1, "c") != blocks
    pool.check([("b", blocks), ("c", [1 - blocks[0]])])


def test_shared_blocks_count_once_at_the_peak() -> None:
    pool = BlockPool(3)
    blocks = _kept(pool, "a", 2)
    pool.share(blocks, "b")
    assert pool.peak == 2
    pool.free(blocks, "a")
    pool.free(blocks, "b")
    pool.share(blocks, "c")
    pool.allocate(1, "c")
    assert pool.peak == 3


def test_a_dropped_block_is_plainly_free_again() -> None:
    pool = BlockPool(2)
    idle, owned = _kept(pool, "a", 1), _kept(pool, "b", 1)
    pool.free(idle, "a")
    pool.drop(idle[0])
    pool.drop(owned[0])
    assert (pool.num_idle, pool.num_free) == (0, 1)
    pool.free(owned, "b")
    assert (pool.num_idle, pool.num_free) == (0, 2)
    pool.check([])


def test_sharing_a_block_that_is_not_kept_is_a_bug() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1, "a")
    with pytest.raises(AssertionError, match="is not kept"):
        pool.share(blocks, "b")


def test_sharing_a_block_twice_with_one_owner_is_a_bug() -> None:
    pool = BlockPool(2)
    blocks = _kept(pool, "a", 1)
    with pytest.raises(AssertionError, match="belongs to a already"):
        pool.share(blocks, "a")


def test_dropping_a_shared_block_is_a_bug() -> None:
    pool = BlockPool(2)
    blocks = _kept(pool, "a", 1)
    pool.share(blocks, "b")
    with pytest.raises(AssertionError, match="shared by a, b"):
        pool.drop(blocks[0])


def test_check_finds_a_sharer_that_nobody_knows() -> None:
    pool = BlockPool(2)
    blocks = _kept(pool, "a", 1)
    with pytest.raises(AssertionError, match="belongs to a, not to a, b"):
        pool.check([("a", blocks), ("b", blocks)])


def test_check_finds_a_sharer_whose_table_lacks_the_block() -> None:
    pool = BlockPool(2)
    blocks = _kept(pool, "a", 1)
    pool.share(blocks, "b")
    with pytest.raises(AssertionError, match="belongs to a, b, not to a"):
        pool.check([("a", blocks), ("b", [])])
