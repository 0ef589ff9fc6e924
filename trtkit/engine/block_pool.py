"""`BlockPool`: who owns which block of the KV cache. No tensors here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class BlockPool:
    """`num_blocks` blocks, each free or owned by exactly one sequence (named by its request id).

    The most recently freed block is handed out first: its memory is warm. Counters: `peak` blocks in use at once.
    """

    def __init__(self, num_blocks: int) -> None:
        """A pool with every block free."""
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, got {num_blocks}")
        self.num_blocks = num_blocks
        self.peak = 0
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owner: list[str | None] = [None] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Blocks owned by sequences."""
        return self.num_blocks - len(self._free)

    def allocate(self, count: int, owner: str) -> list[int]:
        """Take `count` blocks for `owner`. The caller has looked at `num_free`."""
        assert 0 <= count <= len(self._free), f"asked for {count} blocks of {len(self._free)} free ones"
        split = len(self._free) - count
        taken = self._free[split:][::-1]
        del self._free[split:]
        for block in taken:
            self._owner[block] = owner
        self.peak = max(self.peak, self.num_used)
        return taken

    def free(self, blocks: Iterable[int], owner: str) -> None:
        """Give blocks back."""
        for block in blocks:
            assert self._owner[block] == owner, f"block {block} belongs to {self._owner[block]}, not to {owner}"
            self._owner[block] = None
            self._free.append(block)

    def check(self, tables: Iterable[tuple[str, Sequence[int]]]) -> None:
        """Prove the books: each block is free or in exactly one of `tables` (owner, blocks), and none is lost.

        Raises:
            AssertionError: with the block that is wrong.
        """
        seen: dict[int, str] = {}
        for owner, blocks in tables:
            for block in blocks:
                assert block not in seen, f"block {block} is in the tables of {seen[block]} and {owner}"
                assert self._owner[block] == owner, f"block {block} belongs to {self._owner[block]}, not to {owner}"
                seen[block] = owner
        free = set(self._free)
        assert len(free) == len(self._free), "a block is on the free list twice"
        assert not free & seen.keys(), f"blocks {sorted(free & seen.keys())} are both free and in use"
        lost = set(range(self.num_blocks)) - free - seen.keys()
        assert not lost, f"blocks {sorted(lost)} are lost"
