# ruff: noqa: ANN001, ANN201, PLR0124
# mypy: disable-error-code="no-untyped-def"
"""Numbers brought to float8_e4m3fn inside Triton kernels, by row and one by one. `quantise_rows_twin` defines rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def magnitude(x):
    """Bits of |x|, which order like the numbers, with NaN above all: a maximum of numbers alone would lose a NaN."""
    if x.dtype.primitive_bitwidth == 16:
        bits = x.to(tl.int16, bitcast=True) & 0x7FFF
    else:
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return bits


@triton.jit
def row_scale(magnitudes, KIND: tl.constexpr):
    """The scale that brings a row's largest magnitude, of type KIND, to 448; 1 for a row of zeros or with a NaN."""
    top = tl.max(magnitudes, 0).to(magnitudes.dtype.scalar).to(KIND, bitcast=True).to(tl.float32)
    return tl.where(top > 0, tl.div_rn(top, 448.0), 1.0)


@triton.jit
def to_e4m3(x, scale, BY_HAND: tl.constexpr):
    """`x / scale`, saturated, NaN kept, by the hardware's conversion (Ada and Hopper have it, the interpreter not)."""
    x = tl.div_rn(x, scale)
    if BY_HAND:
        result = e4m3(x).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        result = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)
    return result


@triton.jit
def e4m3(x):
    """float8_e4m3fn as a byte, rounded to nearest even, saturated, NaN kept. By hand: Ampere has no such conversion."""
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.abs(x), 448.0)
    size_bits = size.to(tl.int32, bitcast=True)
    normal = ((size_bits + 0x7FFFF + ((size_bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 steps are 2^-9 wide, as wide as those of a float32 at 2^14: adding that rounds.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, normal) | ((bits >> 24) & 0x80)
    return tl.where(x != x, 0x7F, code)
