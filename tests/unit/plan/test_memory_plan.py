from dataclasses import replace

import pytest

from trtkit.plan.memory import Placement, activation_bytes, memory_lines, plan_memory, what_would_fit
from trtkit.spec.catalog import gpu_spec, model_preset
from trtkit.spec.checkpoint import checkpoint_tensors
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.plan import Limits, Parallelism
from trtkit.spec.quant import quant_for
from trtkit.spec.speculation import SpeculationSpec


def placement(gpu="h100", precision="int8", tp=1, kv="full", **limits):
    return Placement(
        model=model_preset("llama-3-70b"),
        gpu=gpu_spec(gpu),
        quant=quant_for(precision),
        policy=parse_kv_policy(kv),
        parallel=Parallelism(tp=tp),
        limits=Limits(**{"max_seq_len": 4352, **limits}),
    )


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_weights_equal_the_ranks_checkpoint_to_the_byte(tp):
    found = plan_memory(placement(precision="fp16", gpu="h200", tp=tp))
    listed = checkpoint_tensors(model_preset("llama-3-70b"), quant_for("fp16"), Parallelism(tp=tp))
    assert found.weight_bytes == sum(tensor.num_bytes for tensor in listed)
    assert sum(found.weights.values()) == found.weight_bytes


def test_the_pool_is_whole_blocks_of_this_ranks_heads():
    found = plan_memory(placement(tp=2, precision="fp16", gpu="a100"))
    assert found.block_bytes == 327_680 // 2 * 32
    assert found.kv_pool_bytes == found.kv_blocks * found.block_bytes


def test_a_given_pool_is_what_the_engine_reserves():
    found = plan_memory(placement(kv_memory_bytes=1_000_000_000))
    assert found.kv_blocks == 1_000_000_000 // (327_680 * 32)


def test_the_pool_never_exceeds_what_the_batch_can_use():
    found = plan_memory(placement(gpu="b200", max_batch_size=2, max_seq_len=64))
    assert found.kv_blocks == 2 * 2


def test_fp16_70b_does_not_fit_one_h100_and_says_what_would():
    asked = placement(precision="fp16")
    found = plan_memory(asked, sequence_tokens=768)
    assert not found.fits
    assert found.max_sequences == 0
    fixes = what_would_fit(asked, sequence_tokens=768, gpus=[gpu_spec("b200")])
    assert "--precision int8" in fixes
    assert "--gpu b200" in fixes
    assert "--tp 4" in fixes


def test_a_plan_that_fits_needs_no_advice():
    assert what_would_fit(placement(), sequence_tokens=768) == ()


def test_half_the_cache_admits_almost_twice_the_requests():
    whole = plan_memory(placement(), sequence_tokens=4096).max_sequences
    half = plan_memory(placement(kv="h2o:50%"), sequence_tokens=4096).max_sequences
    assert whole < half <= 2 * whole + 1


def test_a_longer_step_needs_more_activations():
    short = placement(max_num_tokens=2048)
    assert activation_bytes(replace(short, limits=Limits(max_num_tokens=16384))) > 3 * activation_bytes(short)


def test_guesses_need_logits_of_their_own_within_a_step():
    plain = placement(max_num_tokens=100, max_batch_size=30)
    rows = [
        (
            activation_bytes(replace(plain, speculation=SpeculationSpec(max_draft_tokens=drafts)))
            - activation_bytes(plain)
        )
        / (plain.model.vocab_size * 4)
        for drafts in (1, 2, 3)
    ]
    assert rows == [30, 60, 70]


def test_the_lines_say_what_is_exact_and_what_is_modeled():
    text = "\n".join(memory_lines(plan_memory(placement())))
    assert text.count("exact") == 2
    assert text.count("modeled") == 2


def test_a_cpu_has_no_cuda_runtime():
    assert plan_memory(placement(gpu="cpu", precision="fp32")).runtime_bytes == 0


@pytest.mark.parametrize("limits", [{"kv_memory_bytes": 3_000_000}, {"max_batch_size": 3, "max_seq_len": 100}])
def test_the_pool_equals_the_embedded_engines_blocks(limits):
    from support import synthetic_records

    from trtkit.engine.open import pool_blocks

    small = Placement(
        model=synthetic_records.MODEL,
        gpu=gpu_spec("cpu"),
        quant=quant_for("fp32"),
        policy=parse_kv_policy("full"),
        parallel=Parallelism(),
        limits=Limits(tokens_per_block=16, **limits),
    )
    blocks = pool_blocks(small.model, small.limits, small.quant.kv, available_bytes=1 << 32)
    assert plan_memory(small).kv_blocks == blocks
