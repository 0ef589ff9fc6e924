"""Quantised checkpoints multiplied out in float32, for the reference: written from the formats' definitions, in torch.

Shares no code with the converter's readers (`trtkit.trtllm.packed_matrix`), so that a mistake in one of them shows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_FILES = ("quantize_config.json", "quant_config.json")
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs lies in the first, second, ... four bits."""


def quantisation_of(directory: Path) -> Mapping[str, Any] | None:
    """A directory's settings of quantisation; None where it has none."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config"):
        return dict(config["quantization_config"])
    for name in _FILES:
        if (directory / name).is_file():
            return dict(json.loads((directory / name).read_text(encoding="utf-8")))
    return None


def multiply_out(tensors: dict[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Replace the tensors of every quantised matrix by the one they stand for."""
    for name in [name for name in tensors if name.endswith((".qweight", ".weight_packed"))]:
        prefix = name.rpartition(".")[0] + "."
        parts = {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
        parts.pop("bias", None)
        for part in parts:
            del tensors[f"{prefix}{part}"]
        tensors[f"{prefix}weight"] = _matrix(parts, settings)


def _matrix(parts: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    if "weight_packed" in parts:
        return _compressed(parts)
    if "g_idx" in parts:
        return _gptq(parts, int(settings["bits"]), 0 if settings.get("checkpoint_format") == "gptq_v2" else 1)
    return _awq(parts)


def _gptq(parts: Mapping[str, Tensor], bits: int, less: int) -> Tensor:
    """`qweight` along the inputs, zero points along the outputs and stored `less` one."""
    numbers = _spread(parts["qweight"], bits, dim=0)
    zeros = _spread(parts["qzeros"], bits, dim=1) + less
    group = parts["g_idx"].long()
    return ((numbers - zeros[group]).float() * parts["scales"].float()[group]).T.contiguous()


def _awq(parts: Mapping[str, Tensor]) -> Tensor:
    """Both along the outputs, in an order of their own."""
    numbers, zeros = (_reordered(_spread(parts[name], 4, dim=1)) for name in ("qweight", "qzeros"))
    size = numbers.shape[0] // zeros.shape[0]
    difference = (numbers - zeros.repeat_interleave(size, 0)).float()
    return (difference * parts["scales"].float().repeat_interleave(size, 0)).T.contiguous()


def _reordered(found: Tensor) -> Tensor:
    import torch

    result = torch.empty_like(found)
    for place, output in enumerate(_AWQ_ORDER):
        result[:, output::8] = found[:, place::8]
    return result


def _compressed(parts: Mapping[str, Tensor]) -> Tensor:
    """Numbers along the inputs, zero points along the outputs, both signed with half the range added."""
    columns = int(parts["weight_shape"][1])
    bits = 32 * parts["weight_packed"].shape[1] // columns
    numbers, scale = _spread(parts["weight_packed"], bits, dim=1) - (1 << (bits - 1)), parts["weight_scale"].float()
    size = columns // scale.shape[1]
    if "weight_zero_point" in parts:
        zeros = _spread(parts["weight_zero_point"], bits, dim=0) - (1 << (bits - 1))
        numbers = numbers - zeros.repeat_interleave(size, 1)
    return (numbers.float() * scale.repeat_interleave(size, 1)).contiguous()


def _spread(words: Tensor, bits: int, *, dim: int) -> Tensor:
    """Every int32 as the numbers in it, the lowest bits first, along `dim`."""
    import torch

    places = [(words >> shift) & ((1 << bits) - 1) for shift in range(0, 32, bits)]
    return torch.stack(places, dim=dim + 1).flatten(dim, dim + 1)
