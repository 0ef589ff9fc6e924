"""Laws of INT4 in groups: no group is worse than by its maximum, and packing loses nothing, whoever unpacks."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support.int4 import packed, unpacked

from trtkit.kernels.int4 import unpack_int4
from trtkit.spec.dtype import DType
from trtkit.trtllm.groups import pack_groups, quantise_groups

SIZES = st.sampled_from((32, 64, 128))
SOURCES = st.sampled_from((DType.FP32, DType.FP16))


@st.composite
def weights(draw: st.DrawFn) -> tuple[np.ndarray, int, DType]:
    size, rows, groups, source = draw(SIZES), draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(SOURCES)
    dtype = np.dtype(np.float32 if source is DType.FP32 else np.float16)
    numbers = st.floats(-100, 100, width=32 if source is DType.FP32 else 16, allow_subnormal=False)
    return draw(arrays(dtype, (rows, size * groups), elements=numbers)), size, source


@settings(max_examples=60, deadline=None)
@given(weights())
def test_no_group_is_worse_than_with_the_scale_of_its_maximum(case: tuple[np.ndarray, int, DType]) -> None:
    values, size, source = case
    numbers, scales = quantise_groups(values, source, size, DType.FP32, "w")
    wide = values.astype(np.float64).reshape(values.shape[0], -1, size)
    assert (numbers >= -8).all() and (numbers <= 7).all()  # noqa: PT018 - one range
    ours = ((numbers.reshape(wide.shape) * scales.astype(np.float64)[:, :, None] - wide) ** 2).sum(2)
    plain = np.abs(wide).max(2, keepdims=True) / 7
    by_maximum = ((np.rint(wide / np.where(plain > 0, plain, 1)) * plain - wide) ** 2).sum(2)
    assert (ours <= by_maximum * (1 + 1e-4) + 1e-12 * (wide**2).sum(2)).all()


@settings(max_examples=60, deadline=None)
@given(st.data(), SIZES)
def test_packing_is_read_back_by_the_kernels_and_by_hand(data: st.DataObject, size: int) -> None:
    shape = (data.draw(st.integers(1, 3)), size * data.draw(st.integers(1, 3)))
    numbers = data.draw(arrays(np.int8, shape, elements=st.integers(-8, 7)))
    ours = torch.from_numpy(pack_groups(numbers, size))
    assert torch.equal(unpack_int4(ours, size), torch.from_numpy(numbers))
    assert torch.equal(unpacked(ours, size), torch.from_numpy(numbers).long())
    assert torch.equal(packed(torch.from_numpy(numbers), size), ours)
