"""INT4 in groups by code of our own: checkpoints in the embedded engine's form, built number by number."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def packed(numbers: torch.Tensor, group: int) -> torch.Tensor:
    """uint8 [out, in / 2] of numbers -8 to 7; bytes 2 i and 2 i + 1 of a group hold inputs i, i + g/4, i + g/2, i + 3 g/4."""
    rows, fourth = [], group // 4
    for row in (numbers.long() + 8).tolist():
        line = []
        for start in range(0, len(row), group):
            for i in range(start, start + fourth):
                line += [row[i] + 16 * row[i + fourth], row[i + 2 * fourth] + 16 * row[i + 3 * fourth]]
        rows.append(line)
    return torch.tensor(rows, dtype=torch.uint8)


def unpacked(weight: torch.Tensor, group: int) -> torch.Tensor:
    """The numbers again, int64 [out, in]."""
    fourth, rows = group // 4, []
    for row in weight.tolist():
        line = [0] * (2 * len(row))
        for place, byte in enumerate(row):
            start, inside = divmod(place, group // 2)
            first = start * group + inside // 2 + (inside % 2) * 2 * fourth
            line[first], line[first + fourth] = byte % 16 - 8, byte // 16 - 8
        rows.append(line)
    return torch.tensor(rows)


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    return name.startswith("transformer.layers") and name.endswith(".weight") and tensor.ndim == 2


def int4_groups(
    tensors: Mapping[str, torch.Tensor], group: int, *, zeros: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A checkpoint's matrices in INT4, and what they then stand for, both by TensorRT-LLM's names."""
    stored, meant = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if not is_matrix(name, tensor):
            continue
        prefix, grouped = name.removesuffix("weight"), tensor.float().unflatten(1, (-1, group))
        if zeros:
            low, high = grouped.amin(2), grouped.amax(2)
            scale = (high - low) / 15
            zero = (-8 - low / scale).round().clamp(-8, 7)
        else:
            scale = grouped.abs().amax(2) / 7
            zero = torch.zeros_like(scale)
        numbers = (grouped / scale[:, :, None] + zero[:, :, None]).round().clamp(-8, 7)
        meant[name] = ((numbers - zero[:, :, None]) * scale[:, :, None]).flatten(1)
        stored[name] = packed(numbers.flatten(1), group)
        stored[f"{prefix}per_group_scale"] = scale
        if zeros:
            stored[f"{prefix}per_group_zero"] = zero
    return stored, meant
