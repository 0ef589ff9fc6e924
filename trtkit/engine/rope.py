"""Rotary position embedding: frequencies as tables, and the rotation in place.

Halves are rotated against each other (element i with i + D/2), as Llama's checkpoints expect.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from trtkit.spec.errors import UnsupportedError
from trtkit.spec.model import ROPE_SCALINGS, RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Radians per position of each pair, [D / 2] float32, after the model's context-extension scaling.

    Raises:
        UnsupportedError: the scaling is not one of `ROPE_SCALINGS`.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / (rope.theta**exponent)
    if rope.scaling == "none":
        return plain
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "llama3":
        return _llama3(plain, rope)
    raise UnsupportedError(f"RoPE scaling {rope.scaling!r}: the embedded engine runs {', '.join(ROPE_SCALINGS)}")


def _llama3(plain: Tensor, rope: RopeSpec) -> Tensor:
    """Llama 3.1: keep fast pairs, slow the slow ones by `factor`, blend between in wavelength."""
    wavelength = 2 * math.pi / plain
    slow = rope.original_max_position / rope.low_freq_factor
    fast = rope.original_max_position / rope.high_freq_factor
    blend = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    mixed = (1 - blend) * plain / rope.factor + blend * plain
    return torch.where(wavelength > slow, plain / rope.factor, torch.where(wavelength < fast, plain, mixed))


class RopeTable:
    """cos and sin of every position up to a limit, [positions, D / 2] in the compute type."""

    def __init__(self, rope: RopeSpec, head_dim: int, positions: int, dtype: torch.dtype, device: str) -> None:
        """Computed in float32, stored in `dtype` as transformers does."""
        angles = torch.outer(torch.arange(positions).float(), inverse_frequencies(rope, head_dim))
        self.cos = angles.cos().to(dtype).to(device)
        self.sin = angles.sin().to(dtype).to(device)

    def at(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for a step's tokens, each [T, 1, D / 2]."""
        return (
            self.cos.index_select(0, positions_T).unsqueeze(1),
            self.sin.index_select(0, positions_T).unsqueeze(1),
        )


def rotate_(x_THD: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate in place; `x_THD` may be a view into the fused projection's output."""
    first, second = x_THD.chunk(2, dim=-1)
    rotated = torch.addcmul(first * cos, second, sin, value=-1)
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(rotated)
