"""The verification that ends a build, with the real engine and transformers: it passes what is right and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.gptq import write_gptq
from support.packed_sources import write_packed
from support.tiny_checkpoints import write_model

from trtkit.backends import verify as verify_module
from trtkit.backends.verify import verify
from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError
from trtkit.spec.hf import load_model_spec
from trtkit.spec.plan import Parallelism
from trtkit.spec.quant import quant_for
from trtkit.trtllm import groups
from trtkit.trtllm.convert import convert


@pytest.fixture
def model(tmp_path: Path) -> Path:
    # Weights large enough that attention is sharp: with tiny ones it is near uniform, and no position matters.
    write_model(tmp_path / "m", dtype=torch.float32, vocab_size=300, spread=0.4)
    return tmp_path / "m"


@pytest.mark.parametrize(
    ("precision", "compute", "tp", "pp"),
    [
        ("fp32", None, 1, 1), ("fp16", None, 2, 1), ("bf16", None, 1, 2), ("int8", None, 2, 1),
        ("int8", DType.BF16, 1, 1), ("int8", DType.FP32, 1, 2), ("fp8-rowwise", None, 2, 1), ("fp8-rowwise", None, 1, 2),
    ],
)  # fmt: skip
def test_a_right_checkpoint_differs_by_the_order_of_additions_only(
    model: Path, precision: str, compute: DType | None, tp: int, pp: int
) -> None:
    quant = quant_for(precision, compute=compute)
    convert(model, model.parent / "out", quant=quant, parallel=Parallelism(tp=tp, pp=pp))
    result = verify(load_model_spec(model), quant, model, model.parent / "out")
    assert 0 < result["drift"] < verify_module.MAX_DRIFT / 20
    assert (result["quantisation_drift"] > 0) == (precision != "fp32")
    assert result["layers"] == 2


@pytest.mark.parametrize("pp", [1, 2])
def test_a_truncated_copy_of_a_large_model_is_compared_layer_for_layer(
    model: Path, monkeypatch: pytest.MonkeyPatch, pp: int
) -> None:
    monkeypatch.setattr(verify_module, "SMALL_MODEL_BYTES", 0)
    monkeypatch.setattr(verify_module, "TRUNCATED_LAYERS", 1)
    convert(model, model.parent / "out", quant=quant_for("fp32"), parallel=Parallelism(pp=pp))
    result = verify(load_model_spec(model), quant_for("fp32"), model, model.parent / "out")
    assert result["layers"] == 1
    assert result["drift"] < 1e-5


def damaged_config(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "rotary_base": 10000.0, "rotary_scaling": None}))


def damaged_tensors(tensors: dict[str, torch.Tensor], damage: str) -> None:
    layer = "transformer.layers.0."
    qkv = f"{layer}attention.qkv.weight"
    if damage == "gate and up swapped":
        for suffix in ("weight", "per_channel_scale"):
            fc, gate = f"{layer}mlp.fc.{suffix}", f"{layer}mlp.gate.{suffix}"
            if fc in tensors:
                tensors[fc], tensors[gate] = tensors[gate], tensors[fc]
    elif damage == "one head moved":
        tensors[qkv] = torch.cat([tensors[qkv][8:32], tensors[qkv][:8], tensors[qkv][32:]])
    elif damage == "queries transposed":
        tensors[qkv][:32] = tensors[qkv][:32].T.clone()
    elif damage == "keys and values swapped":
        tensors[qkv] = torch.cat([tensors[qkv][:32], tensors[qkv][48:], tensors[qkv][32:48]])
    elif damage == "one row's scale doubled":
        scale = f"{layer}mlp.proj.per_channel_scale"
        if scale in tensors:
            tensors[scale][3] *= 2
        else:
            tensors[f"{layer}mlp.proj.weight"][3] *= 2


@pytest.mark.parametrize(
    "damage",
    [
        "rope base", "gate and up swapped", "one head moved", "queries transposed", "keys and values swapped",
        "one row's scale doubled",
    ],
)  # fmt: skip
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "fp8-rowwise"])
def test_a_wrong_checkpoint_is_refused(model: Path, damage: str, precision: str) -> None:
    out = model.parent / "out"
    convert(model, out, quant=quant_for(precision))
    if damage == "rope base":
        damaged_config(out)
    else:
        tensors = load_file(out / "rank0.safetensors")
        damaged_tensors(tensors, damage)
        save_file(tensors, out / "rank0.safetensors")
    with pytest.raises(InputError, match="does not compute what transformers does"):
        verify(load_model_spec(model), quant_for(precision), model, out)


def one_groups_scale(tensors: dict[str, torch.Tensor], layer: str) -> None:
    tensors[f"{layer}attention.dense.weights_scaling_factor"][1, 7] *= 2


def gate_and_up(tensors: dict[str, torch.Tensor], layer: str) -> None:
    for suffix in ("weight", "weights_scaling_factor"):
        fc, gate = f"{layer}mlp.fc.{suffix}", f"{layer}mlp.gate.{suffix}"
        tensors[fc], tensors[gate] = tensors[gate], tensors[fc]


def not_transposed(tensors: dict[str, torch.Tensor], layer: str) -> None:
    name = f"{layer}attention.dense.weight"
    tensors[name] = tensors[name].T.contiguous()


def a_zero_point(tensors: dict[str, torch.Tensor], layer: str) -> None:
    tensors[f"{layer}mlp.proj.zero"][0] += 0.1


@pytest.mark.parametrize("damage", [one_groups_scale, gate_and_up, not_transposed, a_zero_point])
def test_a_wrong_gptq_engine_checkpoint_is_refused(
    tmp_path: Path, damage: Callable[[dict[str, torch.Tensor], str], None]
) -> None:
    write_model(tmp_path / "m", vocab_size=300, spread=0.2, hidden_size=128, intermediate_size=192)
    write_gptq(tmp_path / "g", tmp_path / "m", 64)
    model, quant = load_model_spec(tmp_path / "g"), quant_for("int8-gptq")
    convert(tmp_path / "g", tmp_path / "out", quant=quant, target="tensorrt")
    assert verify(model, quant, tmp_path / "g", tmp_path / "out")["drift"] < verify_module.MAX_DRIFT / 20
    tensors = load_file(tmp_path / "out" / "rank0.safetensors")
    damage(tensors, "transformer.layers.0.")
    save_file(tensors, tmp_path / "out" / "rank0.safetensors")
    with pytest.raises(InputError, match="does not compute what transformers does"):
        verify(model, quant, tmp_path / "g", tmp_path / "out")


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A model whose widths have groups."""
    sizes = {"hidden_size": 128, "intermediate_size": 192}
    write_model(tmp_path / "w", dtype=torch.float16, vocab_size=300, spread=0.2, **sizes)
    return tmp_path / "w"


@pytest.mark.parametrize(("compute", "tp", "pp"), [(None, 1, 1), (DType.FP32, 2, 1), (DType.BF16, 1, 2)])
def test_int4_of_plain_weights_differs_by_the_order_of_additions_only(
    wide: Path, compute: DType | None, tp: int, pp: int
) -> None:
    quant = quant_for("int4", compute=compute)
    convert(wide, wide.parent / "out", quant=quant, parallel=Parallelism(tp=tp, pp=pp))
    result = verify(load_model_spec(wide), quant, wide, wide.parent / "out")
    assert 0 < result["drift"] < verify_module.MAX_DRIFT / 20
    assert 0.01 < result["quantisation_drift"] < 0.5


def test_weights_that_lie_on_a_grid_already_may_have_scales_that_differ_in_the_last_bit(wide: Path) -> None:
    quant = quant_for("int4", compute=DType.FP32)
    tensors = load_file(wide / "model.safetensors")
    for name, tensor in tensors.items():
        if "_proj.weight" in name:
            tensors[name] = torch.where(tensor > 0, 0.25, -0.25).to(tensor.dtype)
    save_file(tensors, wide / "model.safetensors")
    convert(wide, wide.parent / "out", quant=quant)
    stored = load_file(wide.parent / "out" / "rank0.safetensors")
    for name, tensor in stored.items():
        if name.endswith("per_group_scale"):
            stored[name] = torch.nextafter(tensor, torch.tensor(torch.inf))
    save_file(stored, wide.parent / "out" / "rank0.safetensors")
    assert verify(load_model_spec(wide), quant, wide, wide.parent / "out")["quantisation_drift"] < 1e-4


def test_scales_twice_as_large_as_they_need_be_are_refused_though_numbers_agree(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = groups._tried
    monkeypatch.setattr(groups, "_tried", lambda weights, scales, *rest: tried(weights, 2 * scales, *rest))
    convert(wide, wide.parent / "out", quant=quant_for("int4"))
    with pytest.raises(InputError, match=r"row 0, group 0: its scale .* rounds worse than the plain one") as caught:
        verify(load_model_spec(wide), quant_for("int4"), wide, wide.parent / "out")
    assert "\n" not in str(caught.value)


PACKED = [
    {"method": "gptq", "symmetric": True, "group": 64},
    {"method": "gptq", "symmetric": False, "group": 64, "version": "gptq_v2"},
    {"method": "gptq", "symmetric": False, "group": 64, "reordered": True},
    {"method": "awq", "group": 64},
    {"method": "compressed-tensors", "symmetric": False, "group": 32},
    {"method": "compressed-tensors", "symmetric": True, "group": -1},
]


@pytest.mark.parametrize("form", PACKED, ids=lambda form: f"{form['method']}-{form['group']}")
def test_packed_sources_are_taken_over_and_held_to_their_formats_definition(wide: Path, form: dict[str, Any]) -> None:
    source, out, quant = wide.parent / "q", wide.parent / "out", quant_for("int4")
    write_packed(source, wide, **form)
    convert(source, out, quant=quant, parallel=Parallelism(pp=2) if form.get("reordered") else Parallelism(tp=2))
    result = verify(load_model_spec(source), quant, source, out)
    assert 0 < result["drift"] < verify_module.MAX_DRIFT / 20
    assert result["quantisation_drift"] == 0.0


def nibbles_swapped(tensors: dict[str, torch.Tensor], layer: str) -> None:
    weight = tensors[f"{layer}mlp.proj.weight"]
    tensors[f"{layer}mlp.proj.weight"] = (weight >> 4) | (weight << 4)


def groups_shifted(tensors: dict[str, torch.Tensor], layer: str) -> None:
    name = f"{layer}mlp.fc.per_group_scale"
    tensors[name] = tensors[name].roll(1, dims=1)


def bytes_shifted(tensors: dict[str, torch.Tensor], layer: str) -> None:
    name = f"{layer}attention.dense.weight"
    tensors[name] = tensors[name].roll(2, dims=1)


def one_scale_halved(tensors: dict[str, torch.Tensor], layer: str) -> None:
    tensors[f"{layer}mlp.gate.per_group_scale"][5, 1] /= 2


def one_rows_sign(tensors: dict[str, torch.Tensor], layer: str) -> None:
    tensors[f"{layer}attention.qkv.per_group_scale"][9] *= -1


def a_zero_point_off(tensors: dict[str, torch.Tensor], layer: str) -> None:
    for name in [name for name in tensors if name.startswith(layer) and name.endswith("per_group_scale")]:
        zero = name.replace("per_group_scale", "per_group_zero")
        tensors[zero] = tensors.get(zero, torch.zeros_like(tensors[name]))
        tensors[zero][3] += 1


@pytest.mark.parametrize("source", ["plain", "awq"])
@pytest.mark.parametrize(
    "damage", [nibbles_swapped, groups_shifted, bytes_shifted, one_scale_halved, one_rows_sign, a_zero_point_off]
)
def test_a_wrong_int4_checkpoint_is_refused(
    wide: Path, source: str, damage: Callable[[dict[str, torch.Tensor], str], None]
) -> None:
    origin, out, quant = wide, wide.parent / "out", quant_for("int4")
    if source == "awq":
        origin = wide.parent / "q"
        write_packed(origin, wide, "awq", group=64)
    convert(origin, out, quant=quant)
    tensors = load_file(out / "rank0.safetensors")
    damage(tensors, "transformer.layers.0.")
    save_file(tensors, out / "rank0.safetensors")
    with pytest.raises(InputError, match="does not compute what transformers does"):
        verify(load_model_spec(origin), quant, origin, out)
