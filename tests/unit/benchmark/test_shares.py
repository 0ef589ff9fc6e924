from __future__ import annotations

from dataclasses import replace

import pytest
from support.fake_engine import tiny_model
from support.samples import repeat, sample

from trtkit.benchmark.metrics import compute_metrics
from trtkit.benchmark.shares import floor, lowered_kv, mean_context, multiply_limit, prefill_floor_s, shares
from trtkit.plan.work import (
    attention_flops,
    decode_flops,
    decode_step_bytes,
    head_flops,
    linear_flops_per_token,
    prefill_flops,
)
from trtkit.spec.dtype import DType
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.limits import READ_BYTES_S, matmul_key
from trtkit.spec.measured import Measured, Source
from trtkit.spec.plan import BuildPlan, Limits
from trtkit.spec.quant import quant_for
from trtkit.spec.result import tokens_per_decode_step, tokens_per_step
from trtkit.spec.speculation import SpeculationSpec
from trtkit.spec.workload import Workload

LOAD = Workload(isl=4, osl=4, num_requests=3, concurrency=1)
PLAN = BuildPlan(name="p", model=tiny_model(), model_source="x", gpu="cpu", quant=quant_for("fp32"))


def limits(read: float = 1e9, multiply: float = 1e9) -> dict[str, Measured]:
    return {
        READ_BYTES_S: Measured(value=read, unit="B/s", source=Source.MEASURED),
        matmul_key(DType.FP32): Measured(value=multiply, unit="FLOP/s", source=Source.MEASURED),
    }


def test_shares_are_counted_work_over_measured_rate_over_measured_time() -> None:
    metrics = compute_metrics([repeat(sample())], LOAD)
    found = shares(PLAN, LOAD, metrics, limits(multiply=1e12))
    step_s = decode_step_bytes(PLAN.model, PLAN.quant, [5.5]) / 1e9
    prefill_s = prefill_flops(PLAN.model, 4) / 1e12
    assert found["ttft_ms"].value == pytest.approx(prefill_s / 10e-3)
    assert found["tpot_ms"].value == pytest.approx(step_s / 2e-3)
    assert found["tps"].value == pytest.approx((prefill_s + 3 * step_s) / 16e-3)
    assert {share.source for share in found.values()} == {Source.MODELED}


def test_a_step_is_bound_by_the_slower_of_reading_and_multiplying() -> None:
    reading = floor(PLAN, LOAD, limits(multiply=1e15), 8)
    multiplying = floor(PLAN, LOAD, limits(read=1e15), 8)
    assert reading.step_s == pytest.approx(decode_step_bytes(PLAN.model, PLAN.quant, [5.5] * 8) / 1e9)
    assert multiplying.step_s == pytest.approx(8 * decode_flops(PLAN.model, 5.5) / 1e9)


def test_running_at_the_floor_is_a_share_of_one() -> None:
    rates = limits(multiply=1e15)
    step_ms = floor(PLAN, LOAD, rates, 1).step_s * 1e3
    run = repeat(sample(ttft_ms=1, gaps_ms=(step_ms,) * 3))
    assert shares(PLAN, LOAD, compute_metrics([run], LOAD), rates)["tpot_ms"].value == pytest.approx(1, rel=1e-3)


def test_the_batch_is_what_the_engine_really_ran() -> None:
    load = replace(LOAD, concurrency=64)
    metrics = compute_metrics([repeat(sample())], load)
    plan = replace(PLAN, limits=Limits(max_batch_size=16))

    def tpot(**peak: int) -> float:
        return shares(plan, load, metrics, limits(), **peak)["tpot_ms"].value

    assert tpot() == pytest.approx(floor(plan, load, limits(), 16).step_s * 1e3 / 2)
    assert tpot(requests_peak=3) == pytest.approx(floor(plan, load, limits(), 3).step_s * 1e3 / 2)


def test_an_evicting_policy_reads_at_most_its_budget() -> None:
    load = Workload(isl=100, osl=21, num_requests=1)

    def kept(policy: str) -> float:
        limits = Limits(max_seq_len=160, tokens_per_block=16)
        return mean_context(replace(PLAN, kv=parse_kv_policy(policy), limits=limits), load)

    assert [kept(policy) for policy in ("full", "h2o:32", "h2o:400", "h2o:50%")] == [110, 32, 110, 60]


def test_an_open_loop_has_no_known_step() -> None:
    load = replace(LOAD, concurrency=None, request_rate=5.0)
    assert "tpot_ms" not in shares(PLAN, load, compute_metrics([repeat(sample())], load), limits())


@pytest.mark.parametrize("missing", [READ_BYTES_S, matmul_key(DType.FP32)])
def test_without_a_measured_rate_there_is_no_share(missing: str) -> None:
    rates = {key: value for key, value in limits().items() if key != missing}
    assert shares(PLAN, LOAD, compute_metrics([repeat(sample())], LOAD), rates) == {}


def test_below_32_bits_the_fastest_measured_type_bounds_the_products() -> None:
    rates = {
        matmul_key(dtype): Measured(value=value, unit="FLOP/s", source=Source.MEASURED)
        for dtype, value in ((DType.FP32, 5.0), (DType.BF16, 9.0), (DType.FP16, 1.0))
    }
    assert multiply_limit(PLAN, rates).value == 5
    for precision in ("fp16", "int8"):
        assert multiply_limit(replace(PLAN, quant=quant_for(precision)), rates).value == 9
    assert multiply_limit(PLAN, {}) is None


def test_products_of_8_bit_floats_on_a_gpu_are_bound_by_their_own_rate_or_by_nothing_known() -> None:
    rate = Measured(value=9.0, unit="FLOP/s", source=Source.MEASURED)
    fp8 = replace(PLAN, gpu="h100-sxm", quant=quant_for("fp8-rowwise"))
    assert multiply_limit(fp8, {matmul_key(DType.BF16): rate}) is None
    both = {matmul_key(DType.BF16): rate, matmul_key(DType.FP8): replace(rate, value=17.0)}
    assert multiply_limit(fp8, both).value == 17
    assert multiply_limit(replace(fp8, quant=quant_for("int8")), both).value == 9
    assert multiply_limit(replace(fp8, gpu="cpu"), both).value == 9


def test_only_the_block_matrices_of_our_fp8_engine_run_at_the_rate_of_8_bits() -> None:
    sixteen, eight = (Measured(value=value, unit="FLOP/s", source=Source.MEASURED) for value in (1e12, 2e12))
    rates = limits(read=1e15) | {matmul_key(DType.BF16): sixteen, matmul_key(DType.FP8): eight}
    plan = replace(PLAN, gpu="h100-sxm", quant=quant_for("fp8-rowwise"))
    model = plan.model
    blocks = LOAD.isl * linear_flops_per_token(model)
    rest = attention_flops(model, LOAD.isl) + head_flops(model)
    least = floor(plan, LOAD, rates, 8)
    assert least.prefill_s == pytest.approx(blocks / 2e12 + rest / 1e12)
    token = linear_flops_per_token(model)
    assert least.step_s == pytest.approx(8 * (token / 2e12 + (decode_flops(model, 5.5) - token) / 1e12))
    elsewhere = replace(plan, target="pytorch")
    assert floor(elsewhere, LOAD, rates, 8).prefill_s == pytest.approx(prefill_flops(model, LOAD.isl) / 2e12)
    alone = {key: rate for key, rate in rates.items() if key != matmul_key(DType.BF16)}
    del alone[matmul_key(DType.FP32)]
    assert floor(plan, LOAD, alone, 8).prefill_s == pytest.approx(prefill_flops(model, LOAD.isl) / 2e12)


def test_cached_tokens_of_a_prompt_are_not_computed_again() -> None:
    rates = limits()
    assert prefill_floor_s(PLAN, rates, 4) == pytest.approx(prefill_flops(PLAN.model, 4) / 1e9)
    assert prefill_floor_s(PLAN, rates, 4, cached_tokens=3) == pytest.approx(
        prefill_flops(PLAN.model, 4, cached_tokens=3) / 1e9
    )
    assert prefill_floor_s(PLAN, {}, 4) is None


def test_a_share_of_the_cache_is_taken_of_each_requests_context_as_the_engine_does() -> None:
    plan = replace(PLAN, limits=Limits(max_seq_len=160, tokens_per_block=16))
    load = Workload(isl=100, osl=20, num_requests=1)
    half = replace(plan, kv=parse_kv_policy("h2o:50%"))
    assert (lowered_kv(half, load).budget, lowered_kv(half, load).interval) == (60, 16)
    assert lowered_kv(half, replace(load, isl=0)).budget == 80
    assert lowered_kv(replace(plan, kv=parse_kv_policy("h2o:8,interval=4")), load).interval == 4
    assert lowered_kv(plan, load).is_full


REUSING = replace(PLAN, limits=Limits(enable_block_reuse=True, tokens_per_block=4))


def test_what_block_reuse_may_skip_counts_for_nothing_and_is_read_once() -> None:
    load = replace(LOAD, isl=20, shared_prefix_tokens=18)
    plain, reusing = floor(PLAN, load, limits(), 3), floor(REUSING, load, limits(), 3)
    assert plain.prefill_s == pytest.approx(prefill_flops(PLAN.model, 20) / 1e9)
    assert reusing.prefill_s == pytest.approx(prefill_flops(PLAN.model, 20, cached_tokens=16) / 1e9)
    reading = floor(REUSING, load, limits(multiply=1e15), 3)
    assert reading.step_s == pytest.approx(decode_step_bytes(PLAN.model, PLAN.quant, [21.5, 5.5, 5.5]) / 1e9)


def test_block_reuse_skips_nothing_of_prompts_that_share_nothing() -> None:
    assert floor(REUSING, LOAD, limits(), 3) == floor(PLAN, LOAD, limits(), 3)


def test_guesses_that_were_right_save_reading_but_no_multiplying() -> None:
    assert floor(PLAN, LOAD, limits(multiply=1e15), 8, per_step=2.0).step_s == pytest.approx(
        floor(PLAN, LOAD, limits(multiply=1e15), 8).step_s / 2
    )
    slow = limits(read=1e15)
    assert floor(PLAN, LOAD, slow, 8, per_step=2.0) == floor(PLAN, LOAD, slow, 8)


def test_with_speculation_tps_is_held_against_what_was_accepted_and_tpot_against_nothing() -> None:
    guessing = replace(PLAN, speculation=SpeculationSpec(max_draft_tokens=4))
    metrics = compute_metrics([repeat(sample())], LOAD)
    plain = shares(PLAN, LOAD, metrics, limits(multiply=1e15))
    guessed = shares(guessing, LOAD, metrics, limits(multiply=1e15), per_step=1.5)
    assert set(guessed) == set(plain) - {"tpot_ms"}
    assert guessed["tps"].value == pytest.approx(plain["tps"].value / 1.5, rel=1e-3)
    assert set(shares(guessing, LOAD, metrics, limits(), per_step=None)) == {"ttft_ms"}


def test_guessing_at_the_floor_is_a_share_of_one_though_the_prompts_step_guesses_nothing() -> None:
    """Sixteen tokens: one from the prompt, fifteen from three steps that were right four times each."""
    load, rates = replace(LOAD, osl=16), limits(multiply=1e15)
    step_ms = floor(PLAN, load, rates, 1).step_s * 1e3
    run = repeat(sample(ttft_ms=1e-6, gaps_ms=(step_ms, 0, 0, 0, 0) * 3), accepted_tokens=12)
    assert tokens_per_decode_step([run]) == 5
    guessing = replace(PLAN, speculation=SpeculationSpec(max_draft_tokens=4))
    found = shares(guessing, load, compute_metrics([run], load), rates, per_step=tokens_per_decode_step([run]))
    assert found["tps"].value == pytest.approx(1, rel=1e-3)


def test_our_engines_floor_reads_what_it_holds_and_not_what_the_checkpoint_stores() -> None:
    """GPTQ stores a zero point beside each scale; a symmetric one is not kept."""
    quant = replace(quant_for("int8-gptq"), group_size=32)
    ours = replace(PLAN, quant=quant)
    held = decode_step_bytes(PLAN.model, quant.embedded, [5.5])
    assert held < decode_step_bytes(PLAN.model, quant, [5.5])
    assert floor(ours, LOAD, limits(multiply=1e15), 1).step_s == pytest.approx(held / 1e9)


def test_counts_that_no_step_could_give_do_not_lower_the_floor() -> None:
    guessing = replace(PLAN, speculation=SpeculationSpec(max_draft_tokens=1))
    metrics = compute_metrics([repeat(sample())], LOAD)
    rates = limits(multiply=1e15)
    two = shares(guessing, LOAD, metrics, rates, per_step=2.0)["tps"]
    assert shares(guessing, LOAD, metrics, rates, per_step=50.0)["tps"] == two
    assert shares(PLAN, LOAD, metrics, rates, per_step=50.0)["tps"] == shares(PLAN, LOAD, metrics, rates)["tps"]


@pytest.mark.parametrize(
    ("accepted", "tokens"), [([0, 0], 1.0), ([2, 2], 2.0), ([1, 2], 8 / 5), ([0, None], None), ([8, 0], 1.0)]
)
def test_tokens_a_step_are_counted_over_all_repeats(accepted: list[int | None], tokens: float | None) -> None:
    repeats = [repeat(sample(), accepted_tokens=count) for count in accepted]
    assert tokens_per_step(repeats) == tokens
