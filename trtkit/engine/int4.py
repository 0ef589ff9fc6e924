"""Weights of 4 or 8 bits with a scale for each group of input channels, multiplied on a CPU.

`y = x @ dequantised.T`: a scale of a group does not come out of the sum, so a few output channels at a time are brought
to float32 and multiplied there, as the twin of the device's kernel defines it. Packed numbers are taken four fourths of a
group at a time (the order is `trtkit.kernels.int4`'s), which passes over memory far less often than the twin does. torch's
own INT4 product is quick in bfloat16 alone, wants a layout of its own with twice the scales, and is not used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trtkit.engine.matmul import linear
from trtkit.kernels.int4 import group_of

_TILE_ELEMENTS = 1 << 19
_MIDDLE = 8


def grouped_linear(x_TI: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """`x @ dequantised.T`, [T, O], in the type of `x_TI`; extra memory is one tile, not one matrix.

    Args:
        x_TI: activations.
        weight: uint8 [O, I / 2], packed INT4, or int8 [O, I]; contiguous.
        scale: [O, I / group].
        zero: zero points of the same shape, or None.
    """
    (tokens, inputs), outputs = x_TI.shape, weight.shape[0]
    rows = max(1, min(outputs, _TILE_ELEMENTS // inputs))
    tile = torch.empty(rows, scale.shape[1], group_of(weight, scale), device=x_TI.device)
    wide_x = x_TI.float()
    y_TO = torch.empty(tokens, outputs, dtype=x_TI.dtype, device=x_TI.device)
    for start in range(0, outputs, rows):
        part = slice(start, min(outputs, start + rows))
        wide = _dequantise_into(
            tile[: part.stop - start], weight[part], scale[part], None if zero is None else zero[part]
        )
        y_TO[:, part] = linear(wide_x, wide.view(-1, inputs))
    return y_TO


def _dequantise_into(tile_OGI: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Fill `tile_OGI` [O, groups, group], float32, with what the weight stands for."""
    if weight.dtype is torch.uint8:
        words = weight.view(torch.int16).view(*scale.shape, -1)
        fourths = tile_OGI.view(*scale.shape, 4, -1)
        for index in range(4):
            fourths[:, :, index] = (words >> (4 * index)) & 0xF
        tile_OGI.sub_(_MIDDLE if zero is None else zero.float()[:, :, None] + _MIDDLE)
    else:
        tile_OGI.copy_(weight.view(tile_OGI.shape))
        if zero is not None:
            tile_OGI.sub_(zero.float()[:, :, None])
    return tile_OGI.mul_(scale.float()[:, :, None])
