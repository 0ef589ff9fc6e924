"""INT8 GPTQ checkpoints made from 16-bit ones, packed bit by bit as the format is defined (no error compensation)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SETTINGS: dict[str, Any] = {
    "quant_method": "gptq", "bits": 8, "group_size": 32, "sym": True, "desc_act": False, "checkpoint_format": "gptq",
}  # fmt: skip


def packed(numbers: torch.Tensor, dim: int) -> torch.Tensor:
    """Four consecutive bytes along `dim` to one int32, the first in the lowest place."""
    parts = numbers.long().unflatten(dim, (-1, 4)).movedim(dim + 1, -1)
    words = sum(parts[..., place] << (8 * place) for place in range(4))
    assert isinstance(words, torch.Tensor)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()


def quantised(weight: torch.Tensor, group_size: int, *, stored_zero: int = 127) -> dict[str, torch.Tensor]:
    """The four tensors of a matrix [out, in]; `group_size` -1 is one scale a row."""
    inputs = weight.float().T
    size = inputs.shape[0] if group_size == -1 else group_size
    group = torch.arange(inputs.shape[0]) // size
    scales = (inputs.abs().unflatten(0, (-1, size)).amax(dim=1) / 120).half()
    numbers = torch.round(inputs / scales.float()[group]).clamp(-128, 127) + 128
    zeros = torch.full((scales.shape[0], inputs.shape[1]), stored_zero)
    return {
        "qweight": packed(numbers, 0),
        "qzeros": packed(zeros, 1),
        "scales": scales,
        "g_idx": group.to(torch.int32),
    }


def multiplied_out(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the four tensors stand for, [out, in] in float32, one number after the other."""
    words, scales = parts["qweight"].tolist(), parts["scales"].float()
    rows = [[(word >> (8 * place)) & 255 for word in line] for line in words for place in range(4)]
    return ((torch.tensor(rows) - 128).float() * scales[parts["g_idx"].long()]).T.contiguous()


def write_gptq(
    directory: Path, plain: Path, group_size: int = 32, **changes: Any
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A GPTQ checkpoint of a plain one; returns its tensors and what its matrices stand for."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {**SETTINGS, "group_size": group_size, **changes}
    config = json.loads((plain / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    for file in plain.glob("*token*"):
        (directory / file.name).write_bytes(file.read_bytes())
    tensors: dict[str, torch.Tensor] = {}
    matrices: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if "_proj.weight" not in name:
            tensors[name] = tensor
            continue
        stored_zero = 128 if settings["checkpoint_format"] == "gptq_v2" else 127
        parts = quantised(tensor, group_size, stored_zero=stored_zero)
        matrices[name] = multiplied_out(parts)
        tensors |= {f"{name.removesuffix('weight')}{suffix}": part for suffix, part in parts.items()}
    save_file(tensors, directory / "model.safetensors")
    return tensors, matrices
