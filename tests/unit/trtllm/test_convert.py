"""Conversion: the split, the types, refusals, and what a kill leaves behind."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_checkpoints import shard, write_model

from trtkit.spec.checkpoint import checkpoint_tensors
from trtkit.spec.checkpoint_config import read_checkpoint_config
from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError, OutputError, UnsupportedError, UsageError
from trtkit.spec.hf import load_model_spec
from trtkit.spec.plan import Parallelism
from trtkit.spec.quant import quant_for
from trtkit.trtllm import convert as convert_module
from trtkit.trtllm.convert import convert, stored_quant
from trtkit.trtllm.piece import PieceWorker

FP32, BF16, FP16, INT8 = (quant_for(name) for name in ("fp32", "bf16", "fp16", "int8"))
LAYER = "transformer.layers.1."
HF_LAYER = "model.layers.1."


def ranks(directory: Path, count: int) -> list[dict[str, torch.Tensor]]:
    return [load_file(directory / f"rank{rank}.safetensors") for rank in range(count)]


def test_every_tensor_is_where_the_layout_says(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "out", quant=BF16)
    (rank,) = ranks(tmp_path / "out", 1)
    attention = [source[f"{HF_LAYER}self_attn.{p}_proj.weight"] for p in "qkv"]
    assert torch.equal(rank[f"{LAYER}attention.qkv.weight"], torch.cat(attention))
    assert torch.equal(rank[f"{LAYER}attention.dense.weight"], source[f"{HF_LAYER}self_attn.o_proj.weight"])
    assert torch.equal(rank[f"{LAYER}mlp.fc.weight"], source[f"{HF_LAYER}mlp.gate_proj.weight"])
    assert torch.equal(rank[f"{LAYER}mlp.gate.weight"], source[f"{HF_LAYER}mlp.up_proj.weight"])
    assert torch.equal(rank[f"{LAYER}mlp.proj.weight"], source[f"{HF_LAYER}mlp.down_proj.weight"])
    assert torch.equal(rank["transformer.vocab_embedding.weight"], source["model.embed_tokens.weight"])
    assert torch.equal(rank["lm_head.weight"], source["lm_head.weight"])


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("quant", [FP16, INT8], ids=["fp16", "int8"])
def test_files_hold_exactly_the_planned_tensors(tmp_path: Path, tp: int, quant: object) -> None:
    write_model(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "out", quant=quant, parallel=Parallelism(tp=tp))  # type: ignore[arg-type]
    planned = {
        t.name: (t.shape, t.dtype.trtllm_name)
        for t in checkpoint_tensors(load_model_spec(tmp_path / "m"), quant, Parallelism(tp=tp))  # type: ignore[arg-type]
    }
    for rank in ranks(tmp_path / "out", tp):
        assert {n: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in rank.items()} == planned


def test_more_ranks_than_kv_heads_replicate_each_head(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "out", quant=BF16, parallel=Parallelism(tp=4))
    key = source[f"{HF_LAYER}self_attn.k_proj.weight"].view(2, 8, 32)
    for index, rank in enumerate(ranks(tmp_path / "out", 4)):
        assert torch.equal(rank[f"{LAYER}attention.qkv.weight"][8:16], key[index // 2])


def test_a_vocabulary_that_does_not_divide_is_padded_with_zeros(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", vocab_size=69)
    convert(tmp_path / "m", tmp_path / "out", quant=BF16, parallel=Parallelism(tp=2))
    merged = torch.cat([rank["lm_head.weight"] for rank in ranks(tmp_path / "out", 2)])
    assert torch.equal(merged[:69], source["lm_head.weight"])
    assert torch.equal(merged[69:], torch.zeros(1, 32, dtype=torch.bfloat16))


def test_pipeline_ranks_hold_their_layers_counted_from_zero(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "out", quant=BF16, parallel=Parallelism(pp=2))
    first, last = ranks(tmp_path / "out", 2)
    name = "transformer.layers.0.attention.dense.weight"
    assert torch.equal(first[name], source["model.layers.0.self_attn.o_proj.weight"])
    assert torch.equal(last[name], source["model.layers.1.self_attn.o_proj.weight"])
    assert ("lm_head.weight" in first, "lm_head.weight" in last) == (False, True)
    assert ("transformer.vocab_embedding.weight" in first, "transformer.vocab_embedding.weight" in last) == (
        True,
        False,
    )


def test_tied_embeddings_are_written_as_head_too(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", tie_word_embeddings=True)
    convert(tmp_path / "m", tmp_path / "out", quant=BF16)
    (rank,) = ranks(tmp_path / "out", 1)
    assert torch.equal(rank["lm_head.weight"], source["model.embed_tokens.weight"])


def test_biases_follow_their_matrices(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", attention_bias=True, mlp_bias=True)
    convert(tmp_path / "m", tmp_path / "out", quant=INT8, parallel=Parallelism(tp=2))
    first, second = ranks(tmp_path / "out", 2)
    q, k, v = (source[f"{HF_LAYER}self_attn.{p}_proj.bias"].half() for p in "qkv")
    assert torch.equal(second[f"{LAYER}attention.qkv.bias"], torch.cat([q[16:], k[8:], v[8:]]))
    for rank in (first, second):
        assert torch.equal(rank[f"{LAYER}attention.dense.bias"], source[f"{HF_LAYER}self_attn.o_proj.bias"].half())
    assert torch.equal(first[f"{LAYER}mlp.fc.bias"], source[f"{HF_LAYER}mlp.gate_proj.bias"][:24].half())


def test_qk_norms_are_replicated(tmp_path: Path) -> None:
    changes = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 16, "rope_scaling": None}
    source = write_model(tmp_path / "m", **changes)
    convert(tmp_path / "m", tmp_path / "out", quant=BF16, parallel=Parallelism(tp=2))
    for rank in ranks(tmp_path / "out", 2):
        assert torch.equal(rank[f"{LAYER}attention.k_layernorm.weight"], source[f"{HF_LAYER}self_attn.k_norm.weight"])


@pytest.mark.parametrize("source_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quant", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
def test_casts_equal_torchs_to_the_bit(tmp_path: Path, source_dtype: torch.dtype, quant: object) -> None:
    source = write_model(tmp_path / "m", dtype=source_dtype)
    convert(tmp_path / "m", tmp_path / "out", quant=quant)  # type: ignore[arg-type]
    (rank,) = ranks(tmp_path / "out", 1)
    expected = source["model.embed_tokens.weight"].to(rank["lm_head.weight"].dtype)
    assert torch.equal(rank["transformer.vocab_embedding.weight"], expected)


def test_int8_rows_are_within_half_a_step_of_the_source(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m", dtype=torch.float32)
    convert(tmp_path / "m", tmp_path / "out", quant=quant_for("int8", compute=DType.FP32))
    (rank,) = ranks(tmp_path / "out", 1)
    scale = rank[f"{LAYER}mlp.proj.per_channel_scale"]
    difference = rank[f"{LAYER}mlp.proj.weight"] * scale[:, None] - source[f"{HF_LAYER}mlp.down_proj.weight"]
    assert (difference.abs() <= scale[:, None] * 0.5001).all()
    assert rank[f"{LAYER}mlp.proj.weight"].abs().amax() == 127


def test_int8_does_not_depend_on_the_split(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "one", quant=INT8)
    convert(tmp_path / "m", tmp_path / "two", quant=INT8, parallel=Parallelism(tp=2))
    (whole,) = ranks(tmp_path / "one", 1)
    first, second = ranks(tmp_path / "two", 2)
    name = f"{LAYER}mlp.proj.weight"
    assert torch.equal(torch.cat([first[name], second[name]], dim=1), whole[name])


def test_for_tensorrt_int8_stays_16_bit_and_names_the_scheme(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "out", quant=INT8, target="tensorrt")
    (rank,) = ranks(tmp_path / "out", 1)
    assert {str(t.dtype) for t in rank.values()} == {"torch.float16"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"]["quant_algo"] == "W8A16"


def test_the_config_gives_back_the_model_with_its_rope(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "out", quant=INT8, parallel=Parallelism(tp=2))
    assert read_checkpoint_config(tmp_path / "out") == (load_model_spec(tmp_path / "m"), INT8, Parallelism(tp=2))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["rotary_base"], config["rotary_scaling"]["factor"]) == (500000.0, 8.0)


def test_shards_give_the_same_bytes_as_one_file(tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "one", quant=FP16)
    shard(tmp_path / "m", tensors)
    convert(tmp_path / "m", tmp_path / "many", quant=FP16)
    assert (tmp_path / "one" / "rank0.safetensors").read_bytes() == (
        tmp_path / "many" / "rank0.safetensors"
    ).read_bytes()


def test_small_pieces_give_the_same_bytes_as_large_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "m", vocab_size=69)
    convert(tmp_path / "m", tmp_path / "large", quant=INT8, parallel=Parallelism(tp=2))
    monkeypatch.setattr(convert_module, "PIECE_BYTES", 200)
    small = convert(tmp_path / "m", tmp_path / "small", quant=INT8, parallel=Parallelism(tp=2))
    assert small.pieces > 100
    for rank in (0, 1):
        name = f"rank{rank}.safetensors"
        assert (tmp_path / "large" / name).read_bytes() == (tmp_path / "small" / name).read_bytes()


def refuse(directory: Path, error: type[Exception], *words: str, **options: object) -> None:
    """Conversion is refused with these words in one line, and leaves nothing under the final name."""
    output = directory.parent / "refused"
    with pytest.raises(error) as caught:
        convert(directory, output, **{"quant": FP16, **options})  # type: ignore[arg-type]
    assert [word for word in words if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)
    assert not output.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float, precision: str) -> None:
    tensors = write_model(tmp_path / "m")
    tensors[f"{HF_LAYER}mlp.up_proj.weight"][5, 3] = value
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    refuse(tmp_path / "m", InputError, "model.layers.1.mlp.up_proj.weight", "row 5", quant=quant_for(precision))


def test_fp16_overflow_is_refused_by_name_and_value(tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "m")
    tensors["model.norm.weight"][7] = 70144.0
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    refuse(tmp_path / "m", InputError, "model.norm.weight", "row 7", "70144", "bf16")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    names = shard(tmp_path / "m", write_model(tmp_path / "m"))
    (tmp_path / "m" / names[1]).unlink()
    refuse(tmp_path / "m", InputError, names[1], "1 of 3")


def test_a_truncated_file_is_named_with_its_tensor(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refuse(tmp_path / "m", InputError, "model.safetensors", "truncated", "tensor")


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "m")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    refuse(tmp_path / "m", InputError, "model.norm.weight", "missing")


def test_an_unknown_tensor_is_named_and_inv_freq_is_not_one(tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "m")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    convert(tmp_path / "m", tmp_path / "fine", quant=FP16)
    tensors["model.layers.0.mystery.weight"] = torch.ones(4)
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    refuse(tmp_path / "m", InputError, "model.layers.0.mystery.weight")


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "m")
    tensors["model.norm.weight"] = torch.ones(31, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    refuse(tmp_path / "m", InputError, "model.norm.weight", "[31]", "[32]")


def test_quantised_and_pickled_sources_are_unsupported(tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "m")
    tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int8)
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    refuse(tmp_path / "m", UnsupportedError, "model.norm.weight", "I8")
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "m" / "pytorch_model.bin")
    refuse(tmp_path / "m", UnsupportedError, "safe_serialization")


@pytest.mark.parametrize(("parallel", "word"), [(Parallelism(tp=3), "tp=3"), (Parallelism(pp=3), "pp=3")])
def test_an_uneven_split_is_refused(tmp_path: Path, parallel: Parallelism, word: str) -> None:
    write_model(tmp_path / "m")
    refuse(tmp_path / "m", UsageError, word, parallel=parallel)


@pytest.mark.parametrize("target", ["pytorch", "onnx"])
def test_targets_without_such_a_checkpoint_are_refused(target: str) -> None:
    with pytest.raises((UnsupportedError, UsageError), match=target):
        stored_quant(FP16, target)


def test_schemes_that_need_calibration_are_unsupported() -> None:
    with pytest.raises(UnsupportedError, match="calibration"):
        stored_quant(quant_for("fp8"), "tensorrt")


def test_an_existing_output_is_kept_without_force_and_replaced_with_it(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "out", quant=FP16)
    before = (tmp_path / "out" / "rank0.safetensors").read_bytes()
    with pytest.raises(OutputError, match="--force"):
        convert(tmp_path / "m", tmp_path / "out", quant=BF16)
    assert (tmp_path / "out" / "rank0.safetensors").read_bytes() == before
    convert(tmp_path / "m", tmp_path / "out", quant=BF16, force=True)
    assert (tmp_path / "out" / "rank0.safetensors").read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "out"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "rank0.safetensors"]


def test_a_failed_replacement_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    tensors = write_model(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "out", quant=FP16)
    before = (tmp_path / "out" / "rank0.safetensors").read_bytes()
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(InputError):
        convert(tmp_path / "m", tmp_path / "out", quant=FP16, force=True)
    assert (tmp_path / "out" / "rank0.safetensors").read_bytes() == before


def test_force_never_replaces_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="remove it yourself"):
        convert(tmp_path / "m", tmp_path / "home", quant=FP16, force=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


class StoppedError(Exception):
    """Stands for a kill after some pieces."""


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> list[str]:
    """Let `PieceWorker.move` fail once `count` pieces are done; the list records what was moved."""
    moved: list[str] = []
    real, mutex = PieceWorker.move, threading.Lock()

    def move(self: PieceWorker, piece: object) -> None:
        with mutex:
            if len(moved) >= count:
                raise StoppedError
            moved.append(piece.source)  # type: ignore[attr-defined]
        real(self, piece)  # type: ignore[arg-type]

    monkeypatch.setattr(PieceWorker, "move", move)
    return moved


def test_an_interrupted_conversion_continues_without_redoing_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "m")
    whole = convert(tmp_path / "m", tmp_path / "whole", quant=INT8)
    with monkeypatch.context() as patch:
        stop_after(patch, 10)
        with pytest.raises(StoppedError):
            convert(tmp_path / "m", tmp_path / "out", quant=INT8)
    assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        moved = stop_after(patch, 10**6)
        result = convert(tmp_path / "m", tmp_path / "out", quant=INT8)
    assert (result.resumed_pieces, len(moved)) == (10, whole.pieces - 10)
    assert (tmp_path / "out" / "rank0.safetensors").read_bytes() == (
        tmp_path / "whole" / "rank0.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("change", ["precision", "source", "lost file"])
def test_pieces_of_another_plan_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    write_model(tmp_path / "m")
    with monkeypatch.context() as patch:
        stop_after(patch, 10)
        with pytest.raises(StoppedError):
            convert(tmp_path / "m", tmp_path / "out", quant=FP16)
    if change == "source":
        write_model(tmp_path / "m", dtype=torch.float32)
    if change == "lost file":
        (tmp_path / "out.partial" / "rank0.safetensors").unlink()
    quant = BF16 if change == "precision" else FP16
    assert convert(tmp_path / "m", tmp_path / "out", quant=quant).resumed_pieces == 0
    convert(tmp_path / "m", tmp_path / "fresh", quant=quant)
    assert (tmp_path / "out" / "rank0.safetensors").read_bytes() == (
        tmp_path / "fresh" / "rank0.safetensors"
    ).read_bytes()


def test_a_full_disk_is_one_line_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = dataclasses.make_dataclass("Usage", ["free"])
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(free=1000))
    write_model(tmp_path / "m")
    refuse(tmp_path / "m", OutputError, "GiB free")


def test_a_disk_that_fills_midway_is_one_line_though_the_kernel_tells_it_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if threading.current_thread() is not threading.main_thread() and not told:
            told.append(descriptor)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr("os.fsync", fsync)
    monkeypatch.setattr("trtkit.trtllm.piece.FLUSH_BYTES", 1)
    write_model(tmp_path / "m")
    refuse(tmp_path / "m", OutputError, "the disk is full")
    assert told
    monkeypatch.undo()
    assert convert(tmp_path / "m", tmp_path / "refused", quant=FP16).resumed_pieces == 0
