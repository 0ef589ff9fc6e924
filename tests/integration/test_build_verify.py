"""The verification that ends a build, with the real engine and transformers: it passes what is right and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_checkpoints import write_model

from trtkit.backends import verify as verify_module
from trtkit.backends.verify import verify
from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError
from trtkit.spec.hf import load_model_spec
from trtkit.spec.plan import Parallelism
from trtkit.spec.quant import quant_for
from trtkit.trtllm.convert import convert


@pytest.fixture
def model(tmp_path: Path) -> Path:
    # Weights large enough that attention is sharp: with tiny ones it is near uniform, and no position matters.
    write_model(tmp_path / "m", dtype=torch.float32, vocab_size=300, spread=0.4)
    return tmp_path / "m"


@pytest.mark.parametrize(
    ("precision", "tp", "most"), [("fp32", 1, 1e-5), ("fp16", 2, 5e-3), ("bf16", 1, 4e-2), ("int8", 2, 0.1)]
)
def test_a_right_checkpoint_passes_with_a_small_drift(model: Path, precision: str, tp: int, most: float) -> None:
    quant = quant_for(precision)
    convert(model, model.parent / "out", quant=quant, parallel=Parallelism(tp=tp))
    result = verify(load_model_spec(model), quant, model, model.parent / "out")
    assert 0 < result["drift"] < most
    assert result["layers"] == 2


def test_a_truncated_copy_of_a_large_model_is_compared_layer_for_layer(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "SMALL_MODEL_BYTES", 0)
    monkeypatch.setattr(verify_module, "TRUNCATED_LAYERS", 1)
    convert(model, model.parent / "out", quant=quant_for("fp32"))
    result = verify(load_model_spec(model), quant_for("fp32"), model, model.parent / "out")
    assert result["layers"] == 1
    assert result["drift"] < 1e-5


@pytest.mark.parametrize("damage", ["rope base", "gate and up swapped", "one head moved"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_wrong_checkpoint_is_refused(model: Path, damage: str, precision: str) -> None:
    out = model.parent / "out"
    convert(model, out, quant=quant_for(precision))
    if damage == "rope base":
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**config, "rotary_base": 10000.0, "rotary_scaling": None}))
    else:
        tensors = load_file(out / "rank0.safetensors")
        layer = "transformer.layers.0."
        if damage == "gate and up swapped":
            fc, gate = f"{layer}mlp.fc.weight", f"{layer}mlp.gate.weight"
            tensors[fc], tensors[gate] = tensors[gate], tensors[fc]
        else:
            qkv = tensors[f"{layer}attention.qkv.weight"]
            tensors[f"{layer}attention.qkv.weight"] = torch.cat([qkv[8:32], qkv[:8], qkv[32:]])
        save_file(tensors, out / "rank0.safetensors")
    with pytest.raises(InputError, match="does not compute what transformers does"):
        verify(load_model_spec(model), quant_for(precision), model, out)


def test_limits_cover_every_compute_type() -> None:
    assert set(verify_module.MAX_DRIFT) == {DType.FP32, DType.FP16, DType.BF16}
