"""Weights of 4 or 8 bits with a scale for each group of input channels, and the products they must give."""

from __future__ import annotations

import torch
from torch import Tensor

from trtkit.kernels.int4 import pack_int4


def grouped_problem(
    tokens: int,
    outputs: int,
    inputs: int,
    group: int,
    bits: int,
    dtype: torch.dtype,
    *,
    zeros: bool = False,
    bias: bool = False,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Activations, a weight, its scales, zero points, a bias, and the float64 product of what they mean."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=generator).to(dtype)
    top = 1 << (bits - 1)
    values = torch.randint(-top, top, (outputs, inputs), generator=generator, dtype=torch.int8)
    scale = ((torch.rand(outputs, inputs // group, generator=generator) + 0.1) / top).to(dtype)
    zero = torch.randint(-8, 9, scale.shape, generator=generator).to(dtype) if zeros else None
    addend = torch.randn(outputs, generator=generator).to(dtype) if bias else None
    wide = values.double()
    if zero is not None:
        wide = wide - zero.double().repeat_interleave(group, 1)
    expected = x.double() @ (wide * scale.double().repeat_interleave(group, 1)).T
    if addend is not None:
        expected = expected + addend.double()
    return x, pack_int4(values, group) if bits == 4 else values, scale, zero, addend, expected
