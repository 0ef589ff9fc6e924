"""Numbers of one element type to another, with nothing unusual let through. NumPy only, so that it starts at once.

A 16-bit type has 65,536 values, so a cast from one is a table, computed once and exact. Where bits only move (BF16 to
FP16 in FP16's normal range, BF16 to FP32) whole-array integer operations give the same bits several times faster. NaN,
infinity and overflow are errors that name the row: an engine built from them answers fluent nonsense. BF16, which NumPy
lacks, is held as uint16.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError

Array = NDArray[Any]
INT8_MAX = 127
FP8_MAX = 448.0
"""Largest float8_e4m3fn."""

FP8_LEAST_SCALE = 1 / (FP8_MAX * 512)
"""Smallest scale of an FP8 row, as in TensorRT-LLM's own conversion (`postprocess_fp8_rowwise`)."""

_STORAGE: dict[DType, type[np.generic]] = {
    DType.FP32: np.float32,
    DType.FP16: np.float16,
    DType.BF16: np.uint16,
    DType.INT8: np.int8,
    DType.INT4: np.uint8,
    DType.FP8: np.uint8,
    DType.INT32: np.int32,
}
_EXPONENT = {DType.FP32: 0x7F80_0000, DType.FP16: 0x7C00, DType.BF16: 0x7F80}
"""Bits of infinity; larger ones (the sign aside) are NaN."""
_GROUP = 8
"""Elements looked up together where one of them is below FP16's normal range."""
_MOST_LOOKED_UP = 1 / 8
"""Share of the groups above which one table lookup for all elements is faster."""
_BF16_FP16_MIN = 0x3880
"""2**-14 as BF16, FP16's smallest normal number."""
_BF16_FP16_END = 0x4780
"""2**16 as BF16, the first magnitude beyond FP16; the one before it, 65280, is exact in FP16."""


def storage_dtype(dtype: DType) -> np.dtype[Any]:
    """NumPy's type that holds the elements of `dtype`."""
    return np.dtype(_STORAGE[dtype])


def check_finite(values: Array, dtype: DType, where: str, first_row: int = 0) -> None:
    """Refuse NaN and infinity.

    Args:
        values: [rows, cols], contiguous, in the storage of `dtype`.
        dtype: FP32, FP16 or BF16.
        where: names the tensor in the error.
        first_row: the tensor's row that `values` begins with.

    Raises:
        InputError: names the first bad row.
    """
    row = _bad_row(values, dtype)
    if row is not None:
        raise InputError(f"{where} has NaN or infinity in row {first_row + row}; the source is damaged")


def cast(values: Array, source: DType, target: DType, where: str, first_row: int = 0) -> Array:
    """`values` [rows, cols] as `target`; beyond the type's range is an error, never infinity.

    Raises:
        InputError: NaN or infinity in the source, or overflow; names tensor and row.
    """
    if source is DType.BF16 and target is DType.FP16 and (quick := _bf16_as_fp16(values)) is not None:
        return quick
    result = values if source is target else _converted(values, source, target)
    row = _bad_row(result, target)
    if row is not None:
        check_finite(values, source, where, first_row)
        largest = float(np.abs(_converted(values[row], source, DType.FP32)).max())
        raise InputError(
            f"{where} row {first_row + row} holds {largest:.6g}, beyond the range of {target.value}; "
            "convert to bf16 or fp32"
        )
    return result


def quantise_rows(values: Array, source: DType) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric INT8 with one scale per row, as ModelOpt's weight-only INT8: scale = amax / 127 in float32.

    Args:
        values: [rows, cols], finite, in the storage of `source`.
        source: their type.

    Returns:
        (int8 [rows, cols], scale [rows]). A row of zeros has scale 0 and stays zero.
    """
    numbers: NDArray[np.float32] = _converted(values, source, DType.FP32)
    scales = np.maximum(numbers.max(axis=1), -numbers.min(axis=1)) / np.float32(INT8_MAX)
    safe = np.where(scales > 0, scales, np.float32(1))
    steps = np.divide(numbers, safe[:, None], out=None if numbers is values else numbers)
    np.rint(steps, out=steps)
    return steps.astype(np.int8), scales


def quantise_fp8_rows(values: Array, source: DType) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """FP8 (e4m3fn) with one scale per row: scale = amax / 448 in float32, at least `FP8_LEAST_SCALE`.

    Args:
        values: [rows, cols], finite, in the storage of `source`.
        source: their type.

    Returns:
        (the numbers' bits [rows, cols], scale [rows]).
    """
    numbers: NDArray[np.float32] = _converted(values, source, DType.FP32)
    most = np.maximum(numbers.max(axis=1), -numbers.min(axis=1)) / np.float32(FP8_MAX)
    scales = np.maximum(most, np.float32(FP8_LEAST_SCALE))
    return _fp8_bits(numbers / scales[:, None]), scales


def _fp8_bits(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Round to nearest, ties to even; what is larger than 448 becomes 448.

    e4m3 has three bits of mantissa, exponents from -6 (bias 7), and below that steps of 2**-9.
    """
    bits = values.view(np.uint32)
    magnitude = np.minimum(bits & 0x7FFF_FFFF, np.float32(FP8_MAX).view(np.uint32))
    normal = ((magnitude + 0x7_FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    small = np.rint(magnitude.view(np.float32) * np.float32(512)).astype(np.uint32)
    codes = np.where(magnitude < np.float32(2.0**-6).view(np.uint32), small, normal)
    result: NDArray[np.uint8] = (codes | ((bits >> 24) & 0x80)).astype(np.uint8)
    return result


def _converted(values: Array, source: DType, target: DType) -> Array:
    if source is target:
        return values
    if source is DType.BF16 and target is DType.FP32:
        wide = values.astype(np.uint32)
        return np.left_shift(wide, 16, out=wide).view(np.float32)
    if source is not DType.FP32:
        return np.take(_table(source, target), values.view(np.uint16))
    if target is DType.BF16:
        bits = values.view(np.uint32)
        return ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):
        return values.astype(storage_dtype(target))


class _Scratch(threading.local):
    """Each thread's intermediate arrays, kept: fresh ones cost more in page faults than the arithmetic in them."""

    def __init__(self) -> None:
        self._number, self._flag = np.empty(0, dtype=np.uint16), np.empty(0, dtype=np.bool_)

    def arrays(self, size: int) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
        """A 16-bit and a boolean array of `size` elements with anything in them, valid until the next call."""
        if self._number.size < size:
            self._number, self._flag = np.empty(size, dtype=np.uint16), np.empty(size, dtype=np.bool_)
        return self._number[:size], self._flag[:size]


@cache
def _scratch() -> _Scratch:
    return _Scratch()


def _bf16_as_fp16(values: Array) -> Array | None:
    """BF16 `values` as FP16 by moving bits, or None where that is not the way (overflow, NaN, infinity, many zeros).

    In FP16's normal range the cast is exact: with BF16's exponent bits e7..e0, FP16's five are e7 and e3..e0 (e6, e5
    and e4 equal not-e7 there), and the mantissa gets three zeros behind it. Zeros and numbers below the normal range,
    of which ordinary weights have a few per mille, are looked up afterwards, with their neighbours. Steps cover the
    whole array: short ones were slower with several threads.
    """
    if values.size % _GROUP:
        return None
    bits = values.reshape(-1)
    scratch, small = _scratch().arrays(bits.size)
    np.bitwise_and(bits, 0x7FFF, out=scratch)
    if scratch.max(initial=0) >= _BF16_FP16_END:
        return None
    np.less(scratch, _BF16_FP16_MIN, out=small)
    groups = np.flatnonzero(small.view(np.uint64) != 0)
    if groups.size > bits.size // _GROUP * _MOST_LOOKED_UP:
        return None
    result = np.left_shift(bits, 3)
    np.bitwise_and(result, 0x3FFF, out=result)
    np.bitwise_and(bits, 0xC000, out=scratch)
    np.bitwise_or(result, scratch, out=result)
    table = _table(DType.BF16, DType.FP16).view(np.uint16)
    result.reshape(-1, _GROUP)[groups] = table[bits.reshape(-1, _GROUP)[groups]]
    return result.view(np.float16).reshape(values.shape)


@cache
def _table(source: DType, target: DType) -> Array:
    """Every value of a 16-bit type in another type, by its bits."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    if source is DType.BF16:
        wide = (bits.astype(np.uint32) << 16).view(np.float32)
    else:
        wide = bits.view(np.float16).astype(np.float32)
    table = wide if target is DType.FP32 else _converted(wide, DType.FP32, target)
    table.flags.writeable = False
    return table


def _bad_row(values: Array, dtype: DType) -> int | None:
    """First row with NaN or infinity.

    Seen as integers, positive bad values are the largest signed ones and negative bad values the largest unsigned
    ones, so two maxima, at the speed of memory, settle the common case that there is none.
    """
    if values.size == 0:
        return None
    exponent, width = _EXPONENT[dtype], values.dtype.itemsize * 8
    signed, unsigned = values.view(f"i{width // 8}"), values.view(f"u{width // 8}")
    if int(signed.max()) < exponent and int(unsigned.max()) < exponent | 1 << (width - 1):
        return None
    magnitude = unsigned & ((1 << (width - 1)) - 1)
    return int(np.argmax((magnitude.reshape(values.shape[0], -1) >= exponent).any(axis=1)))
