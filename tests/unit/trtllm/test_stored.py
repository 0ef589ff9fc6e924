"""FP8 rows and 8-bit caches: what the converter writes, against torch and against TensorRT-LLM's stated names and types."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.tiny_checkpoints import write_model

from trtkit.plan.work import weight_bytes
from trtkit.spec.catalog import model_preset
from trtkit.spec.checkpoint import checkpoint_tensors
from trtkit.spec.dtype import DType
from trtkit.spec.errors import UnsupportedError
from trtkit.spec.hf import load_model_spec
from trtkit.spec.plan import Parallelism
from trtkit.spec.quant import quant_for
from trtkit.trtllm.cast import quantise_fp8_rows
from trtkit.trtllm.convert import convert
from trtkit.trtllm.stored import stored_quant, stored_tensors
from trtkit.trtllm.unified import write_unified

ROWWISE = quant_for("fp8-rowwise")


def test_every_bf16_number_rounds_to_fp8_as_in_torch() -> None:
    bits = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    values = bits[np.isfinite(bits) & (np.abs(bits) <= 448)]
    rows = np.stack([values, np.zeros_like(values)], axis=1)
    rows[:, 1] = 448  # a scale of one: the numbers themselves are rounded
    numbers, scales = quantise_fp8_rows(rows, DType.FP32)
    assert (scales == 1).all()
    expected = torch.from_numpy(values.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(numbers[:, 0], expected)


def test_rows_are_scaled_to_448_and_never_beyond_with_a_least_scale_for_zeros() -> None:
    generator = np.random.default_rng(1)
    rows = generator.normal(size=(64, 96)).astype(np.float32) * np.logspace(-12, 6, 64, dtype=np.float32)[:, None]
    rows[3] = 0
    numbers, scales = quantise_fp8_rows(rows, DType.FP32)
    weight = torch.from_numpy(rows)
    expected = (weight.abs().amax(dim=1) / 448).clamp(min=1 / (448 * 512))
    assert torch.equal(torch.from_numpy(scales), expected)
    theirs = (weight / expected[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert np.array_equal(numbers, theirs.view(torch.uint8).numpy())
    assert not numbers[3].any()


@pytest.mark.parametrize("tp", [1, 2])
def test_fp8_rows_go_into_engines_with_float32_scales_for_every_rank(tmp_path: Path, tp: int) -> None:
    tensors = write_model(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "out", quant=ROWWISE, target="tensorrt", parallel=Parallelism(tp=tp))
    ranks = [load_file(tmp_path / "out" / f"rank{rank}.safetensors") for rank in range(tp)]
    name = "transformer.layers.1.mlp.proj"
    weight = torch.cat([rank[f"{name}.weight"].float() for rank in ranks], dim=1)
    scales = [rank[f"{name}.per_channel_scale"] for rank in ranks]
    assert ranks[0][f"{name}.weight"].dtype is torch.float8_e4m3fn
    assert all(scale.dtype is torch.float32 and scale.shape == (32,) for scale in scales)
    assert all(torch.equal(scale, scales[0]) for scale in scales), "columns of a row share its scale"
    source = tensors["model.layers.1.mlp.down_proj.weight"].float()
    error = (weight * scales[0][:, None] - source).abs()
    assert (error <= source.abs() / 16 + scales[0][:, None] / 1024).all(), "more than half a step"
    assert ranks[0]["lm_head.weight"].dtype is torch.bfloat16


def test_fp8_rows_for_the_pytorch_backend_have_its_names_and_types(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "out", quant=ROWWISE, target="tensorrt")
    (tmp_path / "u").mkdir()
    (name,) = write_unified(tmp_path / "m", tmp_path / "u", ROWWISE)
    theirs, ours = load_file(tmp_path / "out" / "rank0.safetensors"), load_file(tmp_path / "u" / name)
    for one, other in (("weight", "weight"), ("weight_scale", "per_channel_scale")):
        unified = ours[f"model.layers.0.mlp.gate_proj.{one}"]
        engine = theirs[f"transformer.layers.0.mlp.fc.{other}"]
        assert unified.dtype is engine.dtype
        assert torch.equal(unified.view(torch.uint8), engine.view(torch.uint8))


@pytest.mark.parametrize(("precision", "kv"), [("fp8-rowwise", None), ("fp8-rowwise", DType.FP8), ("int8-gptq", None)])
def test_files_hold_what_is_counted(tmp_path: Path, precision: str, kv: DType | None) -> None:
    write_model(tmp_path / "m")
    model, quant = load_model_spec(tmp_path / "m"), quant_for(precision, kv=kv)
    stored = stored_quant(quant, "tensorrt")
    names = [tensor.name for tensor in stored_tensors(model, stored, Parallelism())]
    assert len(names) == len(set(names))
    assert any(name.endswith("kv_cache_scaling_factor") for name in names) == (kv is DType.FP8)
    counted = {tensor.name for tensor in checkpoint_tensors(model, stored)}
    if precision == "fp8-rowwise":
        assert counted <= set(names)
    else:
        assert {n for n in names if n.endswith(".zero")} == {
            n.replace(".weight", ".zero") for n in counted if n.endswith(("dense.weight", "qkv.weight", "fc.weight", "gate.weight", "proj.weight"))
        }  # fmt: skip


def test_an_fp8_cache_has_scale_one_and_an_int8_cache_the_scale_of_its_own_layer(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    fp16, pp = quant_for("fp16"), Parallelism(pp=2)
    convert(tmp_path / "m", tmp_path / "fp8", quant=fp16.with_kv(DType.FP8), target="tensorrt", parallel=pp)
    convert(
        tmp_path / "m", tmp_path / "int8", quant=fp16.with_kv(DType.INT8), target="tensorrt", parallel=pp,
        kv_scale=[0.25, 0.5],
    )  # fmt: skip
    name = "transformer.layers.0.attention.kv_cache_scaling_factor"
    for folder, expected in (("fp8", [1.0, 1.0]), ("int8", [0.25, 0.5])):
        ranks = [load_file(tmp_path / folder / f"rank{rank}.safetensors")[name] for rank in range(2)]
        assert [float(scale) for scale in ranks] == expected
        assert all(scale.dtype is torch.float32 and scale.shape == (1,) for scale in ranks)


def test_an_int8_cache_without_scales_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    with pytest.raises(UnsupportedError, match="--calib-text"):
        convert(tmp_path / "m", tmp_path / "out", quant=quant_for("fp16", kv=DType.INT8), target="tensorrt")
    with pytest.raises(UnsupportedError, match="no int8 KV cache"):
        stored_quant(quant_for("fp16", kv=DType.INT8), "embedded")


@pytest.mark.parametrize("tp", [1, 2])
def test_the_memory_plan_counts_what_an_engine_of_gptq_groups_stores(tp: int) -> None:
    model, quant, parallel = model_preset("llama-3-70b"), quant_for("int8-gptq"), Parallelism(tp=tp)
    stored = sum(tensor.num_bytes for tensor in stored_tensors(model, quant, parallel))
    assert weight_bytes(model, quant, parallel) == stored
