# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def"
"""The Triton kernel behind `trtkit.kernels.slots`; its twin there defines it. Imported only where Triton is."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024


def flag_bad_slots(keep: Tensor, live: int, flag_1: Tensor) -> None:
    """See `trtkit.kernels.slots.flag_bad_slots`."""
    rows = keep.contiguous().view(-1, keep.shape[-1])
    grid = (rows.shape[0], triton.cdiv(rows.shape[1], _TILE))
    _flag[grid](rows, flag_1, rows.shape[1], live, TILE=_TILE)


# A flag is one of many side by side; where it lies must not ask for another compilation.
@triton.jit(do_not_specialize=["kept", "live"], do_not_specialize_on_alignment=["keep", "flag"])
def _flag(keep, flag, kept, live, TILE: tl.constexpr):
    row = keep + tl.program_id(0).to(tl.int64) * kept
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = place < kept
    slot = tl.load(row + place, mask=inside, other=0).to(tl.int64)
    # The slot before the first counts as -1, so that one comparison also refuses negative ones.
    before = tl.load(row + place - 1, mask=inside & (place > 0), other=-1).to(tl.int64)
    wrong = inside & ((slot <= before) | (slot >= live))
    if tl.max(wrong.to(tl.int32), 0) > 0:
        tl.store(flag, 1)
