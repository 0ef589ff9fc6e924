"""`DeviceLedger`: the attention-mass ledger where a layer may be ahead of the others.

Inside one step a prompt's pieces are evicted layer by layer, so the count of live slots is the caller's to know and
an argument of every call. Shapes: L layers, H KV heads, C slots there is room for, N live slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trtkit.kv.ledger import BYTES_PER_SLOT
from trtkit.kv.policy import CachedTokens


class DeviceLedger:
    """Mass (fp32) and original position (int32) of every live slot of one sequence.

    `length` counts the live slots that are listed, the same in all layers between steps.
    """

    def __init__(self, layers: int, kv_heads: int, capacity: int, device: torch.device) -> None:
        """Room for `capacity` slots, more than which are never live; contents are written before they are read."""
        self.length = 0
        self.mass_LHC: Tensor = torch.empty(layers, kv_heads, capacity, dtype=torch.float32, device=device)
        self.positions_LHC: Tensor = torch.empty(layers, kv_heads, capacity, dtype=torch.int32, device=device)

    @property
    def num_bytes(self) -> int:
        """Memory held besides keys and values."""
        return self.mass_LHC.numel() * BYTES_PER_SLOT

    def open(self, layers: slice, first_slot: int, positions_T: Tensor) -> None:
        """List new tokens in some layers, in consecutive slots: their positions, and no mass yet."""
        end = first_slot + positions_T.shape[0]
        assert end <= self.mass_LHC.shape[2], f"{end} slots in a ledger of {self.mass_LHC.shape[2]}"
        self.positions_LHC[layers, :, first_slot:end] = positions_T
        self.mass_LHC[layers, :, first_slot:end].zero_()

    def mass(self, layers: slice, live: int) -> Tensor:
        """View of live mass, [L, H, N]."""
        return self.mass_LHC[layers, :, :live]

    def positions(self, layers: slice, live: int) -> Tensor:
        """View of live positions, [L, H, N]."""
        return self.positions_LHC[layers, :, :live]

    def shown(self, layers: slice, live: int, num_tokens: int) -> CachedTokens:
        """Copies of what is live, for a policy to look at."""
        return CachedTokens(
            positions=self.positions(layers, live).clone(),
            mass=self.mass(layers, live).clone(),
            num_tokens=num_tokens,
            first_row=(layers.start or 0) * self.mass_LHC.shape[1],
        )
