"""Unified checkpoints: ours held against ModelOpt's own export, and ModelOpt's held against the source. ModelOpt is real."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_checkpoints import write_model

from trtkit.backends.build_pytorch import verify_unified
from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError, UnsupportedError
from trtkit.spec.hf import load_model_spec
from trtkit.spec.quant import quant_for
from trtkit.trtllm import unified
from trtkit.trtllm.modelopt import dequantised, read_windows, write_quantised
from trtkit.trtllm.unified import write_unified

TINY = Path(__file__).parents[2] / "bench" / "tiny_model" / "model"
WINDOWS = [[(7 * i + 3 * j) % 900 for j in range(64)] for i in range(4)]


def written(folder: Path, precision: str = "int8", source: Path = TINY) -> dict[str, torch.Tensor]:
    folder.mkdir()
    names = write_unified(source, folder, quant_for(precision))
    return {key: tensor for name in names for key, tensor in load_file(folder / name).items()}


def test_int8_is_what_modelopt_itself_exports(tmp_path: Path) -> None:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
        model = mtq.quantize(model, mtq.INT8_WEIGHT_ONLY_CFG, lambda m: None)
        export_hf_checkpoint(model, dtype=torch.float32, export_dir=tmp_path / "theirs")
    theirs, ours = load_file(tmp_path / "theirs" / "model.safetensors"), written(tmp_path / "ours")
    assert {k for k in ours if "_proj" in k} == {k for k in theirs if "_proj" in k}
    for name, tensor in ours.items():
        if tensor.dtype is torch.int8:
            assert torch.equal(tensor, theirs[name]), name
        elif name in theirs:
            assert torch.allclose(tensor.float(), theirs[name].float(), rtol=1e-3), name
    configs = [json.loads((tmp_path / side / "hf_quant_config.json").read_text()) for side in ("theirs", "ours")]
    assert configs[0]["quantization"] == configs[1]["quantization"]


def test_sixteen_bits_are_a_plain_checkpoint_in_the_asked_type(tmp_path: Path) -> None:
    tensors = written(tmp_path / "u", "fp16")
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert json.loads((tmp_path / "u" / "config.json").read_text())["dtype"] == "float16"
    assert not (tmp_path / "u" / "hf_quant_config.json").exists()


def test_large_models_are_sharded_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single = written(tmp_path / "one")
    monkeypatch.setattr(unified, "SHARD_BYTES", 1 << 18)
    monkeypatch.setattr(unified, "PIECE_BYTES", 1 << 12)
    sharded = written(tmp_path / "many")
    assert sharded.keys() == single.keys()
    assert all(torch.equal(sharded[name], tensor) for name, tensor in single.items())
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(single)
    assert len(set(index["weight_map"].values())) > 1
    assert all((tmp_path / "many" / name).is_file() for name in index["weight_map"].values())


def test_verification_catches_scales_that_are_not_applied(tmp_path: Path) -> None:
    model = load_model_spec(TINY)
    tensors = written(tmp_path / "u")
    assert verify_unified(model, quant_for("int8"), TINY, tmp_path / "u")["drift"] < 1e-5
    tensors["model.layers.3.self_attn.o_proj.weight_scale"][7] *= 1.5
    save_file(tensors, tmp_path / "u" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="does not compute"):
        verify_unified(model, quant_for("int8"), TINY, tmp_path / "u")


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "limit"), [("fp8", 0.2), ("int4-awq", 0.5)])
def test_modelopts_checkpoint_computes_what_the_source_does_and_keeps_its_config(
    tmp_path: Path, precision: str, limit: float
) -> None:
    quant = quant_for(precision)
    output = tmp_path / "u"
    output.mkdir()
    write_quantised(TINY, output, quant, WINDOWS)
    found = verify_unified(load_model_spec(TINY), quant, TINY, output)
    assert found["drift"] < 1e-6
    assert 0 < found["quantisation_drift"] < limit
    assert 0.5 < found["worst_half_steps"] < 1.1, "rounded to nearest, on its own scales"
    config, source = (json.loads((folder / "config.json").read_text()) for folder in (output, TINY))
    kept = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype", "quantization_config")}
    assert kept == {key: value for key, value in source.items() if key not in ("dtype", "torch_dtype")}
    quantised = json.loads((output / "hf_quant_config.json").read_text())["quantization"]
    assert quantised["quant_algo"] == quant.algo


@pytest.mark.slow
def test_a_calibrated_checkpoint_with_one_wrong_scale_or_another_rope_base_is_refused(tmp_path: Path) -> None:
    quant, model = quant_for("int4-awq"), load_model_spec(TINY)
    write_quantised(TINY, tmp_path, quant, WINDOWS)
    right = load_file(tmp_path / "model.safetensors")
    wrong = {name: tensor.clone() for name, tensor in right.items()}
    wrong["model.layers.1.mlp.up_proj.weight_scale"][5] *= 2
    save_file(wrong, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.weight row 5 is .* half steps"):
        verify_unified(model, quant, TINY, tmp_path)
    save_file(right, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="does not compute what transformers does"):
        verify_unified(model, quant, TINY, tmp_path)


def test_int4_is_two_rows_to_a_byte_with_the_even_row_low() -> None:
    packed = torch.tensor([[0x21, 0xF8]], dtype=torch.uint8)
    scales = {"weight_scale": torch.tensor([[1.0], [10.0]]), "pre_quant_scale": torch.tensor([1.0, 2.0])}
    assert dequantised(packed, scales).tolist() == [[1.0, -16.0], [20.0, -20.0]]


def test_a_scheme_that_needs_calibration_is_not_written_without(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="calibration"):
        write_unified(TINY, tmp_path, quant_for("fp8"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"too short", b"\xff\xfe\xfa"])
def test_text_that_cannot_calibrate_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(InputError, match=r"calibrate|read as text"):
        read_windows(TINY, tmp_path / "t")


def test_weights_beyond_float16_are_an_error_and_not_infinity(tmp_path: Path) -> None:
    write_model(tmp_path / "m", spread=1e6)
    (tmp_path / "u").mkdir()
    with pytest.raises(InputError, match="beyond the range of fp16"):
        write_unified(tmp_path / "m", tmp_path / "u", quant_for("int8", compute=DType.FP16))
