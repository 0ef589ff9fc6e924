"""`StepRing`: the last queries of each sequence, written without the host knowing when.

Under a CUDA graph Python does not run during a step, so where the step's queries go lies in a device tensor of fixed
address: `aim` fills it before the step, `write_aimed` (captured) only reads it. Shapes: L layers, B rows of a step,
Hq query heads, D head dim. A sequence's query lies at its position modulo the ring's size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class StepRing:
    """`slots` rings of `size` queries, and one spare ring where rows without a sequence (warm-up, padding) write."""

    def __init__(self, layers: int, slots: int, size: int, device: torch.device) -> None:
        """Queries are stored from the first write on: their heads and type are known then."""
        self.size = size
        self._layers = layers
        self._spare = slots
        self._free = list(range(slots))
        self._aimed_B = torch.full((slots,), slots * size, dtype=torch.int64, device=device)
        self._stored: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return 0 if self._stored is None else self._stored.numel() * self._stored.element_size()

    def take(self) -> int:
        """A ring of one's own."""
        assert self._free, "more sequences than the batch allows"
        return self._free.pop()

    def give(self, slot: int) -> None:
        """Hand a ring back."""
        self._free.append(slot)

    def aim(self, targets: Sequence[tuple[int, int] | None]) -> None:
        """Say where the next step's rows go: (ring, position) each, or None for the spare ring."""
        places = [self._place(*(target or (self._spare, 0))) for target in targets]
        self._aimed_B[: len(places)].copy_(torch.tensor(places, dtype=torch.int64), non_blocking=True)

    def write_aimed(self, layer: int, queries_BHD: Tensor) -> None:
        """Store one query per row of the step, where `aim` said."""
        stored = self._storage(queries_BHD)
        stored[layer].index_copy_(0, self._aimed_B[: queries_BHD.shape[0]], queries_BHD)

    def write(self, slot: int, layer: int, first_position: int, queries_THD: Tensor) -> None:
        """Store consecutive queries of one sequence; only the last `size` are kept."""
        kept = queries_THD[-self.size :]
        first = first_position + queries_THD.shape[0] - kept.shape[0]
        index = self._places(slot, first, kept.shape[0], queries_THD.device)
        self._storage(queries_THD)[layer].index_copy_(0, index, kept)

    def read(self, slot: int, first_position: int, count: int) -> Tensor:
        """Consecutive queries of all layers, [L, count, Hq, D]."""
        assert self._stored is not None, "nothing was written yet"
        return self._stored.index_select(1, self._places(slot, first_position, count, self._stored.device))

    def read_layer(self, slot: int, layer: int, first_position: int, count: int) -> Tensor:
        """The same of one layer, [count, Hq, D]."""
        assert self._stored is not None, "nothing was written yet"
        return self._stored[layer].index_select(0, self._places(slot, first_position, count, self._stored.device))

    def _place(self, slot: int, position: int) -> int:
        return slot * self.size + position % self.size

    def _places(self, slot: int, first: int, count: int, device: torch.device) -> Tensor:
        return torch.tensor([self._place(slot, p) for p in range(first, first + count)], device=device)

    def _storage(self, like_THD: Tensor) -> Tensor:
        if self._stored is None:
            self._stored = like_THD.new_zeros(self._layers, (self._spare + 1) * self.size, *like_THD.shape[1:])
        return self._stored
