"""INT4 in groups of inputs for the embedded engine: scales chosen by their error, numbers packed two to a byte.

Rounding to the nearest of 16 numbers with scale max / 7 leaves the number -8 unused. So each group has two scales to
choose from, that one and the one that puts the largest weight, whatever its sign, on -8 (it may be negative), and takes the
one with the smaller squared error. Neither cuts off the largest weight: scales that do have a still smaller squared error
and were no better a model (`docs/precisions.md` has the numbers).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trtkit.spec.dtype import DType
from trtkit.trtllm.cast import Array, cast

INT4_MIN, INT4_MAX = -8, 7


def quantise_groups(
    values: Array, source: DType, size: int, compute: DType, where: str, first_row: int = 0
) -> tuple[NDArray[np.int8], Array]:
    """Symmetric INT4 with the better of two scales for each row and group, as it is stored.

    Args:
        values: [rows, cols], finite, in the storage of `source`.
        source: their type.
        size: inputs of a group.
        compute: the type scales are stored in.
        where: names the tensor in the error.
        first_row: the tensor's row that `values` begins with.

    Returns:
        (numbers -8 to 7 as int8 [rows, cols], scales [rows, cols / size] in the storage of `compute`). A group of zeros
        has scale 0 and stays zero.

    Raises:
        InputError: a scale is beyond the range of `compute`.
    """
    rows, cols = values.shape
    weights = cast(values, source, DType.FP32, where, first_row).reshape(rows, cols // size, size)
    low, high = weights.min(axis=2), weights.max(axis=2)
    peak = np.where(high > -low, high, low)
    best, error = _tried(weights, np.abs(peak) / np.float32(INT4_MAX), compute, where, first_row)
    signed, signed_error = _tried(weights, peak / np.float32(INT4_MIN), compute, where, first_row)
    best = np.where(signed_error < error, signed, best)
    numbers = _rounded(weights, cast(best, compute, DType.FP32, where))
    return numbers.astype(np.int8).reshape(rows, cols), best


def _tried(
    weights: NDArray[np.float32], scales: NDArray[np.float32], compute: DType, where: str, first_row: int
) -> tuple[Array, NDArray[np.float32]]:
    """Scales as they are stored, and the squared error of each group with them, both [rows, groups]."""
    stored = cast(scales, DType.FP32, compute, f"{where}: scale", first_row)
    wide = cast(stored, compute, DType.FP32, where)
    steps = _rounded(weights, wide)
    steps *= wide[:, :, None]
    steps -= weights
    return stored, np.einsum("rgi,rgi->rg", steps, steps)


def _rounded(weights: NDArray[np.float32], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    safe = np.where(scales == 0, np.float32(1), scales)
    steps: NDArray[np.float32] = np.divide(weights, safe[:, :, None], dtype=np.float32)
    np.rint(steps, out=steps)
    np.clip(steps, INT4_MIN, INT4_MAX, out=steps)
    return steps


def pack_groups(numbers: NDArray[np.int8], size: int) -> NDArray[np.uint8]:
    """Numbers -8 to 7 [rows, cols] as uint8 [rows, cols / 2] in the order of `trtkit.spec.checkpoint`, each plus 8."""
    rows, cols = numbers.shape
    fourths = (numbers.view(np.uint8) + np.uint8(8)).reshape(rows, cols // size, 2, 2, size // 4)
    packed: NDArray[np.uint8] = fourths[:, :, :, 0] | (fourths[:, :, :, 1] << np.uint8(4))
    return np.ascontiguousarray(packed.swapaxes(2, 3)).reshape(rows, cols // 2)
