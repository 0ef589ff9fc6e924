"""4- and 8-bit checkpoints in the layouts of GPTQ, AWQ and compressed-tensors, packed number by number from the formats'
definitions, beside what they stand for in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Tensors = dict[str, torch.Tensor]


def words(numbers: torch.Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Consecutive unsigned numbers along `dim` to int32; `order` says which of them comes into the lowest bits, and so on."""
    per_word = 32 // bits
    parts = numbers.long().unflatten(dim, (-1, per_word)).movedim(dim + 1, -1)
    packed = torch.zeros(parts.shape[:-1], dtype=torch.long)
    for place, source in enumerate(order or range(per_word)):
        packed |= parts[..., source] << (bits * place)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32).contiguous()


def rounded(
    weight: torch.Tensor, bits: int, group: int, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unsigned numbers [out, in], zero points and fp16 scales [out, groups] of a plain rounding."""
    grouped = weight.double().unflatten(1, (-1, group if group > 0 else weight.shape[1]))
    largest, middle = (1 << bits) - 1, 1 << (bits - 1)
    if symmetric:
        scale = (grouped.abs().amax(2) / (middle - 1)).half()
        zero = torch.full(scale.shape, middle)
    else:
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        scale = ((high - low) / largest).half()
        zero = (-low / scale.double()).round().clamp(0, largest).long()
    numbers = (grouped / scale.double()[:, :, None] + zero[:, :, None]).round().clamp(0, largest)
    return numbers.flatten(1).long(), zero, scale


def meant(numbers: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`(number - zero) * scale` in float64."""
    size = numbers.shape[1] // scale.shape[1]
    return (numbers - zero.repeat_interleave(size, 1)).double() * scale.double().repeat_interleave(size, 1)


def order_of(name: str, inputs: int) -> torch.Tensor:
    """An order of a matrix's inputs, the same for matrices that share them."""
    seed = ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"]
    which = next(index for index, names in enumerate(seed) if name.split(".")[-2] in names)
    return torch.randperm(inputs, generator=torch.Generator().manual_seed(which))


def gptq(
    numbers: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor, bits: int, less: int, order: torch.Tensor | None
) -> Tensors:
    """With an `order`, the numbers' inputs are in it, and the file's are not."""
    size = numbers.shape[1] // scale.shape[1]
    group = torch.arange(numbers.shape[1]) // size
    if order is not None:
        back = order.argsort()
        numbers, group = numbers[:, back], group[back]
    return {
        "qweight": words(numbers.T, bits, 0),
        "qzeros": words(zero.T - less, bits, 1),
        "scales": scale.T.contiguous(),
        "g_idx": group.to(torch.int32),
    }


def awq(numbers: torch.Tensor, zero: torch.Tensor, scale: torch.Tensor) -> Tensors:
    return {
        "qweight": words(numbers.T, 4, 1, AWQ_ORDER),
        "qzeros": words(zero.T, 4, 1, AWQ_ORDER),
        "scales": scale.T.contiguous(),
    }


def compressed(numbers: torch.Tensor, zero: torch.Tensor | None, scale: torch.Tensor, bits: int) -> Tensors:
    parts = {
        "weight_packed": words(numbers, bits, 1),
        "weight_scale": scale,
        "weight_shape": torch.tensor(numbers.shape),
    }
    return parts if zero is None else {**parts, "weight_zero_point": words(zero, bits, 0)}


def settings_of(method: str, bits: int, group: int, *, symmetric: bool, version: str) -> dict[str, Any]:
    """`quantization_config` as each writer spells it."""
    if method == "gptq":
        return {
            "quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": False,
            "checkpoint_format": version or "gptq",
        }  # fmt: skip
    if method == "awq":
        return {
            "quant_method": "awq", "bits": bits, "group_size": group, "zero_point": not symmetric,
            "version": version or "gemm", "modules_to_not_convert": None,
        }  # fmt: skip
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group" if group > 0 else "channel",
        "group_size": group if group > 0 else None, "actorder": None, "dynamic": False,
    }  # fmt: skip
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {
        "quant_method": "compressed-tensors", "format": version or "pack-quantized", "config_groups": groups,
        "ignore": ["lm_head"],
    }  # fmt: skip


def write_packed(
    directory: Path,
    plain: Path,
    method: str,
    *,
    bits: int = 4,
    group: int = 128,
    symmetric: bool = False,
    version: str = "",
    reordered: bool = False,
) -> tuple[Tensors, Tensors]:
    """A quantised checkpoint of a plain one; returns its tensors and what its matrices stand for, in float64."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = settings_of(method, bits, group, symmetric=symmetric, version=version)
    if reordered:
        settings["desc_act"] = True
    config = json.loads((plain / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    tensors: Tensors = {}
    matrices: Tensors = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if "_proj.weight" not in name:
            tensors[name] = tensor
            continue
        order = order_of(name, tensor.shape[1]) if reordered else None
        numbers, zero, scale = rounded(tensor if order is None else tensor[:, order], bits, group, symmetric=symmetric)
        if method == "gptq":
            parts = gptq(numbers, zero, scale, bits, 0 if version == "gptq_v2" else 1, order)
        elif method == "awq":
            parts = awq(numbers, zero, scale)
        else:
            parts = compressed(numbers, None if symmetric else zero, scale, bits)
        matrices[name] = meant(numbers, zero, scale)
        if order is not None:
            matrices[name] = matrices[name][:, order.argsort()]
        tensors |= {f"{name.removesuffix('weight')}{suffix}": part for suffix, part in parts.items()}
    save_file(tensors, directory / "model.safetensors")
    return tensors, matrices
