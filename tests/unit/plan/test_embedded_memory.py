from __future__ import annotations

from dataclasses import replace

import pytest

from trtkit.plan.ask import LoadPoint, ask
from trtkit.plan.memory import MemoryPlan, Placement, memory_lines, plan_memory
from trtkit.plan.names import precision_from
from trtkit.spec.catalog import gpu_spec, model_preset
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.plan import Limits, Parallelism
from trtkit.spec.quant import quant_for

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
def test_a_cpu_engine_is_planned_as_before(kv: str) -> None:
    ours = plan_memory(placement("cpu", kv, max_batch_size=2))
    assert ours == plan_memory(replace(placement("cpu", kv, max_batch_size=2), target="tensorrt"))


def test_nothing_is_forecast_for_an_engine_that_nobody_measured_on_a_gpu() -> None:
    load = [LoadPoint(isl=512, osl=256, concurrency=1)]
    precision = precision_from("int8")
    (ours,) = ask("ours", placement(), precision, load).loads
    (theirs,) = ask("theirs", replace(placement(), target="tensorrt"), precision, load).loads
    assert ours.forecast is None
    assert "no forecast" in ours.reason
    assert theirs.forecast is not None
    assert ours.floors == theirs.floors
