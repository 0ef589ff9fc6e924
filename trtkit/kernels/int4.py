"""INT4 weights two to a byte, and weights of 4 or 8 bits with a scale for each group of input channels.

Shapes: I input channels in groups of g, O output channels. A packed weight is uint8 [O, I / 2]: byte j of a group
holds channel j of that group in its low nibble and channel j + g / 2 in its high one, so a kernel multiplies low
nibbles with the group's first half of the activations and high ones with its second, and moves nothing about. A nibble
is the value plus 8. Scales, and zero points if there are any, are [O, I / g].
"""

from __future__ import annotations

import torch
from torch import Tensor

INT4_MIN, INT4_MAX = -8, 7
_OFFSET = 8


def pack_int4(q_OI: Tensor, group: int) -> Tensor:
    """Two values to a byte.

    Args:
        q_OI: whole numbers in [-8, 7], int8 (or any integer type).
        group: even number of input channels that share a scale; divides I.

    Returns:
        uint8 [O, I / 2], contiguous.

    Raises:
        ValueError: a group that does not fit, or a value outside INT4.
    """
    outputs, inputs = q_OI.shape
    _check_group(inputs, group)
    low, high = q_OI.aminmax() if q_OI.numel() else (0, 0)
    if int(low) < INT4_MIN or int(high) > INT4_MAX:
        raise ValueError(f"values from {int(low)} to {int(high)} do not fit INT4: allowed are {INT4_MIN} to {INT4_MAX}")
    nibbles = (q_OI + _OFFSET).to(torch.uint8).view(outputs, inputs // group, 2, group // 2)
    return (nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)).reshape(outputs, inputs // 2)


def unpack_int4(packed: Tensor, group: int) -> Tensor:
    """The values that `pack_int4` packed, int8 [O, I] in [-8, 7]."""
    outputs, half = packed.shape
    _check_group(2 * half, group)
    codes = packed.view(outputs, 2 * half // group, 1, group // 2)
    nibbles = torch.cat((codes & 0xF, codes >> 4), dim=2)
    return (nibbles.to(torch.int8) - _OFFSET).view(outputs, 2 * half)


def group_of(weight: Tensor, scale: Tensor) -> int:
    """How many input channels share one of the scales [O, I / g] of a weight, packed or not."""
    inputs = weight.shape[1] * (2 if weight.dtype is torch.uint8 else 1)
    groups = scale.shape[1]
    if groups < 1 or inputs % groups:
        raise ValueError(f"{inputs} input channels do not fall into {groups} groups of one size: check the scales")
    return inputs // groups


def dequantise_groups(weight: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """`(weight - zero) * scale` in fp32 [O, I]: what a weight with a scale for each group means.

    Args:
        weight: uint8 [O, I / 2], packed INT4, or int8 [O, I].
        scale: [O, I / g], any float type.
        zero: [O, I / g], the value that stands for 0, counted like the values themselves (so nibble 8 is 0).
    """
    group = group_of(weight, scale)
    values = unpack_int4(weight, group) if weight.dtype is torch.uint8 else weight
    wide = values.float().view(weight.shape[0], -1, group)
    if zero is not None:
        wide -= zero.float()[:, :, None]
    return (wide * scale.float()[:, :, None]).view(values.shape)


def _check_group(inputs: int, group: int) -> None:
    if group < 2 or group % 2 or inputs % group:
        raise ValueError(f"groups of {group} do not fit {inputs} input channels: an even number that divides them does")
