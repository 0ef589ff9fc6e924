"""Tiny random Hugging Face checkpoints written with safetensors directly, so that tests need no transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from trtkit.spec.hf import load_model_spec
from trtkit.trtllm.layout import source_shapes

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 70,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": [2, 3],
}

ONE_LAYER: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
"""A model for engines of random weights: no rotary scaling, fp32."""


def write_config(directory: Path, **changes: Any) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**CONFIG, **changes}), encoding="utf-8")


def random_tensors(
    directory: Path, dtype: torch.dtype = torch.bfloat16, spread: float = 0.1
) -> dict[str, torch.Tensor]:
    """Every tensor the directory's config asks for."""
    generator = torch.Generator().manual_seed(7)
    shapes = source_shapes(load_model_spec(directory))
    return {name: (torch.randn(shape, generator=generator) * spread).to(dtype) for name, shape in shapes.items()}


def write_model(
    directory: Path, dtype: torch.dtype = torch.bfloat16, *, spread: float = 0.1, **changes: Any
) -> dict[str, torch.Tensor]:
    """A complete single-file checkpoint; returns its tensors. `spread` is the weights' standard deviation."""
    write_config(directory, **changes)
    tensors = random_tensors(directory, dtype, spread)
    save_file(tensors, directory / "model.safetensors")
    return tensors


def shard(directory: Path, tensors: dict[str, torch.Tensor], parts: int = 3) -> list[str]:
    """Replace the single file by shards and an index; returns the shards' names."""
    (directory / "model.safetensors").unlink(missing_ok=True)
    names = [f"model-{part + 1:05d}-of-{parts:05d}.safetensors" for part in range(parts)]
    weight_map = {}
    for part, name in enumerate(names):
        chosen = dict(list(tensors.items())[part::parts])
        save_file(chosen, directory / name)
        weight_map |= dict.fromkeys(chosen, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return names
