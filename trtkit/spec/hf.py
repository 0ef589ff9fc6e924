"""Hugging Face `config.json` to `ModelSpec`, in the spellings of transformers 4.57 and 5.x. Standard library only.

A key that is absent gets the default of that architecture's own config class, because that is what transformers would
run; a key that is present and wrong is an error that names it. What this toolkit's engines do not compute (another
activation, a window in some layers only, YaRN) is refused here, before anything is built on it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError, UnsupportedError, UsageError
from trtkit.spec.hf_values import flag, positive_integer, positive_number, wrong_value
from trtkit.spec.model import ModelSpec, RopeSpec

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
_CONVERTED = ("gptq", "awq", "compressed-tensors")
"""Methods of quantisation that trtkit reads weights of."""
_CHECKPOINT_DTYPES = (DType.FP32, DType.FP16, DType.BF16)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Family:
    """What an architecture's config class assumes when a key is absent, and the switches it has."""

    model_type: str
    kv_heads: int | None
    head_dim: int | None
    vocab_size: int
    max_position: int
    qkv_bias: bool | None = None
    dense_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: bool = False
    window: int | None = None
    window_switch: bool = False


_FAMILIES: dict[str, _Family] = {
    "LlamaForCausalLM": _Family(model_type="llama", kv_heads=None, head_dim=None, vocab_size=32_000, max_position=2048),
    "MistralForCausalLM": _Family(
        model_type="mistral",
        kv_heads=8,
        head_dim=None,
        vocab_size=32_000,
        max_position=131_072,
        qkv_bias=False,
        dense_bias=False,
        mlp_bias=False,
        window=4096,
    ),
    "Qwen2ForCausalLM": _Family(
        model_type="qwen2",
        kv_heads=32,
        head_dim=None,
        vocab_size=151_936,
        max_position=32_768,
        qkv_bias=True,
        dense_bias=False,
        mlp_bias=False,
        window=4096,
        window_switch=True,
    ),
    "Qwen3ForCausalLM": _Family(
        model_type="qwen3",
        kv_heads=32,
        head_dim=128,
        vocab_size=151_936,
        max_position=32_768,
        mlp_bias=False,
        qk_norm=True,
        window=4096,
        window_switch=True,
    ),
}
"""Architecture -> its config class's defaults. A bias of None is read from the config, else it is fixed by the code."""

SUPPORTED_ARCHITECTURES = tuple(_FAMILIES)


def load_model_spec(directory: Path) -> ModelSpec:
    """Read a local Hugging Face model's `config.json`; its name is the directory's.

    `generation_config.json`, where present, gives the end-of-sequence ids: it is what `generate` obeys, and chat
    models list their end-of-turn token only there.

    Raises:
        InputError: no such file, not JSON, or a value is wrong.
        UnsupportedError: an architecture or a feature that trtkit does not compute.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such model directory")
    path = directory / CONFIG_NAME
    config = _read_object(path)
    generation = directory / GENERATION_CONFIG_NAME
    if generation.is_file():
        eos = _read_object(generation).get("eos_token_id")
        if eos is not None:
            config = {**config, "eos_token_id": eos}
    try:
        return model_spec_from_hf(config, name=directory.resolve().name)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except UnsupportedError as error:
        raise UnsupportedError(f"{path}: {error}") from None


def model_spec_from_hf(config: Mapping[str, Any], *, name: str) -> ModelSpec:
    """Build the spec that transformers' model of this config has.

    Raises:
        InputError: a value is missing or wrong; the message names its key.
        UnsupportedError: an architecture or a feature that trtkit does not compute; the message says what it does.
    """
    architecture = _architecture(config)
    family = _FAMILIES[architecture]
    _refuse_features(config)
    heads = positive_integer(config, "num_attention_heads")
    hidden = positive_integer(config, "hidden_size")
    layers = positive_integer(config, "num_hidden_layers")
    kv_heads = positive_integer(config, "num_key_value_heads", family.kv_heads or heads)
    if heads % kv_heads:
        raise InputError(
            f"key 'num_key_value_heads' is {kv_heads}, which does not divide num_attention_heads = {heads}"
        )
    max_position = positive_integer(config, "max_position_embeddings", family.max_position)
    return ModelSpec(
        name=name,
        architecture=architecture,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_head_dim(config, family, hidden=hidden, heads=heads),
        intermediate_size=positive_integer(config, "intermediate_size"),
        vocab_size=positive_integer(config, "vocab_size", family.vocab_size),
        max_position_embeddings=max_position,
        norm_epsilon=positive_number(config, "rms_norm_eps", 1e-6),
        tie_embeddings=flag(config, "tie_word_embeddings"),
        attn_qkv_bias=_bias(config, "attention_bias", family.qkv_bias),
        attn_dense_bias=_bias(config, "attention_bias", family.dense_bias),
        mlp_bias=_bias(config, "mlp_bias", family.mlp_bias),
        qk_norm=family.qk_norm,
        sliding_window=_sliding_window(config, family, layers),
        rope=_rope(config, max_position),
        dtype=_dtype(config),
        bos_id=_bos_id(config),
        eos_ids=_eos_ids(config),
    )


def _read_object(path: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; a Hugging Face model directory has one") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def _architecture(config: Mapping[str, Any]) -> str:
    listed = config.get("architectures")
    model_type = config.get("model_type")
    if listed is not None and not (isinstance(listed, (list, tuple)) and all(isinstance(a, str) for a in listed)):
        raise wrong_value("architectures", listed, "a list of class names")
    if listed:
        found = listed[0]
    else:
        by_type = {family.model_type: name for name, family in _FAMILIES.items()}
        found = by_type.get(model_type, str(model_type)) if isinstance(model_type, str) else None
    if found is None:
        raise InputError("keys 'architectures' and 'model_type' are both missing, so the architecture is unknown")
    if found not in _FAMILIES:
        raise UnsupportedError(
            f"architecture {str(found)[:80]!r} is not supported; supported are {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    return str(found)


def _refuse_features(config: Mapping[str, Any]) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedError(f"hidden_act {str(activation)[:40]!r} is not supported; supported is 'silu'")
    partial = config.get("partial_rotary_factor")
    if partial not in (None, 1, 1.0):
        raise UnsupportedError(f"partial_rotary_factor {partial} is not supported; supported is 1.0")
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unnamed") if isinstance(quantization, Mapping) else "unnamed"
        if method in _CONVERTED:
            return  # The converter looks at the rest of its settings.
        raise UnsupportedError(
            f"the checkpoint is already quantised ({str(method)[:40]}); give the 16-bit checkpoint, trtkit quantises it"
        )


def _head_dim(config: Mapping[str, Any], family: _Family, *, hidden: int, heads: int) -> int:
    if config.get("head_dim") is not None:
        head_dim = positive_integer(config, "head_dim")
    elif family.head_dim is not None and "head_dim" not in config:
        head_dim = family.head_dim
    elif hidden % heads:
        raise InputError(f"key 'head_dim' is missing and hidden_size {hidden} is not a multiple of {heads} heads")
    else:
        head_dim = hidden // heads
    if head_dim % 2:
        raise InputError(f"key 'head_dim' is {head_dim}; rotary embedding needs an even one")
    return head_dim


def _bias(config: Mapping[str, Any], key: str, fixed: bool | None) -> bool:
    return flag(config, key) if fixed is None else fixed


def _sliding_window(config: Mapping[str, Any], family: _Family, layers: int) -> int | None:
    """The window of all layers, None when no layer has one."""
    if family.window is None:
        return None
    if family.window_switch and not flag(config, "use_sliding_window"):
        return None
    if config.get("sliding_window", family.window) is None:
        return None
    window = positive_integer(config, "sliding_window", family.window)
    types = config.get("layer_types")
    if types is not None and not (isinstance(types, (list, tuple)) and len(types) == layers):
        raise wrong_value("layer_types", types, f"a list of {layers} names")
    if types is not None:
        windowed = sum(kind == "sliding_attention" for kind in types)
    elif family.window_switch:
        windowed = max(0, layers - positive_integer(config, "max_window_layers", 28, least=0))
    else:
        windowed = layers
    if windowed not in (0, layers):
        raise UnsupportedError(f"a sliding window in {windowed} of {layers} layers is not supported; all or none is")
    return window if windowed else None


def _rope(config: Mapping[str, Any], max_position: int) -> RopeSpec:
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = _one_rope(config.get(key), key)
    theta_from: Mapping[str, Any] = rope if rope.get("rope_theta") is not None else config
    theta = positive_number(theta_from, "rope_theta", 10_000.0)
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UnsupportedError(f"partial_rotary_factor {rope['partial_rotary_factor']} is not supported")
    kind = rope.get("rope_type", rope.get("type")) or "default"
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec(theta=theta, scaling="linear", factor=positive_number(rope, "factor"))
    if kind == "llama3":
        original = config if config.get("original_max_position_embeddings") is not None else rope
        return RopeSpec(
            theta=theta,
            scaling="llama3",
            factor=positive_number(rope, "factor"),
            low_freq_factor=positive_number(rope, "low_freq_factor"),
            high_freq_factor=positive_number(rope, "high_freq_factor"),
            original_max_position=positive_integer(original, "original_max_position_embeddings", max_position),
        )
    raise UnsupportedError(
        f"rope type {str(kind)[:40]!r} in {key} is not supported; supported are default, linear, llama3"
    )


def _one_rope(value: object, key: str) -> Mapping[str, Any]:
    """The one set of rotary parameters; 5.x may nest them by layer type, which is fine while they agree."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise wrong_value(key, value, "an object")
    nested = [item for item in value.values() if isinstance(item, Mapping)]
    if not nested:
        return value
    if any(item != nested[0] for item in nested):
        raise UnsupportedError(
            f"{key} differs between layer types ({', '.join(map(str, value))}), which is not supported"
        )
    return nested[0]


def _dtype(config: Mapping[str, Any]) -> DType:
    """The type the weights were saved in; FP32, torch's default, when nothing says so."""
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    value = config.get(key)
    if value is None:
        return DType.FP32
    try:
        dtype = DType.parse(value) if isinstance(value, str) else None
    except UsageError:
        dtype = None
    if dtype not in _CHECKPOINT_DTYPES:
        raise wrong_value(key, value, "float32, float16 or bfloat16")
    return dtype


def _bos_id(config: Mapping[str, Any]) -> int | None:
    return None if config.get("bos_token_id") is None else positive_integer(config, "bos_token_id", least=0)


def _eos_ids(config: Mapping[str, Any]) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    for item in ids:
        if isinstance(item, bool) or not isinstance(item, int) or item < 0:
            raise wrong_value("eos_token_id", value, "a token id or a list of them")
    return tuple(dict.fromkeys(ids))
