"""Weights in groups through the engine: loaded from any split, multiplied as what they stand for, on both paths alike."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import write_checkpoint
from support.device_engines import device_runner
from support.engine_models import kv_bytes, limits, make_hf, spec_of, trtllm_tensors
from support.int4 import int4_groups, is_matrix, packed

from trtkit.engine import int4
from trtkit.engine.device.model import product
from trtkit.engine.int4 import grouped_linear
from trtkit.engine.matmul import plain
from trtkit.engine.open import open_tensors
from trtkit.engine.weights import ModelWeights, load_weights, weights_from_tensors
from trtkit.kernels.int4 import dequantise_groups
from trtkit.plan.work import weight_bytes
from trtkit.spec.checkpoint_config import checkpoint_config
from trtkit.spec.dtype import DType
from trtkit.spec.engine import Request
from trtkit.spec.errors import InputError
from trtkit.spec.plan import Parallelism
from trtkit.spec.quant import QuantSpec, quant_for

SIZES = {"hidden_size": 128, "intermediate_size": 256}
HF = make_hf(**SIZES)
MODEL, PLAIN = spec_of(HF), trtllm_tensors(HF)


def scheme(group: int, *, zeros: bool = False, compute: DType = DType.FP32) -> QuantSpec:
    return replace(quant_for("int4", compute=compute), group_size=group, zero_points=zeros)


def stands_for(weights: ModelWeights) -> dict[str, torch.Tensor]:
    """Every matrix in float32."""
    result = {}
    for index, layer in enumerate(weights.layers):
        for name in ("qkv", "dense", "gate_up", "down"):
            matrix = getattr(layer, name)
            assert matrix.weight.dtype in (torch.uint8, torch.int8)
            result[f"{index}.{name}"] = dequantise_groups(matrix.weight, matrix.scale, matrix.zero)
    return result


def expected(meant: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    result = {}
    for index in range(MODEL.num_layers):
        layer = f"transformer.layers.{index}."
        parts = {
            "qkv": ["attention.qkv"],
            "dense": ["attention.dense"],
            "gate_up": ["mlp.fc", "mlp.gate"],
            "down": ["mlp.proj"],
        }
        for name, sources in parts.items():
            result[f"{index}.{name}"] = torch.cat([meant[f"{layer}{source}.weight"] for source in sources])
    return result


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    "parallel",
    [Parallelism(), Parallelism(tp=2), Parallelism(tp=4), Parallelism(tp=2, pp=2)],
    ids=lambda p: f"tp{p.tp}-pp{p.pp}",
)
def test_any_split_loads_to_the_numbers_that_were_packed(tmp_path: Path, parallel: Parallelism, zeros: bool) -> None:
    tensors, meant = int4_groups(PLAIN, 32, zeros=zeros)
    directory = write_checkpoint(tmp_path / "c", MODEL, tensors, scheme(32, zeros=zeros), parallel)
    weights, quant = load_weights(directory)
    assert (quant.group_size, quant.zero_points) == (32, zeros)
    found = stands_for(weights)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected(meant).items())
    assert (weights.layers[0].down.zero is not None) == zeros


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_memory_is_what_the_plan_counts(group: int, zeros: bool) -> None:
    quant = scheme(group, zeros=zeros, compute=DType.FP16)
    tensors, _ = int4_groups(PLAIN, group, zeros=zeros)
    weights = weights_from_tensors(MODEL, tensors, dtype=DType.FP16)
    assert weights.num_bytes == weight_bytes(MODEL, quant)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 40])
def test_the_product_is_that_of_the_dequantised_matrix(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(rows)
    numbers = torch.randint(-8, 8, (80, 128), generator=generator)
    scale = (torch.rand(80, 2, generator=generator) / 7).to(dtype)
    zero = torch.randint(-8, 8, (80, 2), generator=generator).to(dtype)
    x = torch.randn(rows, 128, generator=generator).to(dtype)
    wide = (numbers - zero.double().repeat_interleave(64, 1)) * scale.double().repeat_interleave(64, 1)
    right, tolerance = x.double() @ wide.T, 1e-5 if dtype is torch.float32 else 0.02
    monkeypatch.setattr(int4, "_TILE_ELEMENTS", 128 * 7)
    for weight in (packed(numbers, 64), numbers.to(torch.int8)):
        y = grouped_linear(x, weight, scale, zero)
        assert y.dtype is dtype
        assert torch.allclose(y.double(), right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("path", ["cpu", "device"])
def test_both_paths_write_the_tokens_of_the_float_model_it_stands_for(path: str, zeros: bool) -> None:
    tensors, meant = int4_groups(PLAIN, 64, zeros=zeros)
    requests = [
        Request(request_id=str(i), prompt_ids=(7 + i, 11, 13, 5), max_tokens=12, ignore_eos=True) for i in range(3)
    ]
    chosen = limits(kv_memory_bytes=kv_bytes(MODEL, 64, 4), tokens_per_block=4)

    def tokens(stored: dict[str, torch.Tensor], factory: object = None) -> list[tuple[str, int, int]]:
        with open_tensors(MODEL, stored, limits=chosen, runner_factory=factory) as engine:  # type: ignore[arg-type]
            return sorted((e.request_id, e.index, e.token_id) for e in engine.generate(requests))

    assert tokens(tensors, device_runner(MODEL) if path == "device" else None) == tokens(meant)


def test_int8_in_groups_stays_int8_and_computes_the_same(tmp_path: Path) -> None:
    stored, meant = dict(PLAIN), dict(PLAIN)
    for name, tensor in PLAIN.items():
        if is_matrix(name, tensor):
            grouped = tensor.unflatten(1, (-1, 32))
            scale = grouped.abs().amax(2) / 127
            numbers = (grouped / scale[:, :, None]).round()
            stored[name] = numbers.flatten(1).to(torch.int8)
            stored[f"{name.removesuffix('weight')}per_group_scale"] = scale
            meant[name] = (numbers * scale[:, :, None]).flatten(1)
    quant = replace(quant_for("int8", compute=DType.FP32), group_size=32)
    weights, read = load_weights(write_checkpoint(tmp_path / "c", MODEL, stored, quant, Parallelism(tp=2)))
    assert read.group_size == 32
    found = stands_for(weights)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected(meant).items())
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    down = meant["transformer.layers.1.mlp.proj.weight"]
    assert torch.allclose(weights.layers[1].down(x), x @ down.T, rtol=1e-4, atol=1e-5)
    assert weights.num_bytes == weight_bytes(MODEL, quant)


def modelopt_awq(directory: Path, parallel: Parallelism, group: int) -> dict[str, torch.Tensor]:
    """A checkpoint in ModelOpt's layout, written from its definition; returns what the matrices stand for."""
    generator = torch.Generator().manual_seed(3)
    quant = replace(quant_for("int4-awq", compute=DType.FP32), group_size=group)
    plain_dir = write_checkpoint(directory, MODEL, PLAIN, quant_for("fp32"), parallel)
    (plain_dir / "config.json").write_text(json.dumps(checkpoint_config(MODEL, quant, parallel)))
    meant = dict(PLAIN)
    befores = {
        name: torch.rand(tensor.shape[1], generator=generator) + 0.5
        for name, tensor in PLAIN.items()
        if name.endswith(("dense.weight", "proj.weight", "fc.weight", "gate.weight"))
    }
    for rank in range(parallel.tp):
        path = plain_dir / f"rank{rank}.safetensors"
        tensors = load_file(path)
        for name in [name for name, tensor in tensors.items() if is_matrix(name, tensor)]:
            prefix, grouped = name.removesuffix("weight"), tensors[name].unflatten(1, (-1, group))
            scale = grouped.abs().amax(2) / 7
            numbers = (grouped / scale[:, :, None]).round().flatten(1).long() % 16
            tensors[name] = (numbers[0::2] + 16 * numbers[1::2]).to(torch.uint8)
            tensors[f"{prefix}weights_scaling_factor"] = scale
            if name in befores:
                split = parallel.tp if name.endswith(("dense.weight", "proj.weight")) else 1
                tensors[f"{prefix}prequant_scaling_factor"] = befores[name].chunk(split)[rank % split].clone()
        save_file(tensors, path)
    for name, tensor in PLAIN.items():
        if is_matrix(name, tensor):
            grouped = tensor.unflatten(1, (-1, group))
            scale = grouped.abs().amax(2, keepdim=True) / 7
            meant[name] = ((grouped / scale).round() * scale).flatten(1) * befores.get(name, torch.ones(1))
    return meant


@pytest.mark.parametrize("tp", [1, 2])
def test_modelopts_awq_layout_is_read_with_what_multiplies_the_inputs(tmp_path: Path, tp: int) -> None:
    meant = modelopt_awq(tmp_path / "c", Parallelism(tp=tp), 32)
    weights, quant = load_weights(tmp_path / "c")
    assert (quant.algo, quant.group_size) == ("W4A16_AWQ", 32)
    found = stands_for(weights)
    for name, tensor in expected(meant).items():
        index, matrix = name.split(".")
        before = getattr(weights.layers[int(index)], matrix).input_scale
        assert (before is not None) == (matrix != "qkv")
        values = found[name]
        if before is not None:
            halves = values.chunk(2) if matrix == "gate_up" else (values,)
            values = torch.cat([half * one for half, one in zip(halves, before.view(len(halves), -1), strict=True)])
        assert torch.allclose(values, tensor, rtol=1e-6, atol=1e-7)
    x, layer = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)), weights.layers[0]
    right = expected(meant)
    for inputs, matrix, name in ((x, layer.down, "0.down"), (x[:, :128], layer.gate_up, "0.gate_up")):
        for y in (matrix(inputs), product(matrix, inputs)):
            assert torch.allclose(y, inputs @ right[name].T, rtol=1e-4, atol=1e-5)


NAME = "transformer.layers.1.mlp.proj."


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({f"{NAME}per_group_scale": torch.ones(128, 3)}, r"proj\.per_group_scale.*no groups of 256"),
        ({f"{NAME}per_group_scale": torch.ones(64, 4)}, r"proj\.per_group_scale: has shape \(64, 4\).*\(128, 4\)"),
        ({f"{NAME}weight": torch.zeros(128, 256, dtype=torch.uint8)}, r"proj\.weight: has shape \(128, 256\)"),
        ({f"{NAME}per_group_zero": torch.ones(128, 2)}, r"proj\.per_group_zero: has shape"),
        ({f"{NAME}per_group_scale": torch.full((128, 4), torch.nan)}, "NaN"),
        ({"transformer.layers.0.mlp.fc.per_group_zero": torch.ones(256, 2)}, r"mlp\.gate\.per_group_zero is missing"),
        ({"transformer.layers.0.mlp.gate.weight": torch.ones(256, 128)}, "one is INT4 and the other is not"),
    ],
)  # fmt: skip
def test_damage_is_named_in_one_line(damage: dict[str, torch.Tensor], says: str) -> None:
    tensors, _ = int4_groups(PLAIN, 64)
    with pytest.raises(InputError, match=says) as caught:
        weights_from_tensors(MODEL, {**tensors, **damage}, dtype=DType.FP32)
    assert "\n" not in str(caught.value)


def test_a_matrix_that_is_already_plain_is_packed_for_its_product_still() -> None:
    weights = weights_from_tensors(MODEL, PLAIN, dtype=DType.FP32)
    assert torch.equal(plain(weights.layers[0].down.weight), PLAIN["transformer.layers.0.mlp.proj.weight"])
