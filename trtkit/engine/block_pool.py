"""`BlockPool`: who owns which block of the KV cache. No tensors here."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence


class BlockPool:
    """`num_blocks` blocks, each free or owned by sequences (named by their request ids): by one, or by several if kept.

    A kept block is one that can be found by its tokens (`PrefixCache`). It may be shared, and without an owner it is
    free memory that still holds them: handed out last, and of those the one that was given back first. Of the others
    the most recently freed is handed out first: its memory is warm. `peak` is the most blocks ever owned at once.
    """

    def __init__(self, num_blocks: int) -> None:
        """A pool with every block free."""
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, got {num_blocks}")
        self.num_blocks = num_blocks
        self.peak = 0
        self.on_recycle: Callable[[int], None] = _nobody_knows_it
        self._free = list(range(num_blocks - 1, -1, -1))
        self._owners: list[tuple[str, ...]] = [()] * num_blocks
        self._kept: set[int] = set()
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free) + len(self._idle)

    @property
    def num_idle(self) -> int:
        """Blocks among the free ones that still hold tokens."""
        return len(self._idle)

    @property
    def num_used(self) -> int:
        """Blocks owned by sequences."""
        return self.num_blocks - self.num_free

    def owned(self, block: int) -> bool:
        """Whether some sequence owns a block."""
        return bool(self._owners[block])

    def allocate(self, count: int, owner: str) -> list[int]:
        """Take `count` blocks for `owner`. The caller has looked at `num_free`."""
        assert 0 <= count <= self.num_free, f"asked for {count} blocks of {self.num_free} free ones"
        split = max(0, len(self._free) - count)
        taken = self._free[split:][::-1]
        del self._free[split:]
        while len(taken) < count:
            block, _ = self._idle.popitem(last=False)
            self._kept.remove(block)
            self.on_recycle(block)
            taken.append(block)
        for block in taken:
            self._owners[block] = (owner,)
        self.peak = max(self.peak, self.num_used)
        return taken

    def share(self, blocks: Iterable[int], owner: str) -> None:
        """Make `owner` one more owner of kept blocks."""
        for block in blocks:
            assert block in self._kept, f"block {block} is not kept, so it cannot be shared"
            assert owner not in self._owners[block], f"block {block} belongs to {owner} already"
            self._owners[block] += (owner,)
            self._idle.pop(block, None)
        self.peak = max(self.peak, self.num_used)

    def keep(self, block: int) -> None:
        """Let an owned block be shared, and hold its tokens when nobody owns it any more."""
        assert self._owners[block], f"block {block} belongs to nobody, so it holds nothing"
        self._kept.add(block)

    def drop(self, block: int) -> None:
        """Take `keep` back for a block with one owner at most."""
        assert len(self._owners[block]) <= 1, f"block {block} is shared by {', '.join(self._owners[block])}"
        self._kept.remove(block)
        if block in self._idle:
            del self._idle[block]
            self._free.append(block)

    def free(self, blocks: Iterable[int], owner: str) -> None:
        """Give blocks back."""
        for block in blocks:
            owners = self._owners[block]
            assert owner in owners, f"block {block} belongs to {', '.join(owners) or None}, not to {owner}"
            left = tuple(name for name in owners if name != owner)
            self._owners[block] = left
            if left:
                continue
            if block in self._kept:
                self._idle[block] = None
            else:
                self._free.append(block)

    def check(self, tables: Iterable[tuple[str, Sequence[int]]]) -> None:
        """Prove the books: each block is free or in `tables` (owner, blocks), in several only if kept, and none is lost.

        Raises:
            AssertionError: with the block that is wrong.
        """
        seen: dict[int, list[str]] = {}
        for owner, blocks in tables:
            for block in blocks:
                seen.setdefault(block, []).append(owner)
        for block, owners in seen.items():
            told = self._owners[block]
            assert len(owners) == 1 or block in self._kept, f"block {block} is in the tables of {' and '.join(owners)}"
            assert Counter(owners) == Counter(told), (
                f"block {block} belongs to {', '.join(told) or None}, not to {', '.join(owners)}"
            )
        free = [*self._free, *self._idle]
        assert len(set(free)) == len(free), "a block is on the free list twice"
        assert not seen.keys() & set(free), f"blocks {sorted(seen.keys() & set(free))} are both free and in use"
        assert self._idle.keys() <= self._kept, f"blocks {sorted(self._idle.keys() - self._kept)} hold nothing"
        assert not self._kept & set(self._free), (
            f"blocks {sorted(self._kept & set(self._free))} are kept and plainly free"
        )
        lost = set(range(self.num_blocks)) - set(free) - seen.keys()
        assert not lost, f"blocks {sorted(lost)} are lost"


def _nobody_knows_it(block: int) -> None:
    """Nothing finds blocks by their tokens, so nobody has to forget this one."""
