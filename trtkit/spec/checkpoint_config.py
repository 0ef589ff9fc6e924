"""`config.json` of a TensorRT-LLM checkpoint, written from our specs and read back into them.

The keys are TensorRT-LLM 1.2's `PretrainedConfig`. What its vocabulary has no word for (the model's name, tied
embeddings, EOS ids, the cache type, which type the linear weights are stored in) goes into one extra key, `trtkit`,
so that reading back gives exactly what was written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from trtkit.spec.checkpoint import CONFIG_NAME
from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError, UnsupportedError
from trtkit.spec.model import ModelSpec, RopeSpec
from trtkit.spec.plan import Parallelism
from trtkit.spec.quant import GPTQ_INT8, MODELOPT_AWQ, PRECISIONS, QuantSpec

EXTRA_KEY = "trtkit"
_QWEN_TYPES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
_KV_ALGOS = {DType.INT8: "INT8", DType.FP8: "FP8"}
T = TypeVar("T")


def checkpoint_config(model: ModelSpec, quant: QuantSpec, parallel: Parallelism | None = None) -> dict[str, Any]:
    """The content of `config.json`, complete: nothing is left to TensorRT-LLM's defaults that the model decides.

    `quant.weights` is the type the linear weights are stored in: INT8 for the embedded engine, the compute type for
    a checkpoint that `trtllm-build` quantises itself.
    """
    parallel = parallel or Parallelism()
    config: dict[str, Any] = {
        "architecture": model.architecture,
        "dtype": quant.compute.trtllm_name,
        "logits_dtype": "float32",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_size": model.head_dim,
        "intermediate_size": model.intermediate_size,
        "hidden_act": "silu",
        "norm_epsilon": model.norm_epsilon,
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": model.max_position_embeddings,
        "rotary_base": model.rope.theta,
        "rotary_scaling": rotary_scaling(model.rope),
        "rotary_embedding_dim": model.head_dim,
        "qk_layernorm": model.qk_norm,
        "attn_bias": model.attn_qkv_bias,
        "mlp_bias": model.mlp_bias,
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "runtime_defaults": None,
        "disable_weight_only_quant_plugin": False,
        "mapping": _mapping(parallel),
        "quantization": _quantization(quant),
        EXTRA_KEY: _extra(model, quant),
    }
    if model.architecture in _QWEN_TYPES:
        config["qwen_type"] = _QWEN_TYPES[model.architecture]
        config["seq_length"] = model.max_position_embeddings
    return config


def rotary_scaling(rope: RopeSpec) -> dict[str, Any] | None:
    """TensorRT-LLM's `rotary_scaling`; both spellings of the kind, since its versions read either."""
    if rope.scaling == "none":
        return None
    scaling: dict[str, Any] = {"type": rope.scaling, "rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
        scaling["original_max_position_embeddings"] = rope.original_max_position
    return scaling


def _mapping(parallel: Parallelism) -> dict[str, int]:
    return {
        "world_size": parallel.world_size,
        "gpus_per_node": 8,
        "cp_size": 1,
        "tp_size": parallel.tp,
        "pp_size": parallel.pp,
        "moe_tp_size": parallel.tp,
        "moe_ep_size": 1,
    }


def _quantization(quant: QuantSpec) -> dict[str, Any]:
    return {
        "quant_algo": quant.algo,
        "kv_cache_quant_algo": _KV_ALGOS.get(quant.kv),
        "group_size": quant.group_size or 128,
        "smoothquant_val": 0.5,
        "clamp_val": None,
        "use_meta_recipe": False,
        "has_zero_point": quant.algo == GPTQ_INT8 or quant.zero_points,
        "pre_quant_scale": quant.algo == MODELOPT_AWQ,
        "exclude_modules": None,
    }


def _extra(model: ModelSpec, quant: QuantSpec) -> dict[str, Any]:
    return {
        "name": model.name,
        "source_dtype": model.dtype.value,
        "tie_embeddings": model.tie_embeddings,
        "attn_dense_bias": model.attn_dense_bias,
        "sliding_window": model.sliding_window,
        "bos_id": model.bos_id,
        "eos_ids": list(model.eos_ids),
        "precision": quant.precision,
        "weights": quant.weights.value,
        "kv": quant.kv.value,
        **({"group_size": quant.group_size} if quant.is_grouped else {}),
        **({"input_order": True} if quant.input_order else {}),
    }


def read_checkpoint_config(directory: Path) -> tuple[ModelSpec, QuantSpec, Parallelism]:
    """What a checkpoint directory holds; the inverse of `checkpoint_config`.

    Checkpoints of other writers are read as far as their keys go. One without `rotary_base` is refused: running a
    Llama 3 with the default base gives fluent nonsense, and ModelOpt 0.47 with transformers 5 writes such files.

    Raises:
        InputError: no config.json, not JSON, or a key is missing or has the wrong type.
        UnsupportedError: a scheme or a rotary scaling that trtkit does not know.
    """
    path = directory / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(
            f"{path}: cannot be read; a checkpoint directory has {CONFIG_NAME} beside its weights"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected an object")
    return parse_checkpoint_config(config, str(path))


def parse_checkpoint_config(config: Mapping[str, Any], where: str) -> tuple[ModelSpec, QuantSpec, Parallelism]:
    """`read_checkpoint_config` for a parsed file; `where` names it in errors."""
    extra = config.get(EXTRA_KEY) or {}
    quant = _parse_quant(config, extra, where)
    model = _parse_model(config, extra, where)
    mapping = _need(config, "mapping", dict, where)
    parallel = Parallelism(tp=_need(mapping, "tp_size", int, where), pp=mapping.get("pp_size", 1))
    return model, quant, parallel


def _parse_model(config: Mapping[str, Any], extra: Mapping[str, Any], where: str) -> ModelSpec:
    def integer(key: str) -> int:
        return _need(config, key, int, where)

    attn_bias = bool(config.get("attn_bias", False))
    architecture = _need(config, "architecture", str, where)
    heads = integer("num_attention_heads")
    head_dim = config.get("head_size") or integer("hidden_size") // heads
    return ModelSpec(
        name=str(extra.get("name") or Path(where).parent.name),
        architecture=architecture,
        num_layers=integer("num_hidden_layers"),
        hidden_size=integer("hidden_size"),
        num_heads=heads,
        num_kv_heads=integer("num_key_value_heads"),
        head_dim=head_dim,
        intermediate_size=integer("intermediate_size"),
        vocab_size=integer("vocab_size"),
        max_position_embeddings=integer("max_position_embeddings"),
        norm_epsilon=_need(config, "norm_epsilon", float, where),
        tie_embeddings=bool(extra.get("tie_embeddings", False)),
        attn_qkv_bias=attn_bias,
        attn_dense_bias=bool(extra.get("attn_dense_bias", attn_bias and architecture not in _QWEN_TYPES)),
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=bool(config.get("qk_layernorm", False)),
        sliding_window=extra.get("sliding_window"),
        rope=_parse_rope(config, where),
        dtype=DType.parse(str(extra.get("source_dtype") or config["dtype"])),
        bos_id=extra.get("bos_id"),
        eos_ids=tuple(extra.get("eos_ids", ())),
    )


def _parse_rope(config: Mapping[str, Any], where: str) -> RopeSpec:
    theta = _need(config, "rotary_base", float, where)
    scaling = config.get("rotary_scaling")
    if not scaling:
        return RopeSpec(theta=theta)
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind == "linear":
        return RopeSpec(theta=theta, scaling="linear", factor=_need(scaling, "factor", float, where))
    if kind != "llama3":
        raise UnsupportedError(f"{where}: rotary_scaling is {kind!r}; supported are linear and llama3")
    return RopeSpec(
        theta=theta,
        scaling="llama3",
        factor=_need(scaling, "factor", float, where),
        low_freq_factor=_need(scaling, "low_freq_factor", float, where),
        high_freq_factor=_need(scaling, "high_freq_factor", float, where),
        original_max_position=_need(scaling, "original_max_position_embeddings", int, where),
    )


def _parse_quant(config: Mapping[str, Any], extra: Mapping[str, Any], where: str) -> QuantSpec:
    compute = DType.parse(_need(config, "dtype", str, where))
    quantization = config.get("quantization") or {}
    algo = quantization.get("quant_algo")
    known = {quant.algo: quant for quant in PRECISIONS.values()}
    if algo is None:
        quant = PRECISIONS[compute.value]
    elif algo in known:
        quant = replace(known[algo], compute=compute, kv=compute)
        if quant.is_weight_only:
            quant = replace(quant, activations=compute)
    else:
        raise UnsupportedError(f"{where}: quant_algo is {algo!r}; known are {', '.join(filter(None, known))}")
    weights, kv = extra.get("weights"), extra.get("kv")
    if algo == MODELOPT_AWQ:
        quant = replace(quant, group_size=_need(quantization, "group_size", int, where))
    elif "group_size" in extra:
        zeros = bool(quantization.get("has_zero_point"))
        quant = replace(
            quant,
            group_size=_need(extra, "group_size", int, where),
            zero_points=zeros,
            input_order=bool(extra.get("input_order")),
        )
    return replace(
        quant,
        weights=DType.parse(weights) if weights else quant.weights,
        kv=DType.parse(kv) if kv else quant.kv,
    )


def _need(config: Mapping[str, Any], key: str, kind: type[T], where: str) -> T:
    value = config.get(key)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, kind):
        raise InputError(f"{where}: {key} is {value!r}, expected {kind.__name__}")
    return value
