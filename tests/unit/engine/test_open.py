"""Opening: limits as they take effect, the size of the pool, overrides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import write_bundle, write_checkpoint
from support.engine_models import hf_greedy, limits, make_hf, quantised, spec_of, trtllm_tensors

from trtkit.engine.open import effective_limits, open_checkpoint, open_embedded, open_tensors, pool_blocks
from trtkit.engine.paged_cache import block_bytes
from trtkit.spec.dtype import DType
from trtkit.spec.engine import FinishReason, Request
from trtkit.spec.errors import CapacityError, MissingDependencyError, UnsupportedError, UsageError
from trtkit.spec.kv import KVPolicySpec
from trtkit.spec.plan import Parallelism
from trtkit.spec.quant import quant_for

SPEC = spec_of(make_hf())


def test_max_seq_len_is_bounded_by_the_models_positions_and_its_sliding_window() -> None:
    assert effective_limits(SPEC, limits(max_seq_len=128)).max_seq_len == 128
    assert effective_limits(SPEC, limits(max_seq_len=9999)).max_seq_len == 256
    assert effective_limits(replace(SPEC, sliding_window=40), limits(max_seq_len=128)).max_seq_len == 40


def test_the_pool_is_what_the_memory_holds() -> None:
    size = block_bytes(SPEC, 4, DType.FP32)
    assert pool_blocks(SPEC, limits(kv_memory_bytes=10 * size + 1), DType.FP32, 0) == 10
    assert pool_blocks(SPEC, limits(kv_memory_bytes=10 * size), DType.FP16, 0) == 20


def test_a_share_of_free_memory_is_never_more_than_the_batch_can_use() -> None:
    size = block_bytes(SPEC, 4, DType.FP32)
    assert pool_blocks(SPEC, limits(kv_fraction=0.5), DType.FP32, 20 * size) == 10
    assert pool_blocks(SPEC, limits(), DType.FP32, 1 << 50) == 8 * 128 // 4


def test_memory_for_less_than_a_block_is_refused() -> None:
    with pytest.raises(CapacityError, match="holds no block"):
        pool_blocks(SPEC, limits(kv_memory_bytes=100), DType.FP32, 0)


def test_a_request_past_the_sliding_window_is_refused() -> None:
    hf = make_hf("Mistral", sliding_window=16)
    with open_tensors(spec_of(hf), trtllm_tensors(hf), limits=limits()) as engine:
        request = Request(request_id="a", prompt_ids=(5,) * 16, max_tokens=1)
        (event,) = engine.generate([request])
    assert event.finish is FinishReason.ERROR
    assert "max_seq_len is 16" in (event.error or "")


def test_a_cache_type_the_engine_does_not_store_is_refused(tmp_path: Path) -> None:
    hf = make_hf()
    quant = quant_for("fp32").with_kv(DType.INT8)
    directory = write_checkpoint(tmp_path / "c", spec_of(hf), trtllm_tensors(hf), quant)
    with pytest.raises(UnsupportedError, match="KV cache type int8"):
        open_checkpoint(directory, limits=limits())


def test_a_narrower_cache_type_runs(tmp_path: Path) -> None:
    hf = make_hf()
    quant = quant_for("fp32").with_kv(DType.FP16)
    directory = write_checkpoint(tmp_path / "c", spec_of(hf), trtllm_tensors(hf), quant)
    with open_checkpoint(directory, limits=limits(max_num_tokens=5)) as engine:
        assert engine.kv_stats().block_bytes == block_bytes(SPEC, 4, DType.FP16)
        request = Request(request_id="a", prompt_ids=(5, 6, 7, 8, 9, 10), max_tokens=6, ignore_eos=True)
        assert len(list(engine.generate([request]))) == 6


def test_a_device_that_is_not_there_is_said() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(MissingDependencyError, match="no CUDA device"):
        open_tensors(SPEC, {}, device="cuda")


@pytest.mark.parametrize("tp", [1, 2])
def test_an_int8_checkpoint_generates_what_its_dequantised_twin_does(tmp_path: Path, tp: int) -> None:
    hf = make_hf()
    tensors = quantised(trtllm_tensors(hf))
    wide = {}
    for name, tensor in tensors.items():
        scale = tensors.get(name.removesuffix("weight") + "per_channel_scale")
        if "per_channel_scale" not in name:
            wide[name] = tensor if scale is None else tensor.float() * scale[:, None]
    request = Request(request_id="a", prompt_ids=(5, 6, 7), max_tokens=12, ignore_eos=True)
    directory = write_checkpoint(
        tmp_path / "c", SPEC, tensors, quant_for("int8", compute=DType.FP32), Parallelism(tp=tp)
    )
    with open_checkpoint(directory, limits=limits()) as narrow:
        ours = [e.token_id for e in narrow.generate([request])]
    with open_tensors(SPEC, wide, limits=limits()) as plain:
        assert ours == [e.token_id for e in plain.generate([request])]


def test_overrides_replace_the_plans_values(tmp_path: Path) -> None:
    hf = make_hf()
    bundle = write_bundle(tmp_path / "a.engine", SPEC, trtllm_tensors(hf))
    with open_embedded(bundle, max_batch_size=2, max_seq_len=None, kv="window:8", dtype="bf16") as engine:
        info = engine.info
    assert (info.max_batch_size, info.max_seq_len) == (2, 64)
    assert info.kv_policy == KVPolicySpec(kind="window", budget=8)
    assert info.weight_bytes == SPEC.num_params * 2


def test_an_override_that_does_not_exist_is_refused_with_the_ones_that_do(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "a.engine", SPEC, trtllm_tensors(make_hf()))
    with pytest.raises(UsageError, match="no limit is called max_batch; there are max_batch_size"):
        open_embedded(bundle, max_batch=2)


def test_a_bundle_gives_the_models_tokens(tmp_path: Path) -> None:
    hf = make_hf()
    bundle = write_bundle(tmp_path / "a.engine", SPEC, trtllm_tensors(hf))
    request = Request(request_id="a", prompt_ids=(5, 6, 7), max_tokens=6, ignore_eos=True)
    with open_embedded(bundle) as engine:
        assert [e.token_id for e in engine.generate([request])] == hf_greedy(hf, (5, 6, 7), 6)
