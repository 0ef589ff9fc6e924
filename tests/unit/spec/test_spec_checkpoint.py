"""The checkpoint layout adds up: every parameter of the model is in exactly one rank's share."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest

from trtkit.spec.checkpoint import checkpoint_tensors, kv_heads_per_rank, padded_vocab_size, rank_file, with_groups
from trtkit.spec.checkpoint_config import checkpoint_config, parse_checkpoint_config
from trtkit.spec.dtype import DType
from trtkit.spec.errors import UnsupportedError
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Parallelism
from trtkit.spec.quant import QuantSpec, quant_for

MODEL = ModelSpec(
    name="m",
    architecture="LlamaForCausalLM",
    num_layers=4,
    hidden_size=32,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    intermediate_size=48,
    vocab_size=100,
    max_position_embeddings=64,
)
VARIANTS = [
    MODEL,
    replace(MODEL, attn_qkv_bias=True),
    replace(MODEL, attn_qkv_bias=True, attn_dense_bias=True, mlp_bias=True),
    replace(MODEL, qk_norm=True, head_dim=16),
]


@pytest.mark.parametrize("model", VARIANTS)
def test_one_rank_holds_every_parameter_once(model: ModelSpec) -> None:
    tensors = list(checkpoint_tensors(model, quant_for("fp16")))
    assert sum(prod(t.shape) for t in tensors) == model.num_params
    assert len({t.name for t in tensors}) == len(tensors)
    assert {t.dtype for t in tensors} == {DType.FP16}
    assert sum(t.num_bytes for t in tensors) == 2 * model.num_params


def test_tied_embeddings_are_written_twice() -> None:
    tied = replace(MODEL, tie_embeddings=True)
    stored = sum(prod(t.shape) for t in checkpoint_tensors(tied, quant_for("fp16")))
    assert stored == tied.num_params + 100 * 32


@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_share_the_matrices_and_repeat_the_norms(tp: int) -> None:
    whole = {t.name: t for t in checkpoint_tensors(MODEL, quant_for("bf16"))}
    for part in checkpoint_tensors(MODEL, quant_for("bf16"), Parallelism(tp=tp)):
        ratio = 1 if part.group == "norm" else tp
        assert prod(part.shape) * ratio == prod(whole[part.name].shape), part.name


def test_more_ranks_than_kv_heads_repeat_each_head() -> None:
    assert [kv_heads_per_rank(MODEL, tp) for tp in (1, 2, 4, 8)] == [4, 2, 1, 1]
    qkv = next(t for t in checkpoint_tensors(MODEL, quant_for("fp16"), Parallelism(tp=8)) if "qkv" in t.name)
    assert qkv.shape == (8 + 2 * 8, 32)


def test_the_vocabulary_is_padded_to_the_ranks() -> None:
    assert [padded_vocab_size(MODEL, tp) for tp in (1, 3, 8)] == [100, 102, 104]
    embedding = next(iter(checkpoint_tensors(MODEL, quant_for("fp16"), Parallelism(tp=8))))
    assert embedding.shape == (13, 32)


def test_pipeline_ranks_split_layers_and_keep_the_ends() -> None:
    first = [t.name for t in checkpoint_tensors(MODEL, quant_for("fp16"), Parallelism(pp=2), pp_rank=0)]
    last = [t.name for t in checkpoint_tensors(MODEL, quant_for("fp16"), Parallelism(pp=2), pp_rank=1)]
    assert "transformer.vocab_embedding.weight" in first
    assert "lm_head.weight" not in first
    assert "transformer.vocab_embedding.weight" not in last
    assert {"lm_head.weight", "transformer.ln_f.weight"} <= set(last)
    layers = [{n.split(".")[2] for n in names if ".layers." in n} for names in (first, last)]
    assert layers == [{"0", "1"}, {"0", "1"}]


def test_int8_stores_bytes_and_one_scale_an_output_channel() -> None:
    by_name = {t.name: t for t in checkpoint_tensors(MODEL, quant_for("int8"))}
    prefix = "transformer.layers.0.mlp.proj"
    assert (by_name[f"{prefix}.weight"].dtype, by_name[f"{prefix}.weight"].shape) == (DType.INT8, (32, 48))
    assert by_name[f"{prefix}.weight"].num_bytes == 32 * 48
    assert (by_name[f"{prefix}.per_channel_scale"].dtype, by_name[f"{prefix}.per_channel_scale"].shape) == (
        DType.FP16,
        (32,),
    )
    assert by_name["lm_head.weight"].dtype is DType.FP16
    assert not any("scale" in t.name for t in checkpoint_tensors(MODEL, quant_for("fp16")))


WIDE = replace(MODEL, hidden_size=256, intermediate_size=384, num_heads=8, head_dim=32)


def test_int4_is_two_to_a_byte_with_a_scale_for_each_row_and_group() -> None:
    by_name = {t.name: t for t in checkpoint_tensors(WIDE, quant_for("int4"))}
    weight, scale = (by_name[f"transformer.layers.0.mlp.proj.{name}"] for name in ("weight", "per_group_scale"))
    assert (weight.dtype, weight.shape, weight.stored_shape) == (DType.INT4, (256, 384), (256, 192))
    assert weight.num_bytes == 256 * 192
    assert (scale.dtype, scale.shape, scale.group) == (DType.FP16, (256, 3), "mlp")
    assert not any("zero" in name or "channel" in name for name in by_name)
    zeros = [t for t in checkpoint_tensors(WIDE, replace(quant_for("int4"), zero_points=True)) if "zero" in t.name]
    assert len(zeros) == 4 * 5
    assert zeros[-1].shape == (256, 3)


def test_groups_that_the_widths_do_not_have_are_counted_as_those_that_they_do() -> None:
    narrow = replace(WIDE, intermediate_size=96)
    shapes = {t.name: t.shape for t in checkpoint_tensors(narrow, quant_for("int4"))}
    assert shapes["transformer.layers.0.mlp.proj.per_group_scale"] == (256, 3)
    assert shapes["transformer.layers.0.mlp.fc.per_group_scale"] == (96, 8)


def test_int8_in_groups_has_no_scale_of_rows() -> None:
    names = {t.name.rpartition(".")[2]: t for t in checkpoint_tensors(WIDE, quant_for("int8-gptq").embedded)}
    assert names["per_group_scale"].shape == (256, 3)
    assert "per_channel_scale" not in names


@pytest.mark.parametrize(
    ("sizes", "tp", "within", "group"),
    [({}, 1, 0, 128), ({}, 2, 0, 64), ({}, 1, 32, 32), ({}, 1, 384, 128), ({"intermediate_size": 96}, 1, 0, 32)],
)
def test_groups_are_the_largest_that_divide_every_width_of_a_rank(
    sizes: dict[str, int], tp: int, within: int, group: int
) -> None:
    found = with_groups(replace(WIDE, **sizes), quant_for("int4"), Parallelism(tp=tp), within=within)  # type: ignore[arg-type]
    assert found.group_size == group
    assert with_groups(WIDE, quant_for("fp16")) == quant_for("fp16")


@pytest.mark.parametrize(
    ("sizes", "within", "says"),
    [({"intermediate_size": 48}, 0, "MLP width 48 on each of 1"), ({"hidden_size": 72}, 0, "hidden size 72"), ({}, 16, "group size 16")],
)  # fmt: skip
def test_widths_without_groups_are_refused_by_name_with_what_is_allowed(
    sizes: dict[str, int], within: int, says: str
) -> None:
    with pytest.raises(UnsupportedError, match=rf"{says}.*128 or 64 or 32.*--precision int8"):
        with_groups(replace(WIDE, **sizes), quant_for("int4"), within=within)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "quant",
    [
        replace(quant_for("int4"), group_size=64, zero_points=True),
        quant_for("int4", compute=DType.BF16),
        replace(quant_for("int8"), group_size=32),
    ],
)
def test_groups_and_zero_points_come_back_from_a_config(quant: QuantSpec) -> None:
    _, found, _ = parse_checkpoint_config(checkpoint_config(WIDE, quant), "c/config.json")
    assert found == quant


def test_the_groups_of_another_writers_awq_are_its_configs() -> None:
    config = checkpoint_config(WIDE, quant_for("int4-awq"))
    config["quantization"]["group_size"] = 64
    assert parse_checkpoint_config(config, "c/config.json")[1].group_size == 64


def test_rank_files_are_numbered() -> None:
    assert [rank_file(r) for r in (0, 11)] == ["rank0.safetensors", "rank11.safetensors"]
