from dataclasses import replace

import pytest

from trtkit.plan import work
from trtkit.spec.checkpoint import checkpoint_tensors
from trtkit.spec.dtype import DType
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Parallelism
from trtkit.spec.quant import quant_for

LLAMA_70B = ModelSpec(
    name="llama-3-70b",
    architecture="LlamaForCausalLM",
    num_layers=80,
    hidden_size=8192,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=28672,
    vocab_size=128256,
    max_position_embeddings=8192,
)


def test_the_70b_weights_are_exact_in_every_form_the_sources_state():
    # Parameters from the model's hub page; byte counts recomputed by hand from the shapes.
    assert LLAMA_70B.num_params == 70_553_706_496
    assert work.weight_bytes(LLAMA_70B, quant_for("fp16")) == 141_107_412_992
    assert round(work.weight_bytes(LLAMA_70B, quant_for("int8")) / 1e9, 3) == 72.670
    assert 39.4e9 < work.weight_bytes(LLAMA_70B, quant_for("int4-awq")) < 39.9e9


def test_a_decode_step_reads_all_weights_but_the_input_embedding():
    assert round(work.weight_read_bytes(LLAMA_70B, quant_for("fp16")) / 1e9, 3) == 139.006
    assert round(work.weight_read_bytes(LLAMA_70B, quant_for("int8")) / 1e9, 3) == 70.568


def test_decode_step_bytes_add_each_sequences_cache():
    bytes_read = work.decode_step_bytes(LLAMA_70B, quant_for("fp16"), [4096] * 32)
    assert bytes_read - work.weight_read_bytes(LLAMA_70B, quant_for("fp16")) == 32 * 4096 * 327_680


@pytest.mark.parametrize(("tokens", "tflop"), [(512, 70.44), (4096, 582.74)])
def test_prefill_operations_of_70b(tokens, tflop):
    assert work.prefill_flops(LLAMA_70B, tokens) / 1e12 == pytest.approx(tflop, abs=0.01)


@pytest.mark.parametrize(("context", "gflop"), [(512, 140.3), (4096, 149.7)])
def test_decode_operations_of_70b(context, gflop):
    assert work.decode_flops(LLAMA_70B, context) / 1e9 == pytest.approx(gflop, abs=0.06)


def test_a_cached_prefix_leaves_only_the_rest_to_compute():
    whole = work.prefill_flops(LLAMA_70B, 1000)
    first = work.prefill_flops(LLAMA_70B, 600)
    rest = work.prefill_flops(LLAMA_70B, 1000, cached_tokens=600)
    assert first + rest - work.head_flops(LLAMA_70B) == pytest.approx(whole)
    assert work.prefill_flops(LLAMA_70B, 1000, cached_tokens=1000) == work.head_flops(LLAMA_70B)


def test_a_sliding_window_bounds_what_decode_reads():
    windowed = replace(LLAMA_70B, sliding_window=1024)
    fp16 = quant_for("fp16")
    assert work.kv_read_bytes(windowed, fp16, [4096]) == work.kv_read_bytes(LLAMA_70B, fp16, [1024])
    assert work.decode_flops(windowed, 4096) == work.decode_flops(LLAMA_70B, 1024)
    assert work.attention_flops(windowed, 4096) < work.attention_flops(LLAMA_70B, 4096)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("tp", [1, 2])
def test_weight_bytes_equal_the_checkpoint_tensors(precision, tp):
    quant, parallel = quant_for(precision), Parallelism(tp=tp)
    listed = sum(t.num_bytes for t in checkpoint_tensors(LLAMA_70B, quant, parallel))
    assert work.weight_bytes(LLAMA_70B, quant, parallel) == listed


def test_pipeline_ranks_share_the_layers_and_split_embedding_from_head():
    quant, parallel = quant_for("fp16"), Parallelism(pp=2)
    first = work.weight_groups(LLAMA_70B, quant, parallel, pp_rank=0)
    last = work.weight_groups(LLAMA_70B, quant, parallel, pp_rank=1)
    assert "head" not in first
    assert "embedding" not in last
    assert sum(first.values()) + sum(last.values()) == work.weight_bytes(LLAMA_70B, quant)


def test_eight_bit_cache_halves_its_bytes():
    fp16 = quant_for("fp16")
    assert 2 * work.kv_read_bytes(LLAMA_70B, fp16.with_kv(DType.FP8), [100]) == work.kv_read_bytes(
        LLAMA_70B, fp16, [100]
    )


def test_int4_weights_are_counted_with_their_scales() -> None:
    linear = LLAMA_70B.num_layers * LLAMA_70B.linear_params_per_layer
    other = 2 * (LLAMA_70B.num_params - linear)
    assert work.weight_bytes(LLAMA_70B, quant_for("int4")) == linear // 2 + linear // 128 * 2 + other
    read = work.weight_read_bytes(LLAMA_70B, quant_for("int4"))
    assert read == work.weight_bytes(LLAMA_70B, quant_for("int4")) - 2 * LLAMA_70B.vocab_size * LLAMA_70B.hidden_size
