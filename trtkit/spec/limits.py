"""Names of the measured ceilings in `Environment.machine_limits`, and which one bounds a given amount of work.

A small model's weights live in a cache that is faster than memory, so reading is measured at several buffer sizes;
the ceiling of a working set is that of the largest measured buffer not larger than it.
"""

from __future__ import annotations

from collections.abc import Mapping

from trtkit.spec.dtype import DType
from trtkit.spec.measured import Measured

READ_BYTES_S = "read_bytes_s"
"""Reading device memory, from a buffer larger than every cache."""

_READ_AT = READ_BYTES_S + "@"


def read_key(buffer_bytes: int) -> str:
    """Key of the reading rate of a buffer that small."""
    return f"{_READ_AT}{buffer_bytes}"


def matmul_key(dtype: DType) -> str:
    """Key of the matrix product's rate, in FLOP/s, on operands of `dtype`."""
    return f"matmul_flops_s.{dtype.value}"


def read_limit(limits: Mapping[str, Measured], working_set_bytes: float) -> Measured | None:
    """The fastest rate at which this much can be read again and again; None if nothing was measured."""
    sizes = sorted(int(key.removeprefix(_READ_AT)) for key in limits if key.startswith(_READ_AT))
    fitting = [size for size in sizes if size <= working_set_bytes]
    if sizes and working_set_bytes <= sizes[-1]:
        return limits[read_key(fitting[-1] if fitting else sizes[0])]
    return limits.get(READ_BYTES_S)


def matmul_limit(limits: Mapping[str, Measured], dtype: DType) -> Measured | None:
    """The matrix product's rate on operands of `dtype`; None if it was not measured."""
    return limits.get(matmul_key(dtype))
