"""`Selection`: which cached tokens stay, as exact slots. Counts only, never ratios.

Shapes: B sequences, H KV heads, K kept tokens of all sequences together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Slots that stay in one layer's cache, for several sequences.

    `indices_HK` (int32, [KV heads, total kept]) holds slots counted from each sequence's own first slot, ascending
    inside a sequence; `offsets_B1` (int32, [B + 1]) bounds the sequences in the second dimension. Query heads
    that share a KV head share its row, and every row keeps as many tokens. TensorRT-LLM's sparse-KV hook takes the
    same two tensors, so its adapter converts types and nothing else.
    """

    indices_HK: Tensor
    offsets_B1: Tensor

    @classmethod
    def of(cls, kept: Sequence[Tensor]) -> Selection:
        """Join per-sequence slots, each [KV heads, kept]."""
        counts = torch.tensor([0] + [part.shape[1] for part in kept], dtype=torch.int32)
        return cls(
            indices_HK=torch.cat([part.to(torch.int32) for part in kept], dim=1),
            offsets_B1=counts.cumsum(0, dtype=torch.int32),
        )

    def sequence(self, index: int) -> Tensor:
        """One sequence's slots, [KV heads, kept]."""
        start, end = self.offsets_B1[index : index + 2].tolist()
        return self.indices_HK[:, start:end]

    def check(self, lengths: Sequence[int]) -> None:
        """Assert the contract against the sequences' live `lengths`.

        Raises:
            ValueError: offsets do not fit, or a sequence's slots are not ascending, distinct and in range.
        """
        bounds = self.offsets_B1.tolist()
        if len(bounds) != len(lengths) + 1 or bounds[0] != 0 or bounds[-1] != self.indices_HK.shape[1]:
            raise ValueError(
                f"offsets {bounds} do not bound {len(lengths)} sequences of {self.indices_HK.shape[1]} slots"
            )
        for index, length in enumerate(lengths):
            check_slots(self.sequence(index), length)


def check_slots(slots: Tensor, length: int) -> None:
    """Refuse slots ([..., kept]) that are not strictly ascending inside [0, length).

    Raises:
        ValueError: a policy answered with slots that would lose, double or invent tokens.
    """
    ascending = bool((slots[..., 1:] > slots[..., :-1]).all())
    if not ascending or (slots.numel() and (int(slots.min()) < 0 or int(slots.max()) >= length)):
        raise ValueError(f"kept slots must be strictly ascending inside [0, {length})")
