"""Weights of 4 or 8 bits with a scale for each group of input channels, multiplied on a CPU.

`y = x @ dequantised.T`: a scale of a group does not come out of the sum, so a few output channels at a time are brought
to float32 and multiplied there, as the twin of the device's kernel defines it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trtkit.engine.matmul import linear
from trtkit.kernels.int4 import dequantise_groups

_TILE_ELEMENTS = 1 << 19


def grouped_linear(x_TI: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """`x @ dequantised.T`, [T, O], in the type of `x_TI`; extra memory is one tile, not one matrix.

    Args:
        x_TI: activations.
        weight: uint8 [O, I / 2], packed INT4 (`trtkit.kernels.int4`), or int8 [O, I].
        scale: [O, I / group].
        zero: zero points of the same shape, or None.
    """
    (tokens, inputs), outputs = x_TI.shape, weight.shape[0]
    tile = max(1, _TILE_ELEMENTS // inputs)
    wide_x = x_TI.float()
    y_TO = torch.empty(tokens, outputs, dtype=x_TI.dtype, device=x_TI.device)
    for start in range(0, outputs, tile):
        rows = slice(start, start + tile)
        y_TO[:, rows] = linear(
            wide_x, dequantise_groups(weight[rows], scale[rows], None if zero is None else zero[rows])
        )
    return y_TO
