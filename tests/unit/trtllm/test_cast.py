"""Casts: every 16-bit value to the bit, on the quick path too, and nothing unusual let through."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError
from trtkit.trtllm import cast as cast_module
from trtkit.trtllm.cast import cast, quantise_rows

TORCH = {DType.FP32: torch.float32, DType.FP16: torch.float16, DType.BF16: torch.bfloat16}
SMALLEST_NORMAL, BEYOND = 0x3880, 0x4780
"""2**-14 and 2**16 as BF16: where FP16's normal range begins and where it has ended."""


def bits_of(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.dtype.itemsize}")


def by_torch(bits: np.ndarray, source: DType, target: DType) -> np.ndarray:
    cast_there = torch.from_numpy(bits.view(np.int16)).view(TORCH[source]).to(TORCH[target])
    return bits_of(cast_there.view(torch.int32 if target is DType.FP32 else torch.int16).numpy())


def both_signs(magnitudes: np.ndarray) -> np.ndarray:
    return np.concatenate([magnitudes, magnitudes | 0x8000]).astype(np.uint16)


def small_among_ordinary() -> np.ndarray:
    """[rows, 128]: each BF16 below FP16's normal range, both signs, among ordinary ones."""
    small = both_signs(np.arange(SMALLEST_NORMAL))
    rows = np.random.default_rng(0).choice(both_signs(np.arange(SMALLEST_NORMAL, BEYOND)), (small.size, 128))
    rows[np.arange(small.size), np.arange(small.size) % 128] = small
    return rows.astype(np.uint16)


def test_the_quick_path_is_exact_for_every_normal_value() -> None:
    bits = both_signs(np.arange(SMALLEST_NORMAL, BEYOND))
    quick = cast_module._bf16_as_fp16(bits)
    assert quick is not None
    assert np.array_equal(bits_of(quick), by_torch(bits, DType.BF16, DType.FP16))


def test_the_quick_path_rounds_every_small_value_as_torch_does() -> None:
    bits = small_among_ordinary()
    quick = cast_module._bf16_as_fp16(bits)
    assert quick is not None
    assert np.array_equal(bits_of(quick), by_torch(bits, DType.BF16, DType.FP16))


def test_the_quick_path_leaves_every_value_beyond_the_range_to_the_errors() -> None:
    ordinary = np.full(64, SMALLEST_NORMAL, dtype=np.uint16)
    for bits in both_signs(np.arange(BEYOND, 0x8000)):
        ordinary[17] = bits
        assert cast_module._bf16_as_fp16(ordinary) is None


@pytest.mark.parametrize("source", [DType.BF16, DType.FP16])
@pytest.mark.parametrize("target", [DType.FP32, DType.FP16, DType.BF16])
def test_every_value_a_target_can_hold_is_torchs(source: DType, target: DType) -> None:
    bits = both_signs(np.arange(0x7F80 if source is DType.BF16 else 0x7C00))
    if source is DType.BF16 and target is DType.FP16:
        bits = both_signs(np.arange(BEYOND))
    values = bits if source is DType.BF16 else bits.view(np.float16)
    result = cast(values[:, None], source, target, "w")
    assert np.array_equal(bits_of(result)[:, 0], by_torch(bits, source, target))


@pytest.mark.parametrize("cols", [1, 7, 8, 13, 64])
@pytest.mark.parametrize("value", [0x0000, 0x3F80, 0x3400, 0x8001])
def test_any_shape_and_share_of_small_values_gives_the_same_numbers(cols: int, value: int) -> None:
    bits = np.random.default_rng(0).choice(np.arange(0x3800, BEYOND, dtype=np.uint16), (5, cols))
    bits[1:3] = value
    result = cast(bits, DType.BF16, DType.FP16, "w")
    assert result.shape == bits.shape
    assert np.array_equal(bits_of(result), by_torch(bits, DType.BF16, DType.FP16))


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (0x4780, "w row 103 holds 65536, beyond the range of fp16"),
        (0xC780, "w row 103 holds 65536, beyond the range of fp16"),
        (0x7F80, "w has NaN or infinity in row 103"),
        (0xFF80, "w has NaN or infinity in row 103"),
        (0x7FC1, "w has NaN or infinity in row 103"),
        (0xFFFF, "w has NaN or infinity in row 103"),
    ],
)
def test_one_bad_value_is_named_with_its_row(bits: int, message: str) -> None:
    values = np.full((8, 64), 0x3F80, dtype=np.uint16)
    values[3, 63] = bits
    with pytest.raises(InputError, match=message):
        cast(values, DType.BF16, DType.FP16, "w", first_row=100)


def test_a_cast_leaves_its_input_and_earlier_results_alone() -> None:
    first, second = np.full((2, 64), 0x3F80, dtype=np.uint16), np.full((2, 64), 0x4000, dtype=np.uint16)
    first.flags.writeable = False
    ones = cast(first, DType.BF16, DType.FP16, "w")
    twos = cast(second, DType.BF16, DType.FP16, "w")
    assert (ones == 1).all()
    assert (twos == 2).all()


def test_threads_do_not_share_intermediate_arrays() -> None:
    seen: list[int] = []
    kept = []

    def look() -> None:
        arrays = cast_module._scratch().arrays(8)
        kept.append(arrays)
        seen.append(arrays[0].ctypes.data)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(seen)) == 2


def test_int8_of_bf16_is_int8_of_the_same_numbers_in_fp32() -> None:
    bits = np.random.default_rng(0).choice(both_signs(np.arange(0x3000, 0x4200)), (16, 33)).astype(np.uint16)
    wide = (bits.astype(np.uint32) << 16).view(np.float32)
    for ours, theirs in zip(quantise_rows(bits, DType.BF16), quantise_rows(wide, DType.FP32), strict=True):
        assert np.array_equal(ours, theirs)
