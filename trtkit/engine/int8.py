"""INT8 weight-only matrices: int8 in memory, one scale per output channel, multiplied in the activations' type.

`y = (x @ q.T) * scale`: the scale comes out of the sum, so the arithmetic is that of the dequantised matrix up to
rounding. torch ships a fused kernel that is fast in bfloat16 for a few rows and far slower than plain tiles
elsewhere, so it is used there, and only if a probe at load finds it present and right.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from trtkit.engine.matmul import linear

_TILE_ELEMENTS = 1 << 19
_FUSED_MAX_ROWS = 16


def int8_linear(x_TI: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    """`x @ dequantised.T`, [T, O]; `weight_OI` is int8, `scale_O` in the type of `x_TI`."""
    if x_TI.shape[0] <= _FUSED_MAX_ROWS and fused_int8_works(x_TI.device.type, x_TI.dtype):
        return torch._weight_int8pack_mm(x_TI, weight_OI, scale_O)
    return tiled_int8_linear(x_TI, weight_OI, scale_O)


def tiled_int8_linear(x_TI: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    """The same, by widening a few output channels at a time: extra memory is one tile, not one matrix."""
    outputs, inputs = weight_OI.shape
    tile = max(1, _TILE_ELEMENTS // inputs)
    y_TO = torch.empty(x_TI.shape[0], outputs, dtype=x_TI.dtype, device=x_TI.device)
    for start in range(0, outputs, tile):
        wide = weight_OI[start : start + tile].to(x_TI.dtype)
        y_TO[:, start : start + tile] = linear(x_TI, wide)
    return y_TO.mul_(scale_O)


@cache
def fused_int8_works(device_type: str, dtype: torch.dtype) -> bool:
    """Whether torch's fused kernel exists here for `dtype` and agrees with the tiles on a small example."""
    if device_type != "cpu" or dtype is not torch.bfloat16 or not hasattr(torch, "_weight_int8pack_mm"):
        return False
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (32, 64), dtype=torch.int8, generator=generator)
    x = torch.randn(3, 64, generator=generator).to(dtype)
    scale = torch.rand(32, generator=generator).to(dtype) / 127
    try:
        fused = torch._weight_int8pack_mm(x, weight, scale)
    except (RuntimeError, NotImplementedError):
        return False
    return bool(torch.allclose(fused.float(), tiled_int8_linear(x, weight, scale).float(), rtol=0.02, atol=0.02))
