"""Random transformers models, and the same weights under TensorRT-LLM's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trtkit.engine.loop import EmbeddedEngine
from trtkit.engine.open import open_tensors
from trtkit.engine.speculation import Proposer
from trtkit.spec.checkpoint import FINAL_NORM, LM_HEAD, VOCAB_EMBEDDING, layer_prefix
from trtkit.spec.dtype import DType
from trtkit.spec.hf import model_spec_from_hf
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Limits
from trtkit.spec.speculation import SpeculationSpec

BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def make_hf(kind: str = "Llama", *, seed: int = 0, **overrides: Any) -> Any:
    """A random transformers model in float32, its norms and biases random too so that none can be skipped."""
    import transformers

    options = {**BASE, **overrides}
    if int(transformers.__version__.split(".")[0]) < 5 and "rope_parameters" in options:
        scaling = dict(options.pop("rope_parameters"))
        options["rope_theta"] = scaling.pop("rope_theta")
        options["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    config = getattr(transformers, f"{kind}Config")(**options)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[1] ** -0.5)
    return model


def spec_of(hf: Any, name: str = "tiny") -> ModelSpec:
    config = hf.config.to_dict()
    config.setdefault("architectures", [type(hf).__name__])
    config["architectures"] = [type(hf).__name__]
    return model_spec_from_hf(config, name=name)


def trtllm_tensors(hf: Any) -> dict[str, torch.Tensor]:
    """The unsplit checkpoint of a transformers model."""
    state: Mapping[str, torch.Tensor] = hf.state_dict()
    tensors = {
        VOCAB_EMBEDDING: state["model.embed_tokens.weight"],
        FINAL_NORM: state["model.norm.weight"],
        LM_HEAD: state["lm_head.weight"],
    }
    for layer in range(hf.config.num_hidden_layers):
        source, target = f"model.layers.{layer}.", layer_prefix(layer)
        for kind in ("weight", "bias"):
            parts = [state.get(f"{source}self_attn.{n}_proj.{kind}") for n in "qkv"]
            if parts[0] is not None:
                tensors[f"{target}attention.qkv.{kind}"] = torch.cat(parts)
            for ours, theirs in (
                ("attention.dense", "self_attn.o_proj"),
                ("mlp.fc", "mlp.gate_proj"),
                ("mlp.gate", "mlp.up_proj"),
                ("mlp.proj", "mlp.down_proj"),
                ("attention.q_layernorm", "self_attn.q_norm"),
                ("attention.k_layernorm", "self_attn.k_norm"),
                ("input_layernorm", "input_layernorm"),
                ("post_layernorm", "post_attention_layernorm"),
            ):
                value = state.get(f"{source}{theirs}.{kind}")
                if value is not None:
                    tensors[f"{target}{ours}.{kind}"] = value
    return tensors


def quantised(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """INT8 weight-only, symmetric per output channel, of the linear layers inside blocks."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        linear = name.startswith("transformer.layers") and name.endswith(".weight") and tensor.ndim == 2
        if not linear:
            result[name] = tensor
            continue
        scale = tensor.abs().amax(dim=1) / 127
        result[name] = (tensor / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        result[name.removesuffix("weight") + "per_channel_scale"] = scale
    return result


def fp8_rows(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """FP8 per output channel of the linear layers inside blocks, scales in fp32."""
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        linear = name.startswith("transformer.layers") and name.endswith(".weight") and tensor.ndim == 2
        if not linear:
            result[name] = tensor
            continue
        scale = tensor.float().abs().amax(dim=1) / 448
        result[name] = (tensor / scale[:, None]).to(torch.float8_e4m3fn)
        result[name.removesuffix("weight") + "per_channel_scale"] = scale
    return result


def limits(**overrides: Any) -> Limits:
    """Small limits: 4 tokens per block, 64 blocks' worth of memory set by the caller's model."""
    values: dict[str, Any] = {"max_batch_size": 8, "max_num_tokens": 64, "max_seq_len": 128, "tokens_per_block": 4}
    return Limits(**{**values, **overrides})


def kv_bytes(spec: ModelSpec, blocks: int, tokens_per_block: int = 4) -> int:
    return spec.kv_bytes_per_token(DType.FP32) * tokens_per_block * blocks


def open_hf(
    hf: Any,
    *,
    blocks: int = 256,
    speculation: SpeculationSpec | None = None,
    proposer: Proposer | None = None,
    **overrides: Any,
) -> EmbeddedEngine:
    """Our engine on a transformers model's weights, with `blocks` KV blocks."""
    spec = spec_of(hf)
    size = overrides.get("tokens_per_block", 4)
    chosen = limits(**{"kv_memory_bytes": kv_bytes(spec, blocks, size), **overrides})
    return open_tensors(spec, trtllm_tensors(hf), limits=chosen, speculation=speculation, proposer=proposer)


def hf_greedy(hf: Any, prompt: tuple[int, ...], count: int) -> list[int]:
    """Greedy tokens by full recomputation: no cache, so nothing in common with ours but the weights."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(hf(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]
