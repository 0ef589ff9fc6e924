"""From kept slots to the fewest copies: holes in front are filled with kept tokens from behind.

Slot order means nothing to decode attention (keys carry their rotation), so no more tokens move than are evicted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class HoleMoves:
    """Copies that compact rows to `kept` slots: row `rows[i]`'s slot `sources[i]` goes to `targets[i]`. int64 [M].

    Every target lies below `kept` and every source at or above it, so the copies cannot overlap, in any order.
    """

    rows: Tensor
    sources: Tensor
    targets: Tensor
    kept: int


def plan_moves(keep_RK: Tensor, length: int) -> HoleMoves:
    """The copies that leave the slots `keep_RK` ([rows, kept], distinct) of `length` live ones in [0, kept)."""
    rows, kept = keep_RK.shape
    stays = torch.zeros(rows, length, dtype=torch.bool, device=keep_RK.device)
    stays.scatter_(1, keep_RK.to(torch.int64), value=True)
    # Both lists come out row by row, and a row has as many holes in front as kept tokens behind: they pair up.
    holes = (~stays[:, :kept]).nonzero()
    movers = stays[:, kept:].nonzero()
    return HoleMoves(rows=holes[:, 0], sources=movers[:, 1] + kept, targets=holes[:, 1], kept=kept)
