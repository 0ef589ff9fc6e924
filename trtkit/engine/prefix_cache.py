"""`PrefixCache`: which blocks hold which tokens, so that a prompt that begins as an earlier text is not computed again.

Whole blocks only, in a tree: the edge to a block is its token ids, so a block is found by all tokens from the first on
and ids are compared themselves, never a hash alone. An engine has one model and no adapters: token ids say everything.

Two rules keep the tree usable. Who owns a block owns the blocks before it (a duplicate is given up for the block that
is known already). And a sequence gives its blocks back last one first, so that the block that was given back first
never has another one after it: recycling in that order takes leaves before what they hang on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from trtkit.engine.block_pool import BlockPool
from trtkit.engine.sequence import Sequence

_NO_BLOCK = -1


@dataclass(kw_only=True, slots=True, eq=False)
class _Node:
    """A block that can be found: `token_ids` are its own, `parent` holds what comes before."""

    block: int
    token_ids: tuple[int, ...]
    parent: _Node | None
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)


class PrefixCache:
    """Finds blocks of `pool` by their tokens; forgets those that the pool hands out again."""

    def __init__(self, pool: BlockPool, tokens_per_block: int) -> None:
        """An empty tree."""
        self._pool = pool
        self._size = tokens_per_block
        self._root = _Node(block=_NO_BLOCK, token_ids=(), parent=None)
        self._nodes: dict[int, _Node] = {}
        self._unwritten: list[int] = []
        pool.on_recycle = self._forget

    def __len__(self) -> int:
        """Blocks that can be found."""
        return len(self._nodes)

    def find(self, sequence: Sequence) -> list[int]:
        """Blocks of the longest chain that begins as `sequence`; at least one of its tokens is left to compute."""
        if sequence.evicts:
            return []
        node = self._root
        found: list[int] = []
        for start in range(0, sequence.known_len - self._size, self._size):
            child = node.children.get(sequence.ids(start, start + self._size))
            if child is None:
                break
            found.append(child.block)
            node = child
        return found

    def publish(self, sequence: Sequence, end: int) -> None:
        """Make whole blocks of `sequence` below `end` findable, as far as the values of their tokens are known.

        A block whose tokens another block holds already is given up for that one, once nothing will be written to it.
        Blocks beyond `num_tokens` are filled by the step that is being made: `written` or `abandon` must follow.
        """
        size, table = self._size, sequence.block_table
        if end // size <= sequence.published or sequence.evicts:
            return  # as in most steps of decoding
        whole = min(end, sequence.value_len) // size
        node = self._nodes[table[sequence.published - 1]] if sequence.published else self._root
        for place in range(sequence.published, whole):
            is_written = (place + 1) * size <= sequence.num_tokens
            token_ids = sequence.ids(place * size, (place + 1) * size)
            child = node.children.get(token_ids)
            if child is None:
                child = self._add(node, token_ids, table[place], is_written=is_written)
            elif is_written:
                self._adopt(child.block, sequence, place)
            else:
                return
            sequence.published += 1
            node = child

    def written(self) -> None:
        """The step was launched: whatever it fills can be read by what is launched later."""
        self._unwritten.clear()

    def abandon(self) -> None:
        """The step was never launched, and everybody in it has given their blocks back: forget what it was to fill.

        What hangs on such a block goes with it, even if it was written.
        """
        for block in reversed(self._unwritten):
            if block in self._nodes:
                self._forget(block)
                self._pool.drop(block)
        self._unwritten.clear()

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Prove that every chain holds its owners' tokens, from the root on.

        Raises:
            AssertionError: with what is wrong.
        """
        for sequence in sequences:
            node = self._root
            for place, block in enumerate(sequence.block_table[: sequence.published]):
                child = node.children.get(sequence.ids(place * self._size, (place + 1) * self._size))
                assert child is not None, f"{sequence.request_id}: block {place} cannot be found"
                assert child.block == block, f"{sequence.request_id}: block {place} is {block}, found is {child.block}"
                node = child
        for node in self._nodes.values():
            assert node.parent is not None, f"block {node.block} hangs on nothing"
            assert node.parent.children.get(node.token_ids) is node, f"block {node.block} is not found from its parent"
            unowned = node.parent is not self._root and not self._pool.owned(node.parent.block)
            assert not (unowned and self._pool.owned(node.block)), f"block {node.block} is owned, its parent is not"

    def _add(self, parent: _Node, token_ids: tuple[int, ...], block: int, *, is_written: bool) -> _Node:
        node = _Node(block=block, token_ids=token_ids, parent=parent)
        parent.children[token_ids] = self._nodes[block] = node
        self._pool.keep(block)
        if not is_written or parent.block in self._unwritten:
            self._unwritten.append(block)
        return node

    def _adopt(self, known: int, sequence: Sequence, place: int) -> None:
        own = sequence.block_table[place]
        self._pool.share([known], sequence.request_id)
        sequence.block_table[place] = known
        self._pool.free([own], sequence.request_id)

    def _forget(self, block: int) -> None:
        node = self._nodes.pop(block)
        assert not node.children, f"block {block} is recycled before what hangs on it"
        assert node.parent is not None, f"block {block} hangs on nothing"
        del node.parent.children[node.token_ids]
