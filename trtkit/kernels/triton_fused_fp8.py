# ruff: noqa: ANN001, ANN202, PLR0913, PLR0917
# mypy: disable-error-code="no-untyped-def, assignment"
"""Norm and activation that write FP8 rows and their scales at once; `trtkit.kernels.fused` says what each computes.

Imported only where Triton is. A program keeps its whole row in registers, so that activations are read once and leave
as a byte each. Rows are rounded to the activations' type first, as the two kernels that these replace do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtkit.kernels.matmul_configs import INTERPRETED
from trtkit.kernels.triton_fp8 import magnitude, row_scale, to_e4m3
from trtkit.kernels.triton_fused import rounded

MAX_NORM_WIDTH = 8192
"""What `add_rms_norm` sums at once, in the same order; wider rows are left to it and a kernel that quantises."""

_SILU_BLOCK = 4096
MAX_SILU_BYTES = 8 * _SILU_BLOCK * 2
"""Of a row's result: eight 16-byte pieces a thread with 16 warps, 32 registers. Wider rows take two kernels."""


def add_rms_norm_fp8(
    delta_TE: Tensor | None, residual_TE: Tensor, weight_E: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """See `trtkit.kernels.fused.add_rms_norm_fp8`; at most `MAX_NORM_WIDTH` wide."""
    tokens, width = residual_TE.shape
    quantised, scale = _results(tokens, width, residual_TE)
    if tokens == 0:
        return quantised, scale
    if delta_TE is not None and delta_TE.stride(1) != 1:
        delta_TE = delta_TE.contiguous()
    block = triton.next_power_of_2(width)
    _add_rms_norm_fp8[(tokens,)](
        residual_TE if delta_TE is None else delta_TE, residual_TE, weight_E.contiguous(), quantised, scale,
        0 if delta_TE is None else delta_TE.stride(0), residual_TE.stride(0), epsilon, WIDTH=width, BLOCK=block,
        HAS_DELTA=delta_TE is not None, BY_HAND=INTERPRETED, num_warps=max(1, min(16, block // 512)),
    )  # fmt: skip
    return quantised, scale


def silu_mul_fp8(gate_up_T2I: Tensor) -> tuple[Tensor, Tensor]:
    """See `trtkit.kernels.fused.silu_mul_fp8`; at most `MAX_SILU_BYTES` a row."""
    tokens, width = gate_up_T2I.shape[0], gate_up_T2I.shape[1] // 2
    quantised, scale = _results(tokens, width, gate_up_T2I)
    if tokens == 0:
        return quantised, scale
    if gate_up_T2I.stride(1) != 1:
        gate_up_T2I = gate_up_T2I.contiguous()
    block = min(_SILU_BLOCK, triton.next_power_of_2(width))
    _silu_mul_fp8[(tokens,)](
        gate_up_T2I, quantised, scale, gate_up_T2I.stride(0), WIDTH=width, BLOCK=block, BY_HAND=INTERPRETED,
        num_warps=max(1, block // 256),
    )  # fmt: skip
    return quantised, scale


def _results(tokens: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    quantised = torch.empty(tokens, width, dtype=torch.float8_e4m3fn, device=like.device)
    return quantised, torch.empty(tokens, 1, dtype=torch.float32, device=like.device)


@triton.jit
def _add_rms_norm_fp8(
    delta, residual, weight, quantised, scale, stride_delta, stride_residual, epsilon,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_DELTA: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < WIDTH
    gain = tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
    row = tl.load(residual + token * stride_residual + lane, mask=inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        added = tl.load(delta + token * stride_delta + lane, mask=inside, other=0.0).to(tl.float32)
        row = rounded(row + added, residual)
        tl.store(residual + token * stride_residual + lane, row.to(residual.dtype.element_ty), mask=inside)
    root = tl.math.rsqrt(tl.sum(row * row, 0) / WIDTH + epsilon)
    # Beyond the row there are zeros, which stay zeros unless the root is no number; then the row has a NaN anyway.
    row = rounded(rounded(row * root, residual) * gain, residual)
    size = row_scale(magnitude(row), tl.float32)
    tl.store(quantised + token * WIDTH + lane, to_e4m3(row, size, BY_HAND), mask=inside)
    tl.store(scale + token, size)


@triton.jit
def _silu_mul_fp8(
    gate_up, quantised, scale, stride_in, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BY_HAND: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    top = magnitude(tl.zeros([BLOCK], gate_up.dtype.element_ty))
    held = ()
    for first in tl.static_range(0, WIDTH, BLOCK):
        at = first + lane
        gate = tl.load(gate_up + token * stride_in + at, mask=at < WIDTH, other=0.0).to(tl.float32)
        up = tl.load(gate_up + token * stride_in + WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)
        active = rounded(gate / (1.0 + tl.exp(-gate)), gate_up)
        value = (active * up).to(gate_up.dtype.element_ty)
        top = tl.maximum(top, magnitude(value))  # not of the wide value, which would then be held for the second loop
        held = held + (value,)  # noqa: RUF005 - all that Triton takes
    size = row_scale(top, gate_up.dtype.element_ty)
    for piece in tl.static_range(len(held)):
        at = piece * BLOCK + lane
        tl.store(quantised + token * WIDTH + at, to_e4m3(held[piece].to(tl.float32), size, BY_HAND), mask=at < WIDTH)
    tl.store(scale + token, size)
