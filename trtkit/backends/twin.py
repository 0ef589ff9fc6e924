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

from trtkit.spec.checkpoint import CONFIG_NAME, FINAL_NORM, LM_HEAD, VOCAB_EMBEDDING, layer_prefix, rank_file
from trtkit.spec.checkpoint_config import checkpoint_config, read_checkpoint_config
from trtkit.spec.directory import check_space
from trtkit.spec.errors import InputError
from trtkit.spec.plan import Parallelism
from trtkit.spec.quant import quant_for

if TYPE_CHECKING:
    from torch import Tensor

_FLOAT_BYTES = 4
_LAYER = re.compile(r"transformer\.layers\.(\d+)\.(.+)")
_NAMES = {
    "self_attn.o_proj": "attention.dense",
    "mlp.gate_proj": "mlp.fc",
    "mlp.up_proj": "mlp.gate",
    "mlp.down_proj": "mlp.proj",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_layernorm",
}
_SCALES = (
    "per_channel_scale",
    "weights_scaling_factor",
    "prequant_scaling_factor",
    "zero",
    "activation_scaling_factor",
    "per_group_scale",
    "per_group_zero",
    "input_order",
)


def source_names(twin: Path) -> dict[str, Tensor]:
    """A twin's tensors in float32, its ranks joined, by Hugging Face names."""
    import torch

    from trtkit.engine.ranks import RankReader

    model, _, parallel = read_checkpoint_config(twin)
    q_rows, kv_rows = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    result: dict[str, Tensor] = {}
    with RankReader(twin, model, parallel) as reader:
        for theirs, ours in (("model.embed_tokens", VOCAB_EMBEDDING), ("model.norm", FINAL_NORM), ("lm_head", LM_HEAD)):
            result[f"{theirs}.weight"] = reader.tensor(ours).float()
        for layer in range(model.num_layers):
            prefix, block = f"model.layers.{layer}.", layer_prefix(layer)
            qkv = torch.split(reader.tensor(f"{block}attention.qkv.weight").float(), [q_rows, kv_rows, kv_rows])
            for name, part in zip("qkv", qkv, strict=True):
                result[f"{prefix}self_attn.{name}_proj.weight"] = part.contiguous()
            for theirs, ours in _NAMES.items():
                result[f"{prefix}{theirs}.weight"] = reader.tensor(f"{block}{ours}.weight").float().contiguous()
    return result


def write_twin(checkpoint_dir: Path, directory: Path, layers: int, *, ones: bool = False) -> None:
    """Write the first `layers` of a TensorRT-LLM checkpoint to `directory`, without quantisation, in one pipeline stage.

    With `ones` every quantised number is taken to be 1, which gives the worth of a step at its place.

    Raises:
        InputError: a scale that the weights need is missing.
        OutputError: the disk of temporary files is too small.
    """
    from safetensors.torch import save_file

    model, _, parallel = read_checkpoint_config(checkpoint_dir)
    check_space(directory, replace(model, num_layers=layers).num_params * _FLOAT_BYTES)
    per_stage = model.num_layers // parallel.pp
    for rank in range(parallel.tp):
        tensors: dict[str, Tensor] = {}
        for stage in range(parallel.pp):
            path = checkpoint_dir / rank_file(stage * parallel.tp + rank)
            tensors |= _stage(path, first_layer=stage * per_stage, layers=layers, ones=ones)
        save_file(tensors, directory / rank_file(rank))
    config = checkpoint_config(replace(model, num_layers=layers), quant_for("fp32"), Parallelism(tp=parallel.tp))
    (directory / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")


def _stage(path: Path, *, first_layer: int, layers: int, ones: bool) -> dict[str, Tensor]:
    """One rank file's share: layers counted over the whole model, scales multiplied in."""
    import torch
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
                if (order := f"{prefix.replace('.mlp.gate', '.mlp.fc')}.input_order") in stored:
                    beside["input_order"] = handle.get_tensor(order)
                if ones and beside:
                    tensor = torch.full_like(tensor, 0x11 if _two_to_a_byte(tensor, beside) else 1)
                tensor = dequantised(tensor, beside, f"{path}: {name}")
            result[f"transformer.layers.{layer}.{match[2]}" if match else name] = tensor.contiguous()
    return result


def _two_to_a_byte(weight: Tensor, scales: Mapping[str, Tensor]) -> bool:
    scale = scales.get("weights_scaling_factor")
    return scale is not None and scale.ndim == 2 and "zero" not in scales and scale.shape[0] == 2 * weight.shape[0]


def dequantised(weight: Tensor, scales: Mapping[str, Tensor], where: str) -> Tensor:
    """[out, in] in float32; a weight in a floating-point type of 16 or 32 bits is returned as it is.

    Forms, by what lies beside: `per_channel_scale` [out] (INT8 rows, FP8 rows); `per_group_scale` and perhaps
    `per_group_zero` [out, groups] and `input_order` [in] (the embedded engine's INT8 and INT4 groups); `weights_scaling_factor` of one element
    (FP8), [out] (SmoothQuant), [out, groups] (AWQ, two rows to a byte, the even one low) or with `zero` [groups, out]
    (GPTQ, whose weight is [in, out]); `prequant_scaling_factor` multiplies the layer's input, so the columns.

    Raises:
        InputError: no scale.
    """
    import torch

    if weight.element_size() > 1:
        return weight
    rows, scale = scales.get("per_channel_scale"), scales.get("weights_scaling_factor")
    if "per_group_scale" in scales:
        values = _own_groups(weight, scales["per_group_scale"].float(), scales.get("per_group_zero"))
        if "input_order" not in scales:
            return values
        result = torch.empty_like(values)
        result[:, scales["input_order"].long()] = values
        return result
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
    elif not _two_to_a_byte(weight, scales):
        values = weight.float() * scale.reshape(-1, 1)
    else:
        packed = weight.view(torch.uint8).to(torch.int16)
        nibbles = torch.stack((packed & 15, packed >> 4), dim=1).reshape(-1, weight.shape[1])
        values = torch.where(nibbles > 7, nibbles - 16, nibbles).float()
        values *= scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    before = scales.get("prequant_scaling_factor")
    return values if before is None else values * before.float()


def _own_groups(weight: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """INT4 lies in 16-bit words: four numbers, each plus 8, of the four fourths of a group, the first fourth lowest."""
    import torch

    values = weight.float()
    if weight.dtype is torch.uint8:
        pairs = weight.to(torch.int32).reshape(weight.shape[0], scale.shape[1], -1, 2)
        words = pairs[..., 0] + 256 * pairs[..., 1]
        values = torch.cat([(words >> shift) & 15 for shift in (0, 4, 8, 12)], dim=2).float() - 8
    grouped = values.reshape(weight.shape[0], scale.shape[1], -1)
    if zero is not None:
        grouped = grouped - zero.float()[:, :, None]
    return (grouped * scale[:, :, None]).reshape(weight.shape[0], -1)
