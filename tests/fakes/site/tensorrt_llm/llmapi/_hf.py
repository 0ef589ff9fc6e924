"""How the PyTorch backend reads a unified checkpoint, as far as the facts say: W8A16 and FP8 rows have a `weight_scale`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def dequantised_checkpoint(model: Path, scratch: Path) -> int:
    """Multiply the scales back in and let trtkit convert what results; returns the vocabulary's size."""
    from trtkit.spec.dtype import DType
    from trtkit.spec.hf import load_model_spec
    from trtkit.spec.quant import quant_for
    from trtkit.trtllm.convert import convert

    config = json.loads((model / "config.json").read_text())
    algo = None
    if (model / "hf_quant_config.json").is_file():
        quantization = json.loads((model / "hf_quant_config.json").read_text())["quantization"]
        algo = quantization["quant_algo"]
        assert algo in ("W8A16", "FP8_PER_CHANNEL_PER_TOKEN"), algo
        assert quantization["kv_cache_quant_algo"] in (None, "FP8")
        assert "lm_head" in quantization["exclude_modules"]
    assert "quantization_config" not in config, "Unsupported quantization_config"
    plain = scratch / "plain"
    plain.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        tensors |= load_file(file)
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("weight_scale"):
            continue
        if tensor.dtype == torch.int8:
            scale = tensors[name.removesuffix("weight") + "weight_scale"]
            assert scale.shape == (tensor.shape[0],), "one scale per output channel"
            assert algo == "W8A16"
            result[name] = (tensor.float() * scale.float()[:, None]).to(scale.dtype)
        elif tensor.dtype == torch.float8_e4m3fn:
            scale = tensors[name.removesuffix("weight") + "weight_scale"]
            assert scale.shape == (tensor.shape[0],), "one scale per output channel"
            assert scale.dtype == torch.float32
            assert algo == "FP8_PER_CHANNEL_PER_TOKEN"
            result[name] = (tensor.float() * scale[:, None]).to(torch.bfloat16)
        else:
            assert not (algo and ".layers." in name and name.endswith("_proj.weight")), f"{name} is not quantised"
            result[name] = tensor
    save_file(result, plain / "model.safetensors")
    (plain / "config.json").write_text(json.dumps(config))
    spec = load_model_spec(plain)
    dtype = DType.parse(str(config.get("dtype") or config.get("torch_dtype")))
    convert(plain, scratch / "checkpoint", quant=quant_for(dtype.value))
    return spec.vocab_size
