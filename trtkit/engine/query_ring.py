"""`QueryRing`: the last queries of every evicting sequence, so that keys are read for scores once per many steps.

Shapes: L layers, Hq query heads, D head dim. A query lies at its position modulo the ring's size.
"""

from __future__ import annotations

import torch
from torch import Tensor


class QueryRing:
    """Rings of `size` queries, one per sequence that asks for one."""

    def __init__(self, layers: int, size: int) -> None:
        """An empty ring; memory comes with the first sequences."""
        self.size = size
        self._layers = layers
        self._free: list[int] = []
        self._slots = 0
        self._stored: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return 0 if self._stored is None else self._stored.numel() * self._stored.element_size()

    def take(self) -> int:
        """A ring of one's own."""
        if self._free:
            return self._free.pop()
        self._slots += 1
        return self._slots - 1

    def give(self, slot: int) -> None:
        """Hand a ring back."""
        self._free.append(slot)

    def index(self, slot: int, first_position: int, count: int) -> list[int]:
        """Places of `count` consecutive queries in a sequence's ring."""
        return [slot * self.size + position % self.size for position in range(first_position, first_position + count)]

    def write(self, layer: int, index: Tensor, queries_THD: Tensor) -> None:
        """Store queries [T, Hq, D] of one layer."""
        self._room(queries_THD)[layer].index_copy_(0, index, queries_THD)

    def read(self, slot: int, first_position: int, count: int) -> Tensor:
        """Consecutive queries of all layers, [L, count, Hq, D]."""
        assert self._stored is not None, "nothing was written yet"
        index = torch.tensor(self.index(slot, first_position, count), device=self._stored.device)
        return self._stored.index_select(1, index)

    def _room(self, like_THD: Tensor) -> Tensor:
        """The store, with room for every ring that was taken."""
        held = 0 if self._stored is None else self._stored.shape[1]
        if self._stored is None or held < self._slots * self.size:
            places = max(self._slots, 2 * held // self.size) * self.size
            grown = like_THD.new_zeros(self._layers, places, *like_THD.shape[1:])
            if self._stored is not None:
                grown[:, :held] = self._stored
            self._stored = grown
        return self._stored
