"""INT8 GPTQ checkpoints: read against a float reference that is packed and unpacked bit by bit, and refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.gptq import write_gptq
from support.tiny_checkpoints import shard, write_model

from trtkit.engine.weights import load_weights
from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError, UnsupportedError
from trtkit.spec.plan import Parallelism
from trtkit.spec.quant import quant_for
from trtkit.trtllm import convert as convert_module
from trtkit.trtllm.convert import convert
from trtkit.trtllm.packed import read_packing
from trtkit.trtllm.source import open_source
from trtkit.trtllm.unified import write_unified

Tensors = dict[str, torch.Tensor]
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
GPTQ = quant_for("int8-gptq")


def checkpoint(folder: Path, group_size: int = 128, **changes: Any) -> tuple[Path, Tensors, Tensors]:
    write_model(folder / "plain", **SIZES)
    tensors, matrices = write_gptq(folder / "g", folder / "plain", group_size, **changes)
    return folder / "g", tensors, matrices


@pytest.mark.parametrize("changes", [{}, {"checkpoint_format": "gptq_v2"}])
@pytest.mark.parametrize("group_size", [-1, 64, 128])
def test_numbers_times_scales_are_the_float_reference_exactly(
    tmp_path: Path, group_size: int, changes: dict[str, str]
) -> None:
    source, _, matrices = checkpoint(tmp_path, group_size, **changes)
    opened = open_source(source)
    assert len(matrices) == 14
    for name, expected in matrices.items():
        matrix = opened.tensors[name].packed
        assert matrix is not None
        assert np.array_equal(matrix.values(0, matrix.rows), expected.numpy())
        assert np.array_equal(matrix.values(5, 9), expected[5:14].numpy())


def test_sharded_checkpoints_with_their_settings_in_a_file_of_its_own_are_read(tmp_path: Path) -> None:
    source, tensors, matrices = checkpoint(tmp_path, 64)
    shard(source, tensors, parts=5)
    config = json.loads((source / "config.json").read_text())
    (source / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (source / "config.json").write_text(json.dumps(config))
    opened = open_source(source)
    assert opened.packing is not None
    name = "model.layers.1.mlp.down_proj.weight"
    packed = opened.tensors[name].packed
    assert packed is not None
    assert len(packed.paths) > 1
    assert np.array_equal(packed.values(0, 256), matrices[name].numpy())
    assert len(opened.fingerprint) == 5


@pytest.mark.parametrize("tp", [1, 2])
def test_engines_get_gptqs_numbers_and_scales_as_they_are_transposed_and_split(tmp_path: Path, tp: int) -> None:
    source, _, matrices = checkpoint(tmp_path, 64)
    convert(source, tmp_path / "out", quant=GPTQ, target="tensorrt", parallel=Parallelism(tp=tp))
    ranks = [load_file(tmp_path / "out" / f"rank{rank}.safetensors") for rank in range(tp)]
    layer, hf = "transformer.layers.1.", "model.layers.1."

    def stood_for(rank: Tensors, name: str) -> torch.Tensor:
        weight, scale, zero = (rank[f"{layer}{name}.{s}"] for s in ("weight", "weights_scaling_factor", "zero"))
        assert (weight.dtype, scale.dtype, zero.dtype) == (torch.int8, torch.float16, torch.float16)
        assert scale.shape == zero.shape == (weight.shape[0] // 64, weight.shape[1])
        assert not zero.any()
        return (weight.float() * scale.float().repeat_interleave(64, 0)).T

    down = torch.cat([stood_for(rank, "mlp.proj") for rank in ranks], dim=1)
    assert torch.equal(down, matrices[f"{hf}mlp.down_proj.weight"])
    gate = torch.cat([stood_for(rank, "mlp.fc") for rank in ranks])
    assert torch.equal(gate, matrices[f"{hf}mlp.gate_proj.weight"])
    keys = torch.cat([stood_for(rank, "attention.qkv")[256 // tp : 384 // tp] for rank in ranks])
    assert torch.equal(keys, matrices[f"{hf}self_attn.k_proj.weight"])


def test_one_scale_a_row_is_repeated_for_every_group_of_an_engine(tmp_path: Path) -> None:
    source, _, matrices = checkpoint(tmp_path, -1)
    convert(source, tmp_path / "out", quant=GPTQ, target="tensorrt")
    rank = load_file(tmp_path / "out" / "rank0.safetensors")
    scale = rank["transformer.layers.0.mlp.proj.weights_scaling_factor"]
    assert scale.shape == (512 // 128, 256)
    assert (scale == scale[0]).all()
    weight = rank["transformer.layers.0.mlp.proj.weight"].float() * scale.float().repeat_interleave(128, 0)
    assert torch.equal(weight.T, matrices["model.layers.0.mlp.down_proj.weight"])


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("group_size", [-1, 32, 128])
def test_the_embedded_engine_gets_rows_and_groups_as_they_are(tmp_path: Path, group_size: int, tp: int) -> None:
    source, _, matrices = checkpoint(tmp_path, group_size)
    result = convert(source, tmp_path / "out", quant=GPTQ, parallel=Parallelism(tp=tp))
    assert (result.quant.algo, result.quant.group_size) == ("W8A16", max(group_size, 0))
    weights, _ = load_weights(tmp_path / "out", dtype=DType.FP32)
    for matrix, name in ((weights.layers[0].down, "mlp.down_proj"), (weights.layers[0].dense, "self_attn.o_proj")):
        assert matrix.scale is not None
        scale = matrix.scale[:, None] if group_size == -1 else matrix.scale.repeat_interleave(group_size, dim=1)
        assert torch.equal(matrix.weight.float() * scale, matrices[f"model.layers.0.{name}.weight"])


def test_int8_of_grouped_gptq_is_rounded_again_to_rows(tmp_path: Path) -> None:
    source, _, matrices = checkpoint(tmp_path, 128)
    convert(source, tmp_path / "out", quant=quant_for("int8"))
    rank = load_file(tmp_path / "out" / "rank0.safetensors")
    weight, scale = (rank[f"transformer.layers.0.mlp.proj.{s}"] for s in ("weight", "per_channel_scale"))
    error = (weight.float() * scale.float()[:, None] - matrices["model.layers.0.mlp.down_proj.weight"]).abs()
    assert 0 < (error / scale.float()[:, None]).max() <= 0.5 + 127 * 2**-11, "the scale itself is rounded to fp16"


def test_a_killed_conversion_continues_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, _, _ = checkpoint(tmp_path)
    convert(source, tmp_path / "whole", quant=GPTQ, target="tensorrt")
    monkeypatch.setattr(convert_module, "PIECE_BYTES", 1 << 12)
    calls = 0

    def dying(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", quant=GPTQ, target="tensorrt", progress=dying)
    assert convert(source, tmp_path / "out", quant=GPTQ, target="tensorrt").resumed_pieces > 0
    whole, resumed = ((tmp_path / name / "rank0.safetensors").read_bytes() for name in ("whole", "out"))
    assert whole == resumed


def test_the_pytorch_backend_gets_rows_as_plain_int8_and_groups_are_refused(tmp_path: Path) -> None:
    source, _, matrices = checkpoint(tmp_path, -1)
    (tmp_path / "u").mkdir()
    (name,) = write_unified(source, tmp_path / "u", GPTQ)
    tensors = load_file(tmp_path / "u" / name)
    prefix = "model.layers.0.self_attn.q_proj."
    weight = tensors[f"{prefix}weight"].float() * tensors[f"{prefix}weight_scale"].float()[:, None]
    assert torch.equal(weight, matrices[f"{prefix}weight"])
    assert json.loads((tmp_path / "u" / "hf_quant_config.json").read_text())["quantization"]["quant_algo"] == "W8A16"
    assert "quantization_config" not in json.loads((tmp_path / "u" / "config.json").read_text())
    groups, _, _ = checkpoint(tmp_path / "groups", 128)
    with pytest.raises(UnsupportedError, match=r"groups of 128.*one INT8 scale a row"):
        write_unified(groups, tmp_path / "u", GPTQ)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"sym": False}, UnsupportedError, "sym is False"),
        ({"bits": 3}, UnsupportedError, "bits is 3; trtkit converts GPTQ with 4 or 8 bits"),
        ({"quant_method": "awq"}, UnsupportedError, "bits is 8; trtkit converts AWQ with 4 bits"),
        ({"quant_method": "bitsandbytes"}, UnsupportedError, "already quantised"),
        ({"checkpoint_format": "marlin"}, UnsupportedError, "checkpoint_format is 'marlin'"),
        ({"group_size": "many"}, InputError, "group_size is 'many'"),
    ],
)
def test_settings_that_cannot_be_converted_are_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    write_model(tmp_path / "plain", **SIZES)
    write_gptq(tmp_path / "g", tmp_path / "plain", 128)
    config = json.loads((tmp_path / "g" / "config.json").read_text())
    config["quantization_config"] |= changes
    (tmp_path / "g" / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=says) as caught:
        convert(tmp_path / "g", tmp_path / "out", quant=GPTQ)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.partial").exists()


def test_engines_do_not_take_groups_of_inputs_that_are_no_neighbours(tmp_path: Path) -> None:
    source, _, _ = checkpoint(tmp_path, desc_act=True)
    with pytest.raises(
        UnsupportedError, match=r"desc_act is True, and TensorRT-LLM's groups.*--target embedded"
    ) as caught:
        convert(source, tmp_path / "out", quant=GPTQ, target="tensorrt")
    assert "\n" not in str(caught.value)
    rows, _, matrices = checkpoint(tmp_path / "rows", -1, desc_act=True)
    convert(rows, tmp_path / "out", quant=GPTQ, target="tensorrt")
    rank = load_file(tmp_path / "out" / "rank0.safetensors")
    weight, scale = (rank[f"transformer.layers.0.mlp.proj.{s}"].float() for s in ("weight", "weights_scaling_factor"))
    assert torch.equal((weight * scale.repeat_interleave(128, 0)).T, matrices["model.layers.0.mlp.down_proj.weight"])


def asymmetric(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.up_proj.qzeros"][0, 3] += 1


def reordered(tensors: Tensors) -> None:
    tensors["model.layers.0.self_attn.o_proj.g_idx"] = (
        tensors["model.layers.0.self_attn.o_proj.g_idx"].flip(0).contiguous()
    )


def without_order(tensors: Tensors) -> None:
    del tensors["model.layers.0.self_attn.o_proj.g_idx"]


def misshapen(tensors: Tensors) -> None:
    tensors["model.layers.0.mlp.gate_proj.scales"] = tensors["model.layers.0.mlp.gate_proj.scales"][:1].contiguous()


def of_4_bits(tensors: Tensors) -> None:
    tensors["model.layers.0.mlp.gate_proj.qweight"] = tensors["model.layers.0.mlp.gate_proj.qweight"][::2].contiguous()


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (asymmetric, UnsupportedError, r"up_proj\.qzeros.*zero points other than 128"),
        (reordered, UnsupportedError, r"o_proj\.g_idx.*desc_act"),
        (without_order, InputError, r"o_proj\.g_idx' is missing"),
        (misshapen, InputError, r"gate_proj\.scales.*\[2, 512\]"),
        (of_4_bits, InputError, r"gate_proj\.qweight.*\[64, 512\]"),
    ],
)
def test_damaged_or_foreign_tensors_are_named_in_one_line(
    tmp_path: Path, damage: Any, error: type[Exception], says: str
) -> None:
    source, tensors, _ = checkpoint(tmp_path)
    damage(tensors)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(error, match=says) as caught:
        convert(source, tmp_path / "out", quant=GPTQ, target="tensorrt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_scale_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    source, tensors, _ = checkpoint(tmp_path)
    tensors["model.layers.0.mlp.down_proj.scales"][1, 7] = float("nan")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(InputError, match=r"down_proj\.scales.*NaN or infinity in row 1"):
        convert(source, tmp_path / "out", quant=GPTQ)


def test_a_plain_model_is_not_taken_for_gptq(tmp_path: Path) -> None:
    write_model(tmp_path / "plain", **SIZES)
    assert read_packing(tmp_path / "plain") is None
    with pytest.raises(UnsupportedError, match=r"not quantised: use --precision int8"):
        convert(tmp_path / "plain", tmp_path / "out", quant=GPTQ)


@pytest.mark.parametrize(
    ("group_size", "tp", "says"), [(32, 1, "groups of 32"), (128, 4, "hidden size 256 is no multiple")]
)
def test_groups_that_an_engines_kernel_does_not_take_are_refused(
    tmp_path: Path, group_size: int, tp: int, says: str
) -> None:
    source, _, _ = checkpoint(tmp_path, group_size)
    with pytest.raises(UnsupportedError, match=says):
        convert(source, tmp_path / "out", quant=GPTQ, target="tensorrt", parallel=Parallelism(tp=tp))
