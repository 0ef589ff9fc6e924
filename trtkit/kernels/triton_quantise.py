# ruff: noqa: ANN001, ANN202, E741, PLR0913, PLR0917
# mypy: disable-error-code="no-untyped-def"
"""Kernels that change a number's width: activations to FP8, and 8-bit weights to 16 bits for torch's own product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtkit.kernels.matmul_configs import INTERPRETED
from trtkit.kernels.triton_fp8 import magnitude, row_scale, to_e4m3
from trtkit.kernels.triton_widen import widen


def dequantise(weight_OI: Tensor, scale_O: Tensor, out_OI: Tensor) -> Tensor:
    """Write `weight * scale` in the type of `out_OI`, a contiguous tensor of the same shape."""
    kind, bits = kind_of(weight_OI)
    outputs, inputs = weight_OI.shape
    _dequantise[(outputs, triton.cdiv(inputs, 4096))](
        bits, scale_O, out_OI, inputs, KIND=kind, BI=4096, ASM=not INTERPRETED, num_warps=4
    )
    return out_OI


def quantise_rows_fp8(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """See `trtkit.kernels.matmul.quantise_rows_fp8`."""
    tokens, inputs = x_TI.shape
    if x_TI.stride(1) != 1:
        x_TI = x_TI.contiguous()
    quantised = torch.empty(tokens, inputs, dtype=torch.float8_e4m3fn, device=x_TI.device)
    scale = torch.empty(tokens, 1, dtype=torch.float32, device=x_TI.device)
    if tokens:
        block = min(8192, triton.next_power_of_2(inputs))
        _quantise_rows[(tokens,)](
            x_TI, quantised, scale, inputs, x_TI.stride(0), BI=block, BY_HAND=INTERPRETED, num_warps=8
        )
    return quantised, scale


def kind_of(weight_OI: Tensor) -> tuple[str, Tensor]:
    """What the kernel has to widen, and the weight as a type that Triton loads on every GPU."""
    if weight_OI.dtype is torch.int8:
        return "int8", weight_OI
    if weight_OI.dtype is torch.float8_e4m3fn:
        return "fp8", weight_OI.view(torch.uint8)
    return "plain", weight_OI


@triton.jit
def _dequantise(weight, scale, out, I, KIND: tl.constexpr, BI: tl.constexpr, ASM: tl.constexpr):
    channel = tl.program_id(0)
    lane = tl.program_id(1) * BI + tl.arange(0, BI)
    inside = lane < I
    start = channel.to(tl.int64) * I
    bits = tl.load(weight + start + lane, mask=inside, other=0, eviction_policy="evict_first")
    wide = widen(bits, KIND, out.dtype.element_ty, ASM).to(tl.float32) * tl.load(scale + channel).to(tl.float32)
    tl.store(out + start + lane, wide.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _quantise_rows(x, quantised, scale, I, stride_x, BI: tl.constexpr, BY_HAND: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BI)
    largest = tl.zeros([BI], tl.int32)
    for start in range(0, I, BI):
        part = tl.load(x + row * stride_x + start + lane, mask=start + lane < I, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, magnitude(part))
    size = row_scale(largest, tl.float32)
    for start in range(0, I, BI):
        part = tl.load(x + row * stride_x + start + lane, mask=start + lane < I, other=0.0).to(tl.float32)
        tl.store(quantised + row * I + start + lane, to_e4m3(part, size, BY_HAND), mask=start + lane < I)
    tl.store(scale + row, size)
