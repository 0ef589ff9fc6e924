"""INT4 weights two to a byte, and weights of 4 or 8 bits with a scale for each group of input channels.

Shapes: I input channels in groups of g, O output channels. A packed weight is uint8 [O, I / 2]; scales, and zero points
if there are any, are [O, I / g]. A nibble is the value plus 8.

The 16-bit word i of a group (bytes 2 i and 2 i + 1) holds its channels i, i + g / 4, i + g / 2 and i + 3 g / 4, the
first in the lowest bits. A mask therefore leaves a fourth of the group in neighbouring halves of a register, as a
tensor core takes 16-bit operands, and activations meet it as they lie in memory: nothing is moved about. (With two
halves of a group in the nibbles of a byte, a third of the decode kernel's instructions moved registers.)
"""

from __future__ import annotations

import torch
from torch import Tensor

INT4_MIN, INT4_MAX = -8, 7
_OFFSET = 8
_STORED = (torch.int8, torch.uint8)


def pack_int4(q_OI: Tensor, group: int) -> Tensor:
    """Two values to a byte, see the module.

    Args:
        q_OI: whole numbers in [-8, 7], int8 (or any integer type).
        group: number of input channels that share a scale, a multiple of 4; divides I.

    Returns:
        uint8 [O, I / 2], contiguous.

    Raises:
        ValueError: channels that do not fit, or a value outside INT4.
    """
    outputs, inputs = q_OI.shape
    _check(inputs, group)
    low, high = q_OI.aminmax() if q_OI.numel() else (0, 0)
    if int(low) < INT4_MIN or int(high) > INT4_MAX:
        raise ValueError(f"values from {int(low)} to {int(high)} do not fit INT4: allowed are {INT4_MIN} to {INT4_MAX}")
    nibbles = (q_OI + _OFFSET).to(torch.uint8).view(outputs, inputs // group, 2, 2, group // 4)
    return (nibbles[:, :, :, 0] | (nibbles[:, :, :, 1] << 4)).transpose(2, 3).reshape(outputs, inputs // 2)


def unpack_int4(packed: Tensor, group: int) -> Tensor:
    """The values that `pack_int4` packed, int8 [O, I] in [-8, 7]."""
    outputs, inputs = packed.shape[0], 2 * packed.shape[1]
    _check(inputs, group)
    codes = packed.view(outputs, inputs // group, group // 4, 2).transpose(2, 3)
    nibbles = torch.stack((codes & 0xF, codes >> 4), dim=3)
    return nibbles.to(torch.int8).sub_(_OFFSET).view(outputs, inputs)


def group_of(weight: Tensor, scale: Tensor) -> int:
    """How many input channels share one of the scales [O, I / g] of a weight, packed or not."""
    inputs = weight.shape[1] * (2 if weight.dtype is torch.uint8 else 1)
    groups = scale.shape[1]
    if groups < 1 or inputs % groups:
        raise ValueError(f"{inputs} input channels do not fall into {groups} groups of one size: check the scales")
    return inputs // groups


def check_grouped(
    x_TI: Tensor, weight: Tensor, scale: Tensor, bias_O: Tensor | None, zero: Tensor | None, out: Tensor | None
) -> None:
    """Refuse operands of a product in groups that do not go together, or that kernels would read as if they lay otherwise.

    Raises:
        ValueError: names the first of them.
    """
    if weight.dtype not in _STORED or not x_TI.is_floating_point():
        raise ValueError(f"scales of groups are for int8 and packed INT4 (uint8) by floats, not {weight.dtype}")
    outputs, inputs = weight.shape[0], group_of(weight, scale) * scale.shape[1]
    if x_TI.dim() != 2 or x_TI.shape[1] != inputs:
        raise ValueError(f"activations {list(x_TI.shape)} do not go with a weight of {inputs} input channels")
    beside = (("scales", scale, scale.shape[1:]), ("zero points", zero, scale.shape[1:]), ("bias", bias_O, ()))
    for what, tensor, rest in (*beside, ("weight", weight, weight.shape[1:])):
        if tensor is not None and (tensor.shape != (outputs, *rest) or not tensor.is_contiguous()):
            raise ValueError(
                f"{what} of shape {list(tensor.shape)} and strides {list(tensor.stride())}: must be {[outputs, *rest]}, contiguous"
            )
    if out is not None and (out.shape != (x_TI.shape[0], outputs) or (outputs > 1 and out.stride(1) != 1)):
        raise ValueError(
            f"out of shape {list(out.shape)} and strides {list(out.stride())}: must be {[x_TI.shape[0], outputs]}, rows contiguous"
        )


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
    return wide.mul_(scale.float()[:, :, None]).view(values.shape)


def _check(inputs: int, group: int) -> None:
    if group < 1 or group % 4 or inputs % group:
        raise ValueError(
            f"groups of {group} do not fit {inputs} input channels: a multiple of 4 that divides them does"
        )
