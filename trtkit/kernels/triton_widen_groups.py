# ruff: noqa: ANN001, ANN202, E741, PLR0913, PLR0917
# mypy: disable-error-code="no-untyped-def"
"""The kernel that widens weights with a scale for each group to 16 bits, or 32, for torch's own product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtkit.kernels.int4 import group_of
from trtkit.kernels.matmul_configs import INTERPRETED
from trtkit.kernels.triton_widen import widen_int4

_BLOCK = 1024


def dequantise_groups(weight: Tensor, scale: Tensor, zero: Tensor | None, out_OI: Tensor) -> Tensor:
    """Write `trtkit.kernels.int4.dequantise_groups` in the type of `out_OI`, a contiguous tensor [O, I].

    Args:
        weight: uint8 [O, I / 2], packed INT4, or int8 [O, I], contiguous.
        scale: [O, I / g].
        zero: the same, or None.
        out_OI: where to.
    """
    packed, (outputs, inputs) = weight.dtype is torch.uint8, out_OI.shape
    bits = weight.view(torch.int16) if packed else weight
    _dequantise[(outputs, triton.cdiv(bits.shape[1], _BLOCK))](
        bits, scale, zero, out_OI, inputs, PACKED=packed, GROUP=group_of(weight, scale), HAS_ZERO=zero is not None,
        BLOCK=_BLOCK, ASM=not INTERPRETED, num_warps=4,
    )  # fmt: skip
    return out_OI


@triton.jit
def _dequantise(
    weight, scale, zero, out, I, PACKED: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr,
    BLOCK: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    FOURTHS: tl.constexpr = 4 if PACKED else 1
    LANE_GROUP: tl.constexpr = GROUP // FOURTHS
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < I // FOURTHS
    group = row * (I // GROUP) + lane // LANE_GROUP
    bits = tl.load(weight + row * (I // FOURTHS) + lane, mask=inside, other=0, eviction_policy="evict_first")
    size = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
    point = tl.load(zero + group, mask=inside, other=0.0) if HAS_ZERO else size
    TYPE: tl.constexpr = out.dtype.element_ty
    place = out + row * I + lane // LANE_GROUP * GROUP + lane % LANE_GROUP
    if PACKED:
        NARROW: tl.constexpr = tl.bfloat16 if tl.bfloat16 == TYPE else tl.float16  # either holds every number
        numbers = widen_int4(bits, point, HAS_ZERO, NARROW if ASM else tl.float32, ASM)
        for fourth in tl.static_range(4):
            tl.store(place + fourth * LANE_GROUP, (numbers[fourth].to(tl.float32) * size).to(TYPE), mask=inside)
    else:
        number = bits.to(tl.float32) - point.to(tl.float32) if HAS_ZERO else bits.to(tl.float32)
        tl.store(place, (number * size).to(TYPE), mask=inside)
