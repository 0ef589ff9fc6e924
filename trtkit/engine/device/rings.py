"""`DeviceRings`: waiting decode queries and their log-sum-exps, in tensors that never move.

A captured decode step writes them through an index tensor, so their addresses must hold for the engine's life. Shapes:
L layers, P places, Hq query heads, D head dim. A sequence owns `size` neighbouring places.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trtkit.spec.model import ModelSpec

NOWHERE = -1
"""The place of a query that nobody will read: kernels skip it."""
_LSE_BYTES = 4


def ring_bytes(model: ModelSpec, max_batch_size: int, size: int, element_bytes: int) -> int:
    """Bytes of `DeviceRings` of these sizes."""
    places = max(1, max_batch_size * size)
    return model.num_layers * places * model.num_heads * (model.head_dim * element_bytes + _LSE_BYTES)


class DeviceRings:
    """Rings of `size` queries for up to `max_batch_size` sequences; slot numbers also name the sequences' flags."""

    def __init__(
        self, model: ModelSpec, max_batch_size: int, size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocate everything; one place even if nobody asks for any, so that no address is missing."""
        places = max(1, max_batch_size * size)
        shape = (model.num_layers, places, model.num_heads)
        self.size = size
        self.queries_LPHD: Tensor = torch.zeros(*shape, model.head_dim, dtype=dtype, device=device)
        self.lse_LPH: Tensor = torch.zeros(shape, dtype=torch.float32, device=device)
        self._free = list(range(max_batch_size - 1, -1, -1))

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (self.queries_LPHD, self.lse_LPH))

    def take(self) -> int:
        """A slot of one's own."""
        assert self._free, "more sequences are watched than the batch holds"
        return self._free.pop()

    def give(self, slot: int) -> None:
        """Hand a slot back."""
        self._free.append(slot)

    def places(self, slot: int, first: int, count: int) -> slice:
        """`count` places of a slot from its `first` on; no wrap."""
        assert first + count <= self.size, f"places {first} + {count} of a ring of {self.size}"
        start = slot * self.size + first
        return slice(start, start + count)
