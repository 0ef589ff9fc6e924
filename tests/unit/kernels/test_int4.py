"""Packing of INT4 weights, and what a scale for each group means."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trtkit.kernels.int4 import dequantise_groups, group_of, pack_int4, unpack_int4
from trtkit.kernels.matmul import linear


@given(st.sampled_from([4, 32, 64, 128]), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32))
def test_packing_and_unpacking_give_the_values_back(group, outputs, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 8, (outputs, groups * group), generator=generator, dtype=torch.int8)
    packed = pack_int4(values, group)
    assert packed.dtype is torch.uint8
    assert packed.shape == (outputs, groups * group // 2)
    assert packed.is_contiguous()
    assert torch.equal(unpack_int4(packed, group), values)


@pytest.mark.parametrize(("inputs", "group"), [(256, 128), (192, 64), (96, 32), (8, 4)])
def test_a_word_holds_a_channel_of_each_fourth_of_its_group(inputs, group):
    values = torch.randint(-8, 8, (3, inputs), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    words = pack_int4(values, group).view(torch.int16).to(torch.int32) & 0xFFFF
    for word in range(inputs // 4):
        start, inner = divmod(word, group // 4)
        for fourth in range(4):
            channel = start * group + fourth * (group // 4) + inner
            assert torch.equal((words[:, word] >> (4 * fourth) & 0xF) - 8, values[:, channel].to(torch.int32))


def test_groups_packed_apart_and_side_by_side_are_packed_together():
    """Rows that are split among ranks are joined as bytes."""
    values = torch.randint(-8, 8, (2, 192), generator=torch.Generator().manual_seed(2), dtype=torch.int8)
    halves = [pack_int4(part.contiguous(), 32) for part in values.split(96, dim=1)]
    assert torch.equal(torch.cat(halves, dim=1), pack_int4(values, 32))


def test_values_outside_four_bits_are_refused():
    with pytest.raises(ValueError, match="from -3 to 8 do not fit INT4: allowed are -8 to 7"):
        pack_int4(torch.tensor([[-3, 8, 0, 0]], dtype=torch.int8), 4)
    with pytest.raises(ValueError, match="from -9 to 0 "):
        pack_int4(torch.tensor([[-9, 0, 0, 0]], dtype=torch.int8), 4)


@pytest.mark.parametrize("group", [0, 2, 5, 8])
def test_groups_that_do_not_fit_are_refused(group):
    with pytest.raises(ValueError, match=f"groups of {group} do not fit 12 input channels"):
        pack_int4(torch.zeros(2, 12, dtype=torch.int8), group)
    with pytest.raises(ValueError, match="do not fit 12 input channels"):
        unpack_int4(torch.zeros(2, 6, dtype=torch.uint8), group)


def test_a_group_is_the_inputs_over_the_scales():
    scale = torch.ones(2, 3)
    assert group_of(torch.zeros(2, 96, dtype=torch.uint8), scale) == 64
    assert group_of(torch.zeros(2, 96, dtype=torch.int8), scale) == 32
    with pytest.raises(ValueError, match="100 input channels do not fall into 3 groups"):
        group_of(torch.zeros(2, 50, dtype=torch.uint8), scale)
    with pytest.raises(ValueError, match="do not fall into 0 groups"):
        group_of(torch.zeros(2, 50, dtype=torch.uint8), torch.ones(2, 0))


def test_a_weight_is_its_value_less_the_zero_point_times_the_scale_of_its_group():
    values = torch.tensor([[-8, -7, 0, 7, 1, 2, 3, 4]], dtype=torch.int8)
    scale, zero = torch.tensor([[0.5, 2.0]]), torch.tensor([[1.0, -3.0]])
    expected = torch.tensor([[-4.5, -4.0, -0.5, 3.0, 8.0, 10.0, 12.0, 14.0]])
    assert torch.equal(dequantise_groups(pack_int4(values, 4), scale, zero), expected)
    assert torch.equal(dequantise_groups(values, scale, zero), expected)
    assert torch.equal(dequantise_groups(values, scale), dequantise_groups(values, scale, torch.zeros(1, 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_OI": torch.zeros(4, 128).half()}, "are for int8 and packed INT4"),
        ({"x_TI": torch.zeros(2, 64).half()}, r"activations \[2, 64\] do not go with a weight of 128 input"),
        (
            {"weight_OI": torch.zeros(4, 128, dtype=torch.uint8)[:, :64]},
            r"weight of shape \[4, 64\] and strides \[128, 1\]",
        ),
        ({"scale": torch.ones(3, 4).half()}, r"scales of shape \[3, 4\].* must be \[4, 4\]"),
        ({"scale": torch.ones(4, 1).half().expand(4, 4)}, "scales of .* contiguous"),
        ({"zero": torch.ones(4, 2).half()}, r"zero points of shape \[4, 2\]"),
        ({"bias_O": torch.ones(3).half()}, r"bias of shape \[3\]"),
        ({"out": torch.zeros(4, 2).half()}, r"out of shape \[4, 2\]"),
        ({"out": torch.zeros(4, 2).half().T}, r"strides \[1, 2\]: must be \[2, 4\], rows contiguous"),
    ],
)
def test_operands_that_do_not_go_together_are_refused(change, message):
    operands = {"x_TI": torch.ones(2, 128).half(), "weight_OI": torch.zeros(4, 64, dtype=torch.uint8)}
    operands |= {"scale": torch.ones(4, 4).half(), "zero": torch.zeros(4, 4).half(), "bias_O": torch.zeros(4).half()}
    assert linear(**operands).tolist() == [[-1024.0] * 4] * 2
    with pytest.raises(ValueError, match=message):
        linear(**(operands | change))
