"""Is a list of kept slots sound? Asked on the device, because an engine that waits for the answer stands still."""

from __future__ import annotations

import torch
from torch import Tensor

from trtkit.kernels.dispatch import use_triton


def flag_bad_slots(keep: Tensor, live: int, flag_1: Tensor) -> None:
    """Set `flag_1` (int32 [1]) to 1 if a row of `keep` ([..., K], any integer type) is no list of kept slots.

    A row must be strictly ascending inside [0, live). A flag that is set stays set.
    """
    if keep.numel() == 0:
        return
    if use_triton(keep, "ranking"):
        from trtkit.kernels import triton_slots

        triton_slots.flag_bad_slots(keep, live, flag_1)
        return
    flag_bad_slots_twin(keep, live, flag_1)


def flag_bad_slots_twin(keep: Tensor, live: int, flag_1: Tensor) -> None:
    """Defines `flag_bad_slots`."""
    descends = (keep[..., 1:] <= keep[..., :-1]).any()
    outside = ((keep[..., 0] < 0) | (keep[..., -1] >= live)).any()
    flag_1 |= (descends | outside).to(torch.int32)
