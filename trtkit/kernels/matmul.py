"""Matrix products of the device path: weights of 4, 8 or 16 bits against 16-bit activations, and FP8 against FP8.

Shapes: T tokens, I input channels in groups of g, O output channels; weights lie [O, I]. Types of a weight: int8 or
float8_e4m3fn with one scale per output channel (`y = (x @ q.T) * scale`, activations stay as they are: W8A16), int8
or packed INT4 (uint8 [O, I / 2], see `trtkit.kernels.int4`) with a scale for each group [O, I / g], or the
activations' own type without a scale. The twins define every function; kernels accumulate in fp32 and round once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trtkit.kernels.dispatch import has_fp8, use_triton
from trtkit.kernels.int4 import check_grouped, dequantise_groups

FAMILY = "matmul"
DECODE_ROWS = 64
"""Up to so many tokens a product is bound by reading the weights, and the kernel that reads them once runs."""

FP8_MAX = 448.0
"""Largest finite float8_e4m3fn."""

_TWIN_ELEMENTS = 1 << 22


def linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    scale: Tensor | None = None,
    bias_O: Tensor | None = None,
    *,
    zero: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`x @ dequantised(weight).T + bias`.

    Args:
        x_TI: activations, fp16, bf16 or fp32, rows contiguous.
        weight_OI: int8 or float8_e4m3fn with `scale`, uint8 [O, I / 2] (packed INT4) with `scale`, or the type of
            `x_TI` without; contiguous.
        scale: [O], one per output channel, or, for int8 and packed INT4, [O, I / g]; contiguous, any float type.
            None for a weight that is not quantised.
        bias_O: added in fp32 before rounding.
        zero: [O, I / g] in the type of `x_TI`, contiguous, only with a scale for each group: the weight is
            `(value - zero) * scale`. Whole numbers, for packed INT4 from -16 to 16, for int8 from -128 to 127. None is 0.
        out: [T, O] in the type of `x_TI`, written instead of a new tensor.

    Returns:
        [T, O] in the type of `x_TI`.

    Raises:
        ValueError: scales of groups with operands that do not go with them.
    """
    if scale is not None and scale.dim() == 2:
        check_grouped(x_TI, weight_OI, scale, bias_O, zero, out)
        if use_triton(x_TI, FAMILY):
            from trtkit.kernels import triton_matmul_grouped

            return triton_matmul_grouped.linear(x_TI, weight_OI, scale, bias_O, zero=zero, out=out)
    elif use_triton(x_TI, FAMILY):
        from trtkit.kernels import triton_matmul

        return triton_matmul.linear(x_TI, weight_OI, scale, bias_O, out=out)
    return linear_twin(x_TI, weight_OI, scale, bias_O, zero=zero, out=out)


def fp8_linear(
    x_TI: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """The product of an FP8 weight, with activations brought to FP8 row by row where that is quicker.

    Above `DECODE_ROWS` tokens both operands are FP8 (`quantise_rows_fp8`); below, reading weights is all the time
    there is and activations keep their 16 bits, which is never less exact.

    Args:
        x_TI: activations, fp16, bf16 or fp32.
        weight_OI: float8_e4m3fn.
        scale_O: one scale per output channel.
        bias_O: added before rounding.
        out: [T, O] in the type of `x_TI`, written instead of a new tensor.
    """
    if x_TI.shape[0] <= DECODE_ROWS:
        return linear(x_TI, weight_OI, scale_O, bias_O, out=out)
    if use_triton(x_TI, FAMILY):
        from trtkit.kernels import triton_matmul

        return triton_matmul.fp8_linear(x_TI, weight_OI, scale_O, bias_O, out=out)
    return fp8_linear_twin(x_TI, weight_OI, scale_O, bias_O, out=out)


def multiplies_fp8(tokens: int, weight_OI: Tensor) -> bool:
    """Whether `fp8_linear` brings so many activations to FP8, so that whoever makes them may do it instead."""
    if tokens <= DECODE_ROWS or weight_OI.dtype is not torch.float8_e4m3fn:
        return False
    if use_triton(weight_OI, FAMILY):
        from trtkit.kernels import scaled_mm

        return scaled_mm.fp8_way(weight_OI.device, *weight_OI.shape)[0] != "dequantise"
    return True


def fp8_product(  # noqa: PLR0913 - both operands come with their scales
    quantised_TI: Tensor,
    scale_T1: Tensor,
    weight_OI: Tensor,
    scale_O: Tensor,
    bias_O: Tensor | None,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """`fp8_linear` of activations that are FP8 already; ask `multiplies_fp8` before making them so.

    Args:
        quantised_TI: float8_e4m3fn, contiguous, as from `quantise_rows_fp8`.
        scale_T1: fp32.
        weight_OI: float8_e4m3fn.
        scale_O: one scale per output channel.
        bias_O: added before rounding.
        dtype: of the result.
        out: [T, O] in `dtype`, written instead of a new tensor.
    """
    if use_triton(quantised_TI, FAMILY):
        from trtkit.kernels import triton_matmul

        return triton_matmul.fp8_product(quantised_TI, scale_T1, weight_OI, scale_O, bias_O, dtype, out=out)
    return fp8_product_twin(quantised_TI, scale_T1, weight_OI, scale_O, bias_O, dtype, out=out)


def quantise_rows_fp8(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Each row as float8_e4m3fn with the scale that brings its largest element to `FP8_MAX`.

    Returns:
        The quantised rows [T, I] and fp32 scales [T, 1]; `quantised * scale` is the row again. A row of zeros has
        scale 1, and so has one with NaN, which stays NaN.
    """
    if use_triton(x_TI, FAMILY) and has_fp8(x_TI.device):
        from trtkit.kernels import triton_quantise

        return triton_quantise.quantise_rows_fp8(x_TI)
    return quantise_rows_twin(x_TI)


def linear_twin(
    x_TI: Tensor,
    weight_OI: Tensor,
    scale: Tensor | None = None,
    bias_O: Tensor | None = None,
    *,
    zero: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Defines `linear`: fp32 inside, a few output channels at a time so that no second matrix is held."""
    (tokens, inputs), outputs = x_TI.shape, weight_OI.shape[0]
    result = torch.empty(tokens, outputs, dtype=x_TI.dtype, device=x_TI.device) if out is None else out
    tile = max(1, _TWIN_ELEMENTS // inputs)
    wide_x = x_TI.float()
    for start in range(0, outputs, tile):
        rows = slice(start, min(outputs, start + tile))
        if scale is not None and scale.dim() == 2:
            groups = dequantise_groups(weight_OI[rows], scale[rows], None if zero is None else zero[rows])
            product = wide_x @ groups.T
        else:
            product = wide_x @ weight_OI[rows].float().T
            if scale is not None:
                product *= scale[rows].float()
        if bias_O is not None:
            product += bias_O[rows].float()
        result[:, rows] = product.to(result.dtype)
    return result


def fp8_linear_twin(
    x_TI: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Defines `fp8_linear` above `DECODE_ROWS` tokens: both operands rounded to FP8, fp32 inside."""
    return fp8_product_twin(*quantise_rows_twin(x_TI), weight_OI, scale_O, bias_O, x_TI.dtype, out=out)


def fp8_product_twin(  # noqa: PLR0913 - as `fp8_product`
    quantised_TI: Tensor,
    scale_T1: Tensor,
    weight_OI: Tensor,
    scale_O: Tensor,
    bias_O: Tensor | None,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Defines `fp8_product`."""
    product = linear_twin(quantised_TI.float(), weight_OI, scale_O) * scale_T1
    if bias_O is not None:
        product += bias_O.float()
    if out is None:
        return product.to(dtype)
    return out.copy_(product)


def quantise_rows_twin(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Defines `quantise_rows_fp8`."""
    wide = x_TI.float()
    largest = wide.abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, largest / FP8_MAX, torch.ones_like(largest))
    return (wide / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale
