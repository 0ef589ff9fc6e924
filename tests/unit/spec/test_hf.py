"""Hugging Face configs: both spellings of transformers, what is refused, and which key is at fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError, UnsupportedError
from trtkit.spec.hf import SUPPORTED_ARCHITECTURES, load_model_spec, model_spec_from_hf
from trtkit.spec.model import ModelSpec, RopeSpec

LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 100,
}


def spec(base: dict[str, Any] = SMALL, **changes: Any) -> ModelSpec:
    return model_spec_from_hf({**base, **changes}, name="m")


def architecture(name: str, **changes: Any) -> ModelSpec:
    return spec(architectures=[name], **{"num_key_value_heads": 4, **changes})


def test_a_published_config_is_read_in_full() -> None:
    assert spec(LLAMA_3_1_8B) == ModelSpec(
        name="m",
        architecture="LlamaForCausalLM",
        num_layers=32,
        hidden_size=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        vocab_size=128256,
        max_position_embeddings=131072,
        norm_epsilon=1e-5,
        rope=RopeSpec(theta=500000.0, scaling="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0),
        dtype=DType.BF16,
        bos_id=128000,
        eos_ids=(128001, 128008, 128009),
    )


def test_both_spellings_of_transformers_give_the_same_spec() -> None:
    new = {k: v for k, v in LLAMA_3_1_8B.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    new["rope_parameters"] = {**LLAMA_3_1_8B["rope_scaling"], "rope_theta": 500000.0}
    new["dtype"] = "bfloat16"
    assert spec(new) == spec(LLAMA_3_1_8B)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({}, RopeSpec()),
        ({"rope_theta": 5e5}, RopeSpec(theta=5e5)),
        ({"rope_theta": 500000}, RopeSpec(theta=5e5)),
        ({"rope_scaling": None, "rope_theta": 5e5}, RopeSpec(theta=5e5)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, RopeSpec(theta=5e5)),
        ({"rope_parameters": {"rope_theta": 5e5}}, RopeSpec(theta=5e5)),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5}, RopeSpec(theta=5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeSpec(scaling="linear", factor=2.0)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, RopeSpec(scaling="linear", factor=2.0)),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 5e5, "rope_type": "default"}}},
            RopeSpec(theta=5e5),
        ),
        (
            {"rope_parameters": {"a": {"rope_theta": 5e5}, "b": {"rope_theta": 5e5}}},
            RopeSpec(theta=5e5),
        ),
    ],
)
def test_every_spelling_of_the_rotary_base_is_read(rope: dict[str, Any], expected: RopeSpec) -> None:
    assert spec(**rope).rope == expected


def test_llama3_scaling_without_an_original_length_takes_the_models() -> None:
    rope = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert spec(rope_scaling=rope, max_position_embeddings=4096).rope.original_max_position == 4096


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "su", "mrope"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rotary_scalings_that_are_not_computed_are_refused_by_name(kind: str, key: str) -> None:
    with pytest.raises(UnsupportedError, match=f"rope type '{kind}'.*supported are default, linear, llama3"):
        spec(**{key: {"rope_type": kind, "factor": 2.0}})


def test_rotary_parameters_that_differ_between_layer_types_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"differs between layer types \(a, b\)"):
        spec(rope_parameters={"a": {"rope_theta": 1e4}, "b": {"rope_theta": 1e6}})


@pytest.mark.parametrize("where", [{"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}])
def test_partial_rotation_is_refused(where: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=r"partial_rotary_factor 0\.5"):
        spec(**where)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, 16), ({"head_dim": None}, 16), ({"head_dim": 32}, 32), ({"head_dim": 32, "hidden_size": 65}, 32)],
)
def test_head_dim_is_the_configs_or_follows_from_the_heads(given: dict[str, Any], expected: int) -> None:
    assert spec(**given).head_dim == expected


def test_absent_keys_get_the_architectures_own_defaults() -> None:
    assert spec().num_kv_heads == 4
    assert spec(architectures=["MistralForCausalLM"], num_attention_heads=16).num_kv_heads == 8
    assert architecture("Qwen3ForCausalLM").head_dim == 128
    assert architecture("Qwen3ForCausalLM", head_dim=None).head_dim == 16
    assert architecture("MistralForCausalLM").sliding_window == 4096


def test_biases_and_norms_are_those_of_the_architecture() -> None:
    assert architecture("Qwen2ForCausalLM").attn_qkv_bias
    assert not architecture("Qwen2ForCausalLM").attn_dense_bias
    assert architecture("Qwen3ForCausalLM").qk_norm
    assert not architecture("Qwen3ForCausalLM").attn_qkv_bias
    both = spec(attention_bias=True, mlp_bias=True)
    assert (both.attn_qkv_bias, both.attn_dense_bias, both.mlp_bias) == (True, True, True)
    ignored = architecture("MistralForCausalLM", attention_bias=True, mlp_bias=True)
    assert (ignored.attn_qkv_bias, ignored.attn_dense_bias, ignored.mlp_bias) == (False, False, False)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("LlamaForCausalLM", {"sliding_window": 128}, None),
        ("MistralForCausalLM", {"sliding_window": None}, None),
        ("MistralForCausalLM", {"sliding_window": 128}, 128),
        ("Qwen2ForCausalLM", {"sliding_window": 128}, None),
        ("Qwen2ForCausalLM", {"sliding_window": 128, "use_sliding_window": False}, None),
        ("Qwen2ForCausalLM", {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 2}, None),
        ("Qwen2ForCausalLM", {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 0}, 128),
        (
            "Qwen3ForCausalLM",
            {"sliding_window": 128, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2},
            128,
        ),
        (
            "Qwen3ForCausalLM",
            {"sliding_window": 128, "use_sliding_window": True, "layer_types": ["full_attention"] * 2},
            None,
        ),
    ],
)
def test_a_sliding_window_counts_only_where_it_is_switched_on(
    name: str, given: dict[str, Any], expected: int | None
) -> None:
    assert architecture(name, **given).sliding_window == expected


def test_a_window_in_some_layers_only_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="sliding window in 1 of 2 layers"):
        architecture("Qwen2ForCausalLM", use_sliding_window=True, sliding_window=64, max_window_layers=1)


@pytest.mark.parametrize(
    "name",
    ["MixtralForCausalLM", "GemmaForCausalLM", "Qwen3MoeForCausalLM", "LlamaForSequenceClassification", "x" * 500],
)
def test_other_architectures_are_refused_with_the_supported_ones_listed(name: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        spec(architectures=[name])
    assert all(known in str(caught.value) for known in SUPPORTED_ARCHITECTURES)
    assert name[:60] in str(caught.value)
    assert len(str(caught.value)) < 250


def test_the_model_type_stands_in_for_a_missing_architecture() -> None:
    assert spec(architectures=None, model_type="qwen2", num_key_value_heads=4).architecture == "Qwen2ForCausalLM"
    with pytest.raises(UnsupportedError, match="'mixtral' is not supported"):
        spec(architectures=[], model_type="mixtral")
    with pytest.raises(InputError, match="'architectures' and 'model_type' are both missing"):
        spec(architectures=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"already quantised \(bitsandbytes\)"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"already quantised \(fp8\)"),
    ],
)
def test_features_that_are_not_computed_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        spec(**changes)


@pytest.mark.parametrize(
    ("value", "expected"), [(None, ()), (2, (2,)), ([2], (2,)), ([5, 3, 5], (5, 3)), ([], ()), (0, (0,))]
)
def test_end_of_sequence_may_be_one_id_or_several(value: object, expected: tuple[int, ...]) -> None:
    assert spec(eos_token_id=value).eos_ids == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, DType.FP32),
        ({"torch_dtype": None}, DType.FP32),
        ({"torch_dtype": "float16"}, DType.FP16),
        ({"dtype": "bfloat16"}, DType.BF16),
        ({"dtype": "float32", "torch_dtype": "float16"}, DType.FP32),
    ],
)
def test_the_dtype_is_read_from_either_key(given: dict[str, Any], expected: DType) -> None:
    assert spec(**given).dtype is expected


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("hidden_size", [0, -1, "64", 64.0, True, [64], None, float("nan")]),
        ("num_hidden_layers", [0, "2", None]),
        ("num_attention_heads", [0, 2.5, None]),
        ("num_key_value_heads", [0, 3, "4"]),
        ("intermediate_size", [0, {}, None]),
        ("vocab_size", [0, "many"]),
        ("max_position_embeddings", [0, -5, 1e5]),
        ("head_dim", [0, 15, "16"]),
        ("rms_norm_eps", [0, -1e-5, "1e-5", float("inf"), float("nan"), True, 10**400]),
        ("rope_theta", [0, "1e4", float("nan"), 10**400]),
        ("rope_scaling", ["linear", [1], 3]),
        ("tie_word_embeddings", ["false", 0, 1]),
        ("attention_bias", ["no", 1]),
        ("torch_dtype", ["int7", 16, "int8", ["float16"]]),
        ("eos_token_id", [-1, "2", 2.0, [1, None], True, {}]),
        ("bos_token_id", [-1, "1", True]),
        ("architectures", ["LlamaForCausalLM", [1], {}]),
    ],
)
def test_a_wrong_value_is_one_line_that_names_its_key(key: str, values: list[object]) -> None:
    for value in values:
        with pytest.raises(InputError) as caught:
            spec(**{key: value})
        assert repr(key) in str(caught.value), value
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("key", ["factor", "low_freq_factor", "high_freq_factor"])
def test_an_incomplete_llama3_scaling_names_the_missing_key(key: str) -> None:
    rope = {k: v for k, v in LLAMA_3_1_8B["rope_scaling"].items() if k != key}
    with pytest.raises(InputError, match=f"'{key}' is missing"):
        spec(rope_scaling=rope)


def test_heads_that_do_not_divide_the_width_need_a_head_dim() -> None:
    with pytest.raises(InputError, match=r"'head_dim' is missing.*65 is not a multiple of 4"):
        spec(hidden_size=65)


def write_config(directory: Path, **changes: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**SMALL, "eos_token_id": 2, **changes}))
    return directory


def test_a_directory_gives_its_name_to_the_model(tmp_path: Path) -> None:
    loaded = load_model_spec(write_config(tmp_path / "my-llama"))
    assert (loaded.name, loaded.eos_ids) == ("my-llama", (2,))


def test_the_generation_config_knows_more_ends_of_sequence(tmp_path: Path) -> None:
    directory = write_config(tmp_path / "m")
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 9]}')
    assert load_model_spec(directory).eos_ids == (2, 9)
    (directory / "generation_config.json").write_text("{}")
    assert load_model_spec(directory).eos_ids == (2,)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="absent: no such model directory"):
        load_model_spec(tmp_path / "absent")
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        load_model_spec(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"null", b"[" * 100_000, b'{"a": "\xc3"}'])
def test_a_damaged_config_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json: ") as caught:
        load_model_spec(tmp_path)
    assert "\n" not in str(caught.value)


def test_errors_from_a_directory_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: key 'hidden_size' is 0"):
        load_model_spec(write_config(tmp_path / "a", hidden_size=0))
    with pytest.raises(UnsupportedError, match=r"config\.json: architecture 'GPT2LMHeadModel'"):
        load_model_spec(write_config(tmp_path / "b", architectures=["GPT2LMHeadModel"]))
