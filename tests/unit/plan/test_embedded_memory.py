from __future__ import annotations

from dataclasses import replace

import pytest

from trtkit.engine.device.eviction import device_piece
from trtkit.engine.eviction import prefill_piece
from trtkit.kv.policy import Budget
from trtkit.plan.ask import LoadPoint, ask
from trtkit.plan.embedded import piece_tokens
from trtkit.plan.memory import MemoryPlan, Placement, memory_lines, plan_memory
from trtkit.plan.names import precision_from
from trtkit.spec.catalog import gpu_spec, model_preset
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.plan import Limits, Parallelism
from trtkit.spec.quant import quant_for
from trtkit.spec.speculation import SpeculationSpec

MIB = 1 << 20


def layout(gpu: str = "h100", kv: str = "full", precision: str = "int8", **limits: int) -> MemoryPlan:
    return plan_memory(placement(gpu, kv, precision, **limits))


def placement(gpu: str = "h100", kv: str = "full", precision: str = "int8", **limits: int) -> Placement:
    return Placement(
        model=model_preset("llama-3-70b"),
        gpu=gpu_spec(gpu),
        quant=quant_for(precision),
        policy=parse_kv_policy(kv),
        parallel=Parallelism(),
        limits=Limits(**{"max_seq_len": 4352, "max_num_tokens": 4096, **limits}),
        target="embedded",
    )


def test_activations_are_the_mlps_widest_moment_and_a_batch_of_logits() -> None:
    # Residual and normed input (2 x 8192), gate, up and their product (3 x 28672), 16 bits, 4096 tokens.
    assert layout(max_batch_size=32).activation_bytes == (2 * 8192 + 3 * 28672) * 4096 * 2 + 32 * 128256 * 4


def test_drawing_tokens_counts_where_steps_are_short() -> None:
    assert layout(max_batch_size=64, max_num_tokens=64).activation_bytes == 64 * 128256 * 48


def test_every_guess_draws_a_token_up_to_64_rows() -> None:
    plain = replace(placement(max_batch_size=8), limits=Limits(max_batch_size=8, max_num_tokens=64))
    guessing = replace(plain, speculation=SpeculationSpec(max_draft_tokens=4))
    more = replace(plain, speculation=SpeculationSpec(max_draft_tokens=9))
    assert [plan_memory(asked).activation_bytes for asked in (plain, guessing, more)] == [
        rows * 128256 * 48 for rows in (8, 40, 64)
    ]
    assert plan_memory(guessing).kv_pool_bytes < plan_memory(plain).kv_pool_bytes


def test_widened_weights_need_room_only_where_weights_are_narrower() -> None:
    assert layout().runtime_bytes - layout(precision="fp8-rowwise").runtime_bytes == 256 * MIB


def test_our_own_engine_leaves_an_h100_more_cache_than_tensorrt_llm_does() -> None:
    ours, theirs = layout(), plan_memory(replace(placement(), target="tensorrt"))
    assert ours.weight_bytes == theirs.weight_bytes
    assert ours.kv_pool_bytes > theirs.kv_pool_bytes


def test_eviction_is_paid_for_by_the_batch_and_out_of_the_pool() -> None:
    full, small, large = layout(), layout(kv="h2o:50%", max_batch_size=16), layout(kv="h2o:50%", max_batch_size=48)
    assert full.eviction_bytes == 0
    assert large.eviction_bytes == 3 * small.eviction_bytes > 0
    assert large.kv_pool_bytes < small.kv_pool_bytes < full.kv_pool_bytes
    assert small.max_sequences >= 1.8 * full.max_sequences


def test_the_whole_is_the_sum_of_its_parts_and_the_lines_name_them() -> None:
    found = layout(kv="h2o:50%")
    parts = found.weight_bytes + found.activation_bytes + found.runtime_bytes + found.eviction_bytes
    assert found.total_bytes == parts + found.kv_pool_bytes <= found.device_bytes
    assert any(line.startswith("eviction") and "modeled" in line for line in memory_lines(found))
    assert not any(line.startswith("eviction") for line in memory_lines(layout()))


@pytest.mark.parametrize("kv", ["full", "h2o:50%"])
def test_on_a_cpu_only_the_peak_of_an_evicted_prompt_is_the_engines_own(kv: str) -> None:
    ours = plan_memory(placement("cpu", kv, max_batch_size=2))
    theirs = plan_memory(replace(placement("cpu", kv, max_batch_size=2), target="tensorrt"))
    assert ours == replace(theirs, peak_bytes=ours.peak_bytes, missing_bytes=ours.missing_bytes)
    assert (ours.peak_bytes < theirs.peak_bytes) == (kv != "full")


def test_a_prompt_holds_its_budget_and_a_piece_here_and_a_whole_step_under_tensorrt_llm() -> None:
    ours = placement(kv="h2o:50%", max_num_tokens=1024)
    blocks = [
        found.peak_bytes // found.block_bytes for found in map(plan_memory, (ours, replace(ours, target="pytorch")))
    ]
    assert blocks == [-(-(2176 + 272) // 32), 3200 // 32]


@pytest.mark.parametrize("budget", [64, 2048, 16384])
def test_pieces_are_planned_as_the_engine_cuts_them(budget: int) -> None:
    limits = Limits(max_num_tokens=1 << 20)
    resolved = Budget(tokens=budget, sinks=4, recent=32, interval=32)
    assert piece_tokens(budget, on_gpu=False) == prefill_piece(resolved, limits)
    assert piece_tokens(budget, on_gpu=True) == device_piece(resolved, limits)


def test_nothing_is_forecast_for_an_engine_that_nobody_measured_on_a_gpu() -> None:
    load = [LoadPoint(isl=512, osl=256, concurrency=1)]
    precision = precision_from("int8")
    (ours,) = ask("ours", placement(), precision, load).loads
    (theirs,) = ask("theirs", replace(placement(), target="tensorrt"), precision, load).loads
    assert ours.forecast is None
    assert "no forecast" in ours.reason
    assert theirs.forecast is not None
    assert ours.floors == theirs.floors
