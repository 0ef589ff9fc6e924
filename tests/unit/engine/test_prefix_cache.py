"""Which blocks are found by their tokens, and when they are forgotten."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import pytest

from trtkit.engine.block_pool import BlockPool
from trtkit.engine.prefix_cache import PrefixCache
from trtkit.engine.sequence import PENDING, Sequence
from trtkit.spec.engine import Request

SIZE = 4


class World:
    """A pool and a tree over it, and sequences that hold blocks as the scheduler would give them."""

    def __init__(self, blocks: int = 8) -> None:
        self.pool = BlockPool(blocks)
        self.tree = PrefixCache(self.pool, SIZE)
        self.live: list[Sequence] = []

    def sequence(self, prompt: Seq[int], name: str | None = None) -> Sequence:
        request = Request(request_id=name or f"r{len(self.live)}", prompt_ids=tuple(prompt), max_tokens=8)
        return Sequence(request=request, arrival=len(self.live), max_new_tokens=8)

    def running(self, prompt: Seq[int], name: str | None = None) -> Sequence:
        """A sequence whose prompt was computed, starting on what was found."""
        sequence = self.sequence(prompt, name)
        found = self.tree.find(sequence)
        self.pool.share(found, sequence.request_id)
        sequence.block_table += found
        sequence.published = len(found)
        sequence.advance(len(found) * SIZE)
        self.feed(sequence, len(prompt) - sequence.num_tokens)
        self.live.append(sequence)
        return sequence

    def feed(self, sequence: Sequence, count: int) -> None:
        needed = -(-(sequence.cache_len + count) // SIZE) - len(sequence.block_table)
        sequence.block_table += self.pool.allocate(needed, sequence.request_id)
        self.tree.publish(sequence, sequence.num_tokens + count)
        sequence.advance(count)
        self.tree.written()

    def end(self, sequence: Sequence) -> None:
        self.tree.publish(sequence, min(sequence.num_tokens, sequence.known_len - 1))
        self.pool.free(reversed(sequence.block_table), sequence.request_id)
        sequence.block_table.clear()
        self.live.remove(sequence)

    def found(self, prompt: Seq[int]) -> list[int]:
        return self.tree.find(self.sequence(prompt, "asks"))

    def check(self) -> None:
        self.pool.check((s.request_id, s.block_table) for s in self.live)
        self.tree.check(self.live)


def test_only_whole_blocks_of_the_same_beginning_are_found() -> None:
    world = World()
    first = world.running(range(10))
    assert world.found([*range(8), 50, 51]) == first.block_table[:2]
    assert world.found([*range(7), 50, 51, 52]) == first.block_table[:1]
    assert world.found([50, *range(1, 10)]) == []
    assert world.found([*range(10), 10, 11]) == first.block_table[:2], "the third block is not full"


def test_one_token_is_always_left_to_compute() -> None:
    world = World()
    first = world.running(range(8))
    assert world.found(range(8)) == first.block_table[:1]
    assert world.found(range(9)) == first.block_table


def test_the_same_tokens_after_another_beginning_are_another_block() -> None:
    world = World()
    world.running([1, 2, 3, 4, 5, 6, 7, 8])
    assert world.found([5, 6, 7, 8, 9]) == []
    assert world.found([9, 9, 9, 9, 5, 6, 7, 8, 9]) == []


class Clash(int):
    """A token id whose hash is that of every other."""

    __slots__ = ()

    def __hash__(self) -> int:
        return 7


def test_ids_are_compared_themselves_where_every_hash_is_the_same() -> None:
    world = World(blocks=12)
    texts = [[Clash(base + place) for place in range(9)] for base in (0, 10, 20)]
    assert len({hash(tuple(text)) for text in texts}) == 1
    assert hash(Clash(1)) != hash(1)
    held = [world.running(text) for text in texts]
    for text, sequence in zip(texts, held, strict=True):
        assert world.found(text) == sequence.block_table[:2]
    assert world.found([Clash(30 + place) for place in range(9)]) == []
    world.check()


def test_blocks_of_generated_tokens_are_found_too() -> None:
    world = World()
    first = world.running(range(6))
    for token in (70, 71, 72):
        first.output_ids.append(token)
        world.feed(first, 1)
    assert world.found([*range(6), 70, 71, 99]) == first.block_table[:2]
    assert world.found([*range(6), 70, 70, 99]) == first.block_table[:1]


def test_a_block_waits_for_the_value_of_a_token_in_flight() -> None:
    world = World()
    first = world.running(range(7))
    first.output_ids.append(PENDING)
    world.feed(first, 1)
    assert len(world.tree) == 1
    first.output_ids[0] = 70
    assert world.found([*range(7), 70, 71]) == first.block_table[:1]
    first.output_ids.append(PENDING)
    world.feed(first, 1)
    assert world.found([*range(7), 70, 71]) == first.block_table[:2]


def test_a_sequence_that_ends_leaves_its_whole_blocks_to_be_found() -> None:
    world = World()
    first = world.running(range(10))
    table = list(first.block_table)
    world.end(first)
    assert (world.pool.num_used, world.pool.num_idle, len(world.tree)) == (0, 2, 2)
    assert world.found(range(10)) == table[:2]
    world.check()


def test_the_last_token_of_a_sequence_that_ends_is_not_taken_for_computed() -> None:
    world = World()
    first = world.running(range(7))
    first.output_ids.append(70)
    first.advance(1)  # something was fed in its place: a guess that turned out wrong
    world.end(first)
    assert len(world.tree) == 1


def test_an_idle_block_serves_whoever_needs_memory_and_is_forgotten() -> None:
    world = World(blocks=3)
    world.end(world.running(range(8)))
    world.running(range(40, 44))
    assert world.found(range(9)) != []
    world.running(range(50, 54))
    assert len(world.found(range(9))) == 1, "the second block was given away, what it hangs on is still good"
    world.running(range(60, 64))
    assert world.found(range(9)) == []
    world.check()


def test_what_was_used_last_is_forgotten_last() -> None:
    world = World(blocks=4)
    world.end(world.running(range(8)))
    world.end(world.running(range(20, 28)))
    world.end(world.running(range(9), "again"))  # takes its ninth token's block from the other text
    assert len(world.found(range(20, 29))) == 1
    world.running(range(30, 38))
    assert world.found(range(20, 29)) == []
    assert len(world.found(range(9))) == 2
    world.check()


def test_a_duplicate_is_given_up_for_the_block_that_is_known() -> None:
    world = World()
    first, second = world.running(range(6)), world.running(range(5))
    for token in (5, 70, 71):
        second.output_ids.append(token)
        world.feed(second, 1)
    for token in (70, 71):
        first.output_ids.append(token)
        world.feed(first, 1)
    assert first.block_table[1] != second.block_table[1], (
        "the step that fills the duplicate must not write to the known"
    )
    free = world.pool.num_free
    world.feed(first, 0)
    assert first.block_table[:2] == second.block_table[:2]
    assert world.pool.num_free == free + 1
    world.check()


def test_a_step_that_was_never_launched_leaves_nothing_to_be_found() -> None:
    world = World()
    world.running(range(4), "before")
    lost = world.sequence(range(12), "lost")
    lost.block_table += world.tree.find(lost)
    world.pool.share(lost.block_table, "lost")
    lost.published = 1
    lost.advance(SIZE)
    lost.block_table += world.pool.allocate(2, "lost")
    world.tree.publish(lost, 12)
    world.live.append(lost)
    assert len(world.tree) == 3
    world.end(lost)
    world.tree.abandon()
    assert len(world.tree) == 1
    assert len(world.found(range(12))) == 1
    assert world.pool.num_idle == 0
    world.check()


def test_what_hangs_on_a_step_that_was_never_launched_is_forgotten_with_it() -> None:
    world = World()
    ahead = world.sequence([*range(8), 50], "ahead")  # as guesses that were right have brought it forward at once
    ahead.block_table += world.pool.allocate(2, "ahead")
    ahead.advance(8)
    lost = world.sequence(range(6), "lost")
    lost.block_table += world.pool.allocate(2, "lost")
    world.live += [lost, ahead]
    world.tree.publish(lost, 6)
    world.tree.publish(ahead, 8)
    assert ahead.block_table[0] == lost.block_table[0], "it will be written before anybody reads it"
    assert len(world.tree) == 2
    world.end(lost)
    world.end(ahead)
    world.tree.abandon()
    assert len(world.tree) == 0
    assert world.pool.num_idle == 0
    world.check()


def test_an_evicting_sequence_shares_nothing() -> None:
    world = World()
    first = world.running(range(8))
    evicting = world.sequence(range(8), "evicts")
    evicting.evicts = True
    assert world.tree.find(evicting) == []
    evicting.block_table += world.pool.allocate(2, "evicts")
    evicting.advance(8)
    world.live.append(evicting)
    world.tree.publish(evicting, 8)
    assert evicting.published == 0
    assert len(world.tree) == 2
    assert first.block_table != evicting.block_table
    world.check()


def test_check_finds_a_chain_that_does_not_hold_its_owners_tokens() -> None:
    world = World()
    first = world.running(range(8))
    world.tree.check([first])
    first.block_table.reverse()
    with pytest.raises(AssertionError, match=r"r0: block 0 is \d+, found is \d+"):
        world.tree.check([first])
