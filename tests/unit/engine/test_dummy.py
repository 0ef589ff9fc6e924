"""Random weights: the true shape and bytes, finite through many layers, the same for the same seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.engine_models import limits, make_hf, spec_of, trtllm_tensors
from torch.utils._python_dispatch import TorchDispatchMode

from trtkit.engine import dummy
from trtkit.engine.dummy import dummy_weights
from trtkit.engine.open import open_embedded
from trtkit.engine.weights import weights_from_tensors
from trtkit.kernels.int4 import dequantise_groups, unpack_int4
from trtkit.plan.work import weight_bytes
from trtkit.spec.bundle import EngineBundle, Manifest
from trtkit.spec.dtype import DType
from trtkit.spec.engine import Request
from trtkit.spec.errors import CapacityError, UnsupportedError
from trtkit.spec.kv import KVFidelity
from trtkit.spec.plan import BuildPlan
from trtkit.spec.quant import quant_for

MODEL = spec_of(make_hf())


def _plan(precision: str, **fields: object) -> BuildPlan:
    return BuildPlan(
        name="d",
        model=MODEL,
        model_source="none",
        gpu="cpu",
        quant=quant_for(precision, compute=DType.FP32 if precision in {"int8", "int4", "fp8-rowwise"} else None),
        limits=limits(),
        load_format="dummy",
        **fields,  # type: ignore[arg-type]
    )


def _bundle(tmp_path: Path, plan: BuildPlan) -> EngineBundle:
    manifest = Manifest(plan=plan, fidelity=KVFidelity.EXACT, versions={}, files={}, created_utc="")
    return EngineBundle(path=tmp_path, manifest=manifest)


def test_shapes_are_those_of_real_weights() -> None:
    real = weights_from_tensors(MODEL, trtllm_tensors(make_hf()), dtype=DType.FP32)
    made = dummy_weights(MODEL, quant_for("fp32"))
    assert made.num_bytes == real.num_bytes
    for ours, theirs in zip(made.layers, real.layers, strict=True):
        assert ours.gate_up.weight.shape == theirs.gate_up.weight.shape
        assert ours.qkv.weight.shape == theirs.qkv.weight.shape


def test_a_tied_head_is_the_embedding_and_norms_and_biases_follow_the_model() -> None:
    model = replace(MODEL, tie_embeddings=True, qk_norm=True, attn_qkv_bias=True)
    made = dummy_weights(model, quant_for("fp32"))
    assert made.lm_head is made.embedding
    assert made.layers[0].q_norm is not None
    assert made.layers[0].q_norm.shape == (model.head_dim,)
    assert made.layers[0].qkv.bias is not None
    assert made.layers[0].dense.bias is None


@pytest.mark.parametrize(
    ("precision", "stored", "scale"),
    [("int8", torch.int8, torch.float16), ("fp8-rowwise", torch.float8_e4m3fn, torch.float32)],
)
def test_quantised_weights_are_normal_and_bring_unit_inputs_to_unit_outputs(
    precision: str, stored: torch.dtype, scale: torch.dtype
) -> None:
    model = replace(MODEL, hidden_size=256, intermediate_size=256, num_heads=32)
    matrix = dummy_weights(model, quant_for(precision)).layers[0].down
    assert matrix.weight.dtype is stored
    assert matrix.scale is not None
    assert matrix.scale.dtype is scale
    dequantised = matrix.weight.float() * matrix.scale.float()[:, None]
    product = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) @ dequantised.T
    assert 0.9 < product.std() < 1.1
    assert dequantised.unique().numel() > 100


def test_a_chunk_is_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dummy, "_CHUNK_ELEMENTS", 100)
    weight = dummy_weights(MODEL, quant_for("fp32")).embedding
    assert bool((weight.abs().sum(dim=1) > 0).all())
    assert weight.unique().numel() == weight.numel()


def test_the_same_seed_gives_the_same_weights() -> None:
    first, again = (dummy_weights(MODEL, quant_for("int8"), seed=3) for _ in range(2))
    assert torch.equal(first.layers[1].qkv.weight, again.layers[1].qkv.weight)
    other = dummy_weights(MODEL, quant_for("int8"), seed=4)
    assert not torch.equal(first.layers[1].qkv.weight, other.layers[1].qkv.weight)


def test_a_precision_the_engine_does_not_run_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="int4-awq"):
        dummy_weights(MODEL, quant_for("int4-awq"))


@pytest.mark.parametrize(("precision", "group"), [("int4", 0), ("int4", 32), ("int8-gptq", 64)])
def test_groups_are_normal_and_exactly_as_large_as_the_plan_counts(precision: str, group: int) -> None:
    model = replace(MODEL, hidden_size=256, intermediate_size=384, num_heads=32)
    quant = quant_for(precision)
    quant = replace(quant, group_size=group or quant.group_size)
    made = dummy_weights(model, quant)
    matrix = made.layers[0].down
    assert matrix.scale is not None
    assert matrix.scale.shape == (256, 384 // (group or 128))
    dequantised = dequantise_groups(matrix.weight, matrix.scale)
    product = torch.randn(64, 384, generator=torch.Generator().manual_seed(1)) @ dequantised.T
    assert 0.9 < product.std() < 1.1
    if precision == "int4":
        values = unpack_int4(matrix.weight, group or 128).flatten()
        shares = torch.bincount(values.long() + 8, minlength=16) / values.numel()
        assert (shares > 0).all(), "all sixteen numbers occur"
        assert shares[8] > 2 * shares[8 - 4] > 4 * shares[8 - 7], "as normal numbers do"
    assert made.num_bytes == weight_bytes(model, quant.embedded)


def test_random_int4_of_widths_without_groups_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="MLP width 48"):
        dummy_weights(replace(MODEL, intermediate_size=48), quant_for("int4"))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "fp8-rowwise", "int4"])
def test_eighty_layers_of_random_weights_write_different_finite_tokens(tmp_path: Path, precision: str) -> None:
    plan = replace(_plan(precision), model=replace(MODEL, num_layers=80, intermediate_size=64))
    with open_embedded(_bundle(tmp_path, plan)) as engine:
        requests = [
            Request(request_id=str(i), prompt_ids=(5 + i, 6, 7), max_tokens=8, ignore_eos=True) for i in range(3)
        ]
        events = list(engine.generate(requests))
    assert not [event for event in events if event.error]
    assert len({event.token_id for event in events}) > 4


def test_the_bundle_takes_the_same_overrides_as_one_with_weights(tmp_path: Path) -> None:
    plan = _plan("int8")
    with open_embedded(_bundle(tmp_path, plan), path="device", kv_dtype="fp8", kv="h2o:16", max_seq_len=64) as engine:
        assert engine.info.kv_policy.budget == 16
        assert engine.info.max_seq_len == 64
        assert engine.kv_stats().block_bytes == MODEL.kv_bytes_per_token(DType.FP8) * 4
        events = list(engine.generate([Request(request_id="a", prompt_ids=(5,) * 40, max_tokens=20, ignore_eos=True)]))
    assert len(events) == 20
    assert events[-1].error is None


def test_another_compute_type_leaves_the_groups_as_the_plan_has_them(tmp_path: Path) -> None:
    model = replace(MODEL, hidden_size=256, intermediate_size=384, num_heads=32)
    plan = _plan("int4")
    plan = replace(plan, quant=replace(plan.quant, group_size=32), model=model)
    in_plan, in_bf16 = (
        open_embedded(_bundle(tmp_path, plan), device="cpu", dtype=dtype).info.weight_bytes
        for dtype in (None, DType.BF16)
    )
    halved = weight_bytes(model, replace(plan.quant, compute=DType.BF16, activations=DType.BF16))
    assert (in_plan, in_bf16) == (weight_bytes(model, plan.quant), halved)


def test_random_weights_larger_than_memory_are_refused_before_they_are_made(tmp_path: Path) -> None:
    plan = replace(_plan("int8"), model=replace(MODEL, vocab_size=1 << 40))
    with pytest.raises(CapacityError, match=r"random weights of tiny take .* free"):
        open_embedded(_bundle(tmp_path, plan))


class _Draws(TorchDispatchMode):
    """Notes the memory of every tensor that random numbers are drawn into."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: list[int] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):  # type: ignore[no-untyped-def]
        result = function(*arguments, **(keywords or {}))
        if "rand" in function.__name__ or "normal" in function.__name__:
            self.memory.append(result.untyped_storage().data_ptr())
        return result


def test_all_numbers_are_drawn_into_the_same_memory_so_that_weights_lie_without_holes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wide = max(MODEL.vocab_size * MODEL.hidden_size, 2 * MODEL.intermediate_size * MODEL.hidden_size)
    monkeypatch.setattr(dummy, "_CHUNK_ELEMENTS", MODEL.hidden_size * 8)
    with _Draws() as draws:
        made = dummy_weights(MODEL, quant_for("int8", compute=DType.FP32))
    assert len(draws.memory) > wide // (MODEL.hidden_size * 8)
    # A matrix with longer rows than those before it may ask for a larger buffer, which is all there is to it.
    assert len(dict.fromkeys(draws.memory)) <= 2
    assert draws.memory == sorted(draws.memory, key=list(dict.fromkeys(draws.memory)).index)
    assert made.layers[0].qkv.weight.float().std() > 20
