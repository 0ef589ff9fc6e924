"""Bytes of one element type to another, with nothing unusual let through.

A piece of a tensor is read into memory once, cast or quantised, and checked: NaN, infinity and FP16 overflow are
errors that name the row, because an engine built from them answers fluent nonsense.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError

if TYPE_CHECKING:
    import torch

INT8_MAX = 127
_QUANT_BLOCK_BYTES = 1 << 19
"""A block of rows is quantised at a time, so that the float32 intermediate stays in the processor's cache."""


def torch_dtype(dtype: DType) -> torch.dtype:
    """torch's type of the same name."""
    import torch

    result = getattr(torch, dtype.trtllm_name)
    assert isinstance(result, torch.dtype)
    return result


def check_finite(values: torch.Tensor, where: str, first_row: int = 0) -> None:
    """Refuse NaN and infinity.

    Args:
        values: [rows, cols].
        where: names the tensor in the error.
        first_row: the tensor's row that `values` begins with.

    Raises:
        InputError: names the first bad row.
    """
    row = _bad_row(values)
    if row is not None:
        raise InputError(f"{where} has NaN or infinity in row {first_row + row}; the source is damaged")


def cast(values: torch.Tensor, dtype: torch.dtype, where: str, first_row: int = 0) -> torch.Tensor:
    """`values` [rows, cols] as `dtype`, contiguous; a value beyond the type's range is an error, never infinity.

    Raises:
        InputError: NaN or infinity in the source, or overflow; names tensor and row.
    """
    result = values.to(dtype).contiguous()
    row = _bad_row(result)
    if row is not None:
        check_finite(values, where, first_row)
        largest = float(values[row].abs().max())
        raise InputError(
            f"{where} row {first_row + row} holds {largest:.6g}, beyond {str(dtype).removeprefix('torch.')}'s range; "
            "convert with --dtype bf16 or fp32"
        )
    return result


def quantise_rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric INT8 with one scale per row, as ModelOpt's weight-only INT8: scale = amax / 127 in float32.

    Args:
        values: [rows, cols], finite.

    Returns:
        (int8 [rows, cols], float32 scale [rows]). A row of zeros has scale 0 and stays zero.
    """
    import torch

    rows, cols = values.shape
    result = torch.empty((rows, cols), dtype=torch.int8)
    scales = torch.empty(rows, dtype=torch.float32)
    step = max(1, _QUANT_BLOCK_BYTES // (cols * 4))
    for begin in range(0, rows, step):
        block = values[begin : begin + step].to(torch.float32, copy=True)
        low, high = torch.aminmax(block, dim=1)
        scale = torch.maximum(-low, high) / INT8_MAX
        scales[begin : begin + step] = scale
        safe = torch.where(scale > 0, scale, torch.ones_like(scale))
        result[begin : begin + step] = block.div_(safe[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX)
    return result, scales


def _bad_row(values: torch.Tensor) -> int | None:
    """First row with NaN or infinity. The common case, none, costs one pass: minimum and maximum propagate both."""
    import torch

    if values.numel() == 0:
        return None
    low, high = torch.aminmax(values)
    if bool(torch.isfinite(low)) and bool(torch.isfinite(high)):
        return None
    finite_rows = torch.isfinite(values).reshape(values.shape[0], -1).all(dim=1)
    return int(torch.nonzero(~finite_rows)[0])
