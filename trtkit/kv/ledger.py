"""The attention-mass ledger: what each cached key has received, and where it came from. It moves when keys move.

Shapes: L layers, H KV heads, C slots there is room for, N live slots. One ledger per sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from trtkit.kv.moves import HoleMoves

BYTES_PER_SLOT = 8
"""fp32 mass and int32 position."""


class AttentionLedger:
    """Mass (fp32) and original position (int32) of every live slot of one sequence.

    All layers and heads hold as many slots, so one length serves them all. With `decay` below 1 a query multiplies
    what is stored before its own mass is added, whatever the batches in which mass arrives.
    """

    def __init__(self, layers: int, kv_heads: int, capacity: int, *, decay: float = 1.0, device: str = "cpu") -> None:
        self.length = 0
        self.decay = decay
        self._mass_LHC = torch.zeros(layers, kv_heads, capacity, dtype=torch.float32, device=device)
        self._positions_LHC = torch.zeros(layers, kv_heads, capacity, dtype=torch.int32, device=device)

    @property
    def num_bytes(self) -> int:
        """Memory held besides keys and values."""
        return self._mass_LHC.numel() * BYTES_PER_SLOT

    @property
    def mass(self) -> Tensor:
        """View of the live mass, [L, H, N]."""
        return self._mass_LHC[:, :, : self.length]

    @property
    def positions(self) -> Tensor:
        """View of the live positions, [L, H, N]."""
        return self._positions_LHC[:, :, : self.length]

    def append(self, first_position: int, count: int) -> None:
        """Open `count` slots for new tokens: consecutive positions, no mass of a former occupant."""
        end = self.length + count
        if end > self._mass_LHC.shape[2]:
            self._grow(end)
        positions = torch.arange(first_position, first_position + count, dtype=torch.int32)
        self._positions_LHC[:, :, self.length : end] = positions.to(self._positions_LHC.device)
        self._mass_LHC[:, :, self.length : end] = 0
        self.length = end

    def _grow(self, needed: int) -> None:
        """Make room; doubling, so that growing one by one stays cheap."""
        extra = max(needed, 2 * self._mass_LHC.shape[2]) - self._mass_LHC.shape[2]
        self._mass_LHC = functional.pad(self._mass_LHC, (0, extra))
        self._positions_LHC = functional.pad(self._positions_LHC, (0, extra))

    def add(self, layer: int | slice, mass: Tensor, num_queries: int) -> None:
        """Add the mass ([H, N], or [L, H, N] for a slice) that `num_queries` consecutive queries gave.

        The caller has weighted query i of n by `query_weights`, so that any batching adds up to the same.
        """
        live = self._mass_LHC[layer, ..., : self.length]
        if self.decay != 1.0:
            live *= self.decay**num_queries
        live += mass

    def query_weights(self, num_queries: int) -> Tensor:
        """Weight of each of `num_queries` consecutive queries, oldest first: 1 without decay. fp32 [num_queries]."""
        age = torch.arange(num_queries - 1, -1, -1, dtype=torch.float32, device=self._mass_LHC.device)
        return torch.pow(self.decay, age)

    def replace_mass(self, mass: Tensor) -> None:
        """Set the live mass ([L, H, N]) outright: for policies that look through the last queries only."""
        self.mass.copy_(mass)

    def compact(self, moves: HoleMoves) -> None:
        """Follow the keys: `moves.rows` are flat (layer, head) rows; afterwards `moves.kept` slots are live."""
        for stored in (self._mass_LHC, self._positions_LHC):
            flat = stored.view(-1, stored.shape[2])
            flat[moves.rows, moves.targets] = flat[moves.rows, moves.sources]
        self.length = moves.kept
