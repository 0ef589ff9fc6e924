"""GPTQ, AWQ and compressed-tensors weights: read as a float64 reading of their definitions, taken over without loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.packed_sources import Tensors, write_packed
from support.tiny_checkpoints import write_model

from trtkit.engine.device.model import product
from trtkit.engine.weights import ModelWeights, load_weights
from trtkit.kernels.int4 import dequantise_groups
from trtkit.plan.work import weight_bytes
from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError, UnsupportedError
from trtkit.spec.plan import Parallelism
from trtkit.spec.quant import quant_for
from trtkit.trtllm import convert as convert_module
from trtkit.trtllm.convert import convert
from trtkit.trtllm.packed import Packing, read_packing, weights_note
from trtkit.trtllm.source import open_source

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
INT4 = quant_for("int4")
FORMS: list[dict[str, Any]] = [
    {"method": "gptq", "symmetric": True, "group": 128},
    {"method": "gptq", "symmetric": False, "group": 64},
    {"method": "gptq", "symmetric": False, "group": 128, "version": "gptq_v2"},
    {"method": "gptq", "symmetric": True, "group": -1},
    {"method": "gptq", "symmetric": False, "group": 64, "reordered": True},
    {"method": "gptq", "symmetric": True, "group": 128, "version": "gptq_v2", "reordered": True},
    {"method": "awq", "symmetric": False, "group": 128},
    {"method": "awq", "symmetric": False, "group": 32},
    {"method": "compressed-tensors", "symmetric": True, "group": 128},
    {"method": "compressed-tensors", "symmetric": False, "group": 64},
    {"method": "compressed-tensors", "symmetric": True, "group": -1},
]


def named(form: dict[str, Any]) -> str:
    kind = "ordered" if form.get("reordered") else ""
    return f"{form['method']}{form.get('version', '')}{kind}-{'sym' if form['symmetric'] else 'asym'}-{form['group']}"


def checkpoint(folder: Path, form: dict[str, Any], dtype: torch.dtype = torch.float16) -> tuple[Path, Tensors, Tensors]:
    write_model(folder / "plain", dtype, **SIZES)
    tensors, matrices = write_packed(folder / "q", folder / "plain", **form)
    return folder / "q", tensors, matrices


@pytest.mark.parametrize("form", FORMS, ids=named)
def test_numbers_zero_points_and_scales_are_those_of_the_definition(tmp_path: Path, form: dict[str, Any]) -> None:
    source, _, matrices = checkpoint(tmp_path, form)
    opened = open_source(source)
    for name, expected in matrices.items():
        matrix = opened.tensors[name].packed
        assert matrix is not None
        assert np.array_equal(matrix.values(0, matrix.rows).astype(np.float64), expected.numpy()), name
        assert np.array_equal(matrix.values(5, 19).astype(np.float64), expected[5:24].numpy()), name
        assert np.array_equal(matrix.transposed(3, 9), matrix.numbers(3, 9).T), name


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_a_zero_point_that_readers_take_differently_is_refused(tmp_path: Path, version: str) -> None:
    source, tensors, _ = checkpoint(tmp_path, {**FORMS[1], "version": version})
    tensors["model.layers.1.mlp.up_proj.qzeros"][0, 2] |= 0xF << 8
    save_file(tensors, source / "model.safetensors")
    if version == "gptq_v2":
        zeros = open_source(source).tensors["model.layers.1.mlp.up_proj.weight"].packed.zeros
        assert zeros[0, 18] == 15 - 8
        return
    with pytest.raises(UnsupportedError, match=r"up_proj\.qzeros' holds 15.* 16 and others for 0") as caught:
        open_source(source)
    assert "\n" not in str(caught.value)


def stands_for(weights: ModelWeights, layer: int) -> Tensors:
    """By Hugging Face names, in float64."""
    block, result = weights.layers[layer], {}
    for matrix, parts in (
        (block.qkv, {"self_attn.q_proj": 128, "self_attn.k_proj": 64, "self_attn.v_proj": 64}),
        (block.dense, {"self_attn.o_proj": 128}),
        (block.gate_up, {"mlp.gate_proj": 256, "mlp.up_proj": 256}),
        (block.down, {"mlp.down_proj": 128}),
    ):
        assert matrix.scale is not None
        stored = dequantise_groups(matrix.weight, matrix.scale, matrix.zero).double()
        values = stored if matrix.input_order is None else torch.empty_like(stored)
        if matrix.input_order is not None:
            values[:, matrix.input_order.long()] = stored
        for name, part in zip(parts, values.split(list(parts.values())), strict=True):
            result[f"model.layers.{layer}.{name}.weight"] = part
    return result


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("form", FORMS, ids=named)
def test_the_embedded_engine_gets_them_without_loss(tmp_path: Path, form: dict[str, Any], tp: int) -> None:
    source, _, matrices = checkpoint(tmp_path, form)
    if form.get("reordered") and tp > 1:
        with pytest.raises(UnsupportedError, match=r"desc_act is True.*use --tp 1"):
            convert(source, tmp_path / "out", quant=INT4, parallel=Parallelism(tp=tp))
        return
    result = convert(source, tmp_path / "out", quant=INT4, parallel=Parallelism(tp=tp))
    size = form["group"] if form["group"] > 0 else 128
    assert result.quant.group_size == min(size, 128 // tp)
    assert result.quant.zero_points == (not form["symmetric"])
    weights, _ = load_weights(tmp_path / "out", dtype=DType.FP32)
    assert weights.layers[0].down.weight.dtype is torch.uint8
    for layer in range(2):
        for name, values in stands_for(weights, layer).items():
            assert torch.equal(values, matrices[name]), name


def test_products_take_activations_in_the_weights_own_order(tmp_path: Path) -> None:
    source, _, matrices = checkpoint(tmp_path, FORMS[4])
    convert(source, tmp_path / "out", quant=INT4)
    weights, quant = load_weights(tmp_path / "out", dtype=DType.FP32)
    assert quant.input_order
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    expected = x.double() @ matrices["model.layers.0.mlp.down_proj.weight"].T
    assert torch.allclose(weights.layers[0].down(x).double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(product(weights.layers[0].down, x).double(), expected, rtol=1e-4, atol=1e-5)
    assert load_weights(tmp_path / "out")[0].num_bytes == weight_bytes(weights.model, quant)


def test_orders_that_differ_between_matrices_with_one_input_are_refused(tmp_path: Path) -> None:
    source, tensors, _ = checkpoint(tmp_path, FORMS[4])
    name = "model.layers.1.self_attn.k_proj.g_idx"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"k_proj\.weight order their common inputs differently") as caught:
        convert(source, tmp_path / "out", quant=INT4)
    assert "\n" not in str(caught.value)


def test_an_order_that_is_none_is_refused_when_it_is_read(tmp_path: Path) -> None:
    source, _, _ = checkpoint(tmp_path, FORMS[4])
    convert(source, tmp_path / "out", quant=INT4)
    path = tmp_path / "out" / "rank0.safetensors"
    stored = load_file(path)
    stored["transformer.layers.0.mlp.proj.input_order"][3] = 4
    save_file(stored, path)
    with pytest.raises(InputError, match=r"proj\.input_order: is no order of 256 inputs"):
        load_weights(tmp_path / "out")


def test_plain_weights_are_rounded_to_the_nearest_of_sixteen_and_better_than_by_their_maximum(tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "m", **SIZES)
    convert(tmp_path / "m", tmp_path / "out", quant=INT4)
    weights, quant = load_weights(tmp_path / "out", dtype=DType.FP32)
    assert (quant.group_size, quant.zero_points) == (128, False)
    for name, values in stands_for(weights, 1).items():
        weight = tensors[name].double().reshape(-1, 128)
        ours = (values.reshape(-1, 128) - weight).square().sum(1)
        scale = weight.abs().amax(1, keepdim=True) / 7
        plain = ((weight / scale).round() * scale - weight).square().sum(1)
        assert (ours <= plain * 1.001).all(), f"{name}: a group is worse than the plain scale (itself rounded to fp16)"
        assert ours.sum() < 0.8 * plain.sum(), name


@pytest.mark.parametrize("source_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_number_is_the_nearest_to_its_weight_that_its_scale_has(
    tmp_path: Path, source_dtype: torch.dtype
) -> None:
    tensors = write_model(tmp_path / "m", source_dtype, **SIZES)
    convert(tmp_path / "m", tmp_path / "out", quant=quant_for("int4", compute=DType.BF16))
    rank = load_file(tmp_path / "out" / "rank0.safetensors")
    scale = rank["transformer.layers.0.mlp.proj.per_group_scale"]
    assert scale.dtype is torch.bfloat16
    weights, _ = load_weights(tmp_path / "out", dtype=DType.FP32)
    found = stands_for(weights, 0)["model.layers.0.mlp.down_proj.weight"]
    weight, wide = tensors["model.layers.0.mlp.down_proj.weight"].double(), scale.double().repeat_interleave(128, 1)
    nearest = (weight / wide).round().clamp(-8, 7) * wide
    assert ((found - weight).abs() <= (nearest - weight).abs() + 1e-6).all()


def test_a_group_of_zeros_stays_zero(tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "m", **SIZES)
    tensors["model.layers.0.mlp.down_proj.weight"][3, :128] = 0
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    convert(tmp_path / "m", tmp_path / "out", quant=INT4)
    weights, _ = load_weights(tmp_path / "out", dtype=DType.FP32)
    down = stands_for(weights, 0)["model.layers.0.mlp.down_proj.weight"]
    assert not down[3, :128].any()
    assert down[3, 128:].any()


def test_a_killed_conversion_continues_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "m", **SIZES)
    convert(tmp_path / "m", tmp_path / "whole", quant=INT4)
    monkeypatch.setattr(convert_module, "PIECE_BYTES", 1 << 12)
    calls = 0

    def dying(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "m", tmp_path / "out", quant=INT4, progress=dying)
    assert convert(tmp_path / "m", tmp_path / "out", quant=INT4).resumed_pieces > 0
    whole, resumed = ((tmp_path / name / "rank0.safetensors").read_bytes() for name in ("whole", "out"))
    assert whole == resumed


def test_other_precisions_get_what_the_numbers_stand_for(tmp_path: Path) -> None:
    source, _, matrices = checkpoint(tmp_path, {"method": "awq", "symmetric": False, "group": 64})
    convert(source, tmp_path / "out", quant=quant_for("fp32"), target="tensorrt")
    rank = load_file(tmp_path / "out" / "rank0.safetensors")
    expected = matrices["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(rank["transformer.layers.1.mlp.proj.weight"].double(), expected)


@pytest.mark.parametrize(
    ("form", "changes", "error", "says"),
    [
        (FORMS[0], {"bits": 3}, UnsupportedError, "bits is 3; trtkit converts GPTQ with 4 or 8 bits"),
        (FORMS[6], {"version": "gemv"}, UnsupportedError, "version is 'gemv'.*GEMM"),
        (FORMS[6], {"bits": 8}, UnsupportedError, "bits is 8; trtkit converts AWQ with 4 bits"),
        (FORMS[6], {"group_size": "all"}, InputError, "group_size is 'all'"),
        (FORMS[8], {"format": "marlin-24"}, UnsupportedError, "format 'marlin-24'"),
        (FORMS[8], {"config_groups": {}}, UnsupportedError, "0 groups of layers"),
    ],
)
def test_settings_that_are_not_taken_over_are_refused_in_one_line(
    tmp_path: Path, form: dict[str, Any], changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    source, _, _ = checkpoint(tmp_path, form)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] |= changes
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=says) as caught:
        convert(source, tmp_path / "out", quant=INT4)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ({"strategy": "tensor"}, "strategy is 'tensor'"),
        ({"actorder": "weight"}, "activation order"),
        ({"type": "float"}, "floating-point weights"),
        ({"num_bits": 2}, "bits is 2"),
    ],
)
def test_weights_of_compressed_tensors_that_are_not_integers_in_order_are_refused(
    tmp_path: Path, weights: dict[str, Any], says: str
) -> None:
    source, _, _ = checkpoint(tmp_path, FORMS[8])
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= weights
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=says):
        read_packing(source)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("gptq", "quantization_config is 'gptq', expected an object"),
        ({"quant_method": ["gptq"]}, "quantised with"),
        ({"quant_method": "gptq", "bits": 4.0}, "bits is 4.0"),
        ({"quant_method": "gptq", "bits": 4, "sym": "false"}, "sym is 'false', expected true or false"),
        ({"quant_method": "gptq", "bits": 4, "desc_act": "false"}, "desc_act is 'false', expected true or false"),
        ({"quant_method": "awq", "bits": 4, "zero_point": 0}, "zero_point is '0', expected true or false"),
        ({"quant_method": "compressed-tensors", "config_groups": [1]}, r"config_groups is '\[1\]', expected an object"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": None}},
            "a group of layers is 'None', expected an object",
        ),
    ],
)
def test_settings_of_another_type_are_refused_in_one_line(tmp_path: Path, settings: Any, says: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    with pytest.raises((InputError, UnsupportedError), match=says) as caught:
        read_packing(tmp_path)
    assert "\n" not in str(caught.value)


LAYER = "model.layers.0.mlp.gate_proj."


@pytest.mark.parametrize(
    ("form", "name", "damage", "says"),
    [
        (FORMS[0], "qzeros", lambda t: t + 1, "zero points other than 8, and the config says symmetric"),
        (FORMS[1], "g_idx", lambda t: t.flip(0).contiguous(), r"g_idx.*desc_act"),
        (FORMS[4], "g_idx", lambda t: t * 0, r"g_idx.*no groups of 64 inputs each"),
        (FORMS[6], "qweight", lambda t: t[:, :-1].contiguous(), r"qweight.*\[128, 32\]"),
        (FORMS[6], "qzeros", None, r"qzeros' is missing; INT4 AWQ has qweight, qzeros, scales"),
        (FORMS[9], "weight_zero_point", None, "weight_zero_point' is missing"),
        (FORMS[8], "weight_scale", lambda t: t.float() * torch.nan, "NaN or infinity"),
    ],
)
def test_damaged_tensors_are_named_in_one_line(
    tmp_path: Path, form: dict[str, Any], name: str, damage: Any, says: str
) -> None:
    source, tensors, _ = checkpoint(tmp_path, form)
    found = tensors.pop(f"{LAYER}{name}")
    if damage is not None:
        tensors[f"{LAYER}{name}"] = damage(found)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises((InputError, UnsupportedError), match=says) as caught:
        convert(source, tmp_path / "out", quant=INT4)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_older_awq_files_with_their_own_words_are_read(tmp_path: Path) -> None:
    source, _, _ = checkpoint(tmp_path, FORMS[6])
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (source / "config.json").write_text(json.dumps(config))
    old = {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}
    (source / "quant_config.json").write_text(json.dumps(old))
    assert read_packing(source) == Packing(method="awq", bits=4, group_size=128, symmetric=False)


@pytest.mark.parametrize(
    ("group", "tp", "dtype", "says"),
    [
        (16, 1, DType.FP16, "group size 16.*128 or 64 or 32"),
        (128, 8, DType.FP16, "query width 16 on each of 8"),
        (128, 1, DType.BF16, "float16 numbers, which bf16 would round; use --dtype fp16"),
    ],
)
def test_groups_and_types_that_lose_something_are_refused(
    tmp_path: Path, group: int, tp: int, dtype: DType, says: str
) -> None:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 8}
    write_model(tmp_path / "plain", torch.float16, **{**SIZES, **sizes})
    write_packed(tmp_path / "q", tmp_path / "plain", "gptq", group=group)
    with pytest.raises(UnsupportedError, match=says):
        convert(tmp_path / "q", tmp_path / "out", quant=quant_for("int4", compute=dtype), parallel=Parallelism(tp=tp))


def test_int4_is_no_form_of_tensorrt_llms(tmp_path: Path) -> None:
    write_model(tmp_path / "m", **SIZES)
    with pytest.raises(UnsupportedError, match="embedded engine's; for TensorRT-LLM use --precision int4-awq"):
        convert(tmp_path / "m", tmp_path / "out", quant=INT4, target="tensorrt")


@pytest.mark.parametrize(
    ("bits", "group", "precision", "to_engine", "says"),
    [
        (4, 128, "int4", False, "INT4 GPTQ in groups of 128, taken over as they are"),
        (8, 0, "int8-gptq", True, "INT8 GPTQ with one scale for each of its rows, taken over as they are"),
        (8, 128, "int8", False, "rounded again to one scale a row"),
        (8, 0, "int8", False, "taken over as they are"),
        (8, 0, "int8", True, "multiplied out and then stored as int8"),
        (4, 128, "fp16", False, "multiplied out and then stored as fp16"),
        (8, 128, "int4", False, "multiplied out and then stored as int4"),
    ],
)
def test_the_manifest_says_what_became_of_the_weights(
    bits: int, group: int, precision: str, to_engine: bool, says: str
) -> None:
    packing = Packing(method="gptq", bits=bits, group_size=group, symmetric=True)
    assert says in weights_note(packing, quant_for(precision), to_engine=to_engine)
