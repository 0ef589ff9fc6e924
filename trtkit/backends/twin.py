"""What a quantised checkpoint stands for: the same tensors with every scale multiplied back in, which any engine runs.

The formats are written here from their definitions, apart from the code that writes them: a twin that computes what the
source does shows that both agree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trtkit.spec.checkpoint import CONFIG_NAME, VOCAB_EMBEDDING, rank_file
from trtkit.spec.checkpoint_config import checkpoint_config, read_checkpoint_config
from trtkit.spec.errors import InputError
from trtkit.spec.plan import Parallelism
from trtkit.spec.quant import quant_for

if TYPE_CHECKING:
    from torch import Tensor

_LAYER = re.compile(r"transformer\.layers\.(\d+)\.(.+)")
_SCALES = (
    "per_channel_scale",
    "weights_scaling_factor",
    "prequant_scaling_factor",
    "zero",
    "activation_scaling_factor",
)


def write_twin(checkpoint_dir: Path, directory: Path, layers: int) -> None:
    """Write the first `layers` of a TensorRT-LLM checkpoint to `directory`, without quantisation, in one pipeline stage.

    Raises:
        InputError: a scale that the weights need is missing.
    """
    from safetensors.torch import save_file

    model, _, parallel = read_checkpoint_config(checkpoint_dir)
    per_stage = model.num_layers // parallel.pp
    for rank in range(parallel.tp):
        tensors: dict[str, Tensor] = {}
        for stage in range(parallel.pp):
            path = checkpoint_dir / rank_file(stage * parallel.tp + rank)
            tensors |= _stage(path, first_layer=stage * per_stage, layers=layers)
        save_file(tensors, directory / rank_file(rank))
    config = checkpoint_config(replace(model, num_layers=layers), quant_for("fp32"), Parallelism(tp=parallel.tp))
    (directory / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")


def _stage(path: Path, *, first_layer: int, layers: int) -> dict[str, Tensor]:
    """One rank file's share: layers counted over the whole model, scales multiplied in."""
    from safetensors import safe_open

    result: dict[str, Tensor] = {}
    with safe_open(str(path), framework="pt") as handle:
        stored = set(handle.keys())
        for name in sorted(stored):
            prefix, _, suffix = name.rpartition(".")
            match = _LAYER.fullmatch(name)
            layer = first_layer + int(match[1]) if match else -1
            if layer >= layers or suffix in _SCALES or suffix.endswith("cache_scaling_factor"):
                continue
            if name == VOCAB_EMBEDDING and first_layer:
                continue
            tensor = handle.get_tensor(name)
            if suffix == "weight":
                beside = {s: handle.get_tensor(f"{prefix}.{s}") for s in _SCALES if f"{prefix}.{s}" in stored}
                tensor = dequantised(tensor, beside, f"{path}: {name}")
            result[f"transformer.layers.{layer}.{match[2]}" if match else name] = tensor.contiguous()
    return result


def dequantised(weight: Tensor, scales: Mapping[str, Tensor], where: str) -> Tensor:
    """[out, in] in float32; a weight in a floating-point type of 16 or 32 bits is returned as it is.

    Forms, by what lies beside: `per_channel_scale` [out] (INT8 rows, FP8 rows); `weights_scaling_factor` of one element
    (FP8), [out] (SmoothQuant), [out, groups] (AWQ, two rows to a byte, the even one low) or with `zero` [groups, out]
    (GPTQ, whose weight is [in, out]); `prequant_scaling_factor` multiplies the layer's input, so the columns.

    Raises:
        InputError: no scale.
    """
    import torch

    if weight.element_size() > 1:
        return weight
    rows, scale = scales.get("per_channel_scale"), scales.get("weights_scaling_factor")
    if rows is not None:
        return weight.float() * rows.float()[:, None]
    if scale is None:
        raise InputError(f"{where} is {weight.dtype} and has no scale beside it")
    scale = scale.float()
    if "zero" in scales:
        step = weight.shape[0] // scale.shape[0]
        wide = weight.float() * scale.repeat_interleave(step, dim=0)
        return (wide + scales["zero"].float().repeat_interleave(step, dim=0)).T
    if scale.numel() == 1:
        values = weight.float() * scale
    elif scale.ndim == 1:
        values = weight.float() * scale[:, None]
    else:
        packed = weight.view(torch.uint8).to(torch.int16)
        nibbles = torch.stack((packed & 15, packed >> 4), dim=1).reshape(-1, weight.shape[1])
        values = torch.where(nibbles > 7, nibbles - 16, nibbles).float()
        values *= scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    before = scales.get("prequant_scaling_factor")
    return values if before is None else values * before.float()
