import math
from dataclasses import replace

import pytest

from trtkit.plan.calibration import load_calibration
from trtkit.plan.forecast import answer, answers
from trtkit.plan.names import precision_from
from trtkit.plan.rows import SERVED, VLLM
from trtkit.plan.scenario import Scenario
from trtkit.spec.catalog import gpu_spec, model_preset
from trtkit.spec.measured import Source


def scenario(gpu="h100", precision="fp8", tp=2, isl=1000, osl=1000, **more):
    return Scenario(
        model=model_preset("llama-3.1-70b"),
        gpu=gpu_spec(gpu),
        precision=precision_from(precision),
        isl=isl,
        osl=osl,
        tp=tp,
        **more,
    )


@pytest.mark.parametrize(
    ("load", "tok_s"),
    # TensorRT-LLM 0.17's published maximum load, Llama 3.1 70B.
    [
        ({"isl": 128, "osl": 128}, 6645),
        ({"isl": 500, "osl": 2000}, 4973),
        ({"isl": 1000, "osl": 1000}, 4391),
        ({"isl": 5000, "osl": 500}, 920),
        ({"gpu": "a100", "precision": "fp16", "tp": 4, "isl": 1000, "osl": 1000}, 1922),
        ({"gpu": "h200", "tp": 1, "isl": 1000, "osl": 1000}, 2823),
    ],
)
def test_published_throughput_is_forecast_within_a_tenth(load, tok_s):
    found = answer(scenario(version="0.17", **load)).forecast
    assert found.tok_s.value == pytest.approx(tok_s, rel=0.10)


def test_published_latencies_are_forecast():
    served = scenario(tp=2, isl=1024, osl=1024, concurrency=4, stack=VLLM)
    assert answer(served).forecast.tpot_ms.value == pytest.approx(17.4, rel=0.08)
    h200 = scenario(gpu="h200", tp=1, isl=1024, osl=8192, concurrency=4, stack=SERVED)
    assert answer(h200).forecast.tpot_ms.value == pytest.approx(20.8, rel=0.08)


def test_a_forecast_is_modeled_and_carries_a_band_around_it():
    found = answer(scenario(concurrency=8)).forecast
    for number in (found.ttft_ms, found.tpot_ms, found.tok_s, found.e2e_ms):
        assert number.source is Source.MODELED
        assert number.low < number.value < number.high


def test_constants_from_kernels_alone_have_a_wider_band():
    fitted = answer(scenario(concurrency=8)).forecast.tpot_ms
    borrowed = answer(scenario(precision="int8", concurrency=8)).forecast.tpot_ms
    assert math.log(borrowed.high / borrowed.value) > 1.9 * math.log(fitted.high / fitted.value)
    assert "not from served runs" in borrowed.note


def test_an_uncalibrated_gpu_gets_the_floor_and_a_reason():
    found = answer(scenario(gpu="l4", precision="fp16", tp=8))
    assert found.forecast is None
    assert "only the floor" in found.reason
    assert found.floors.ttft_ms.value > 0


def test_an_unknown_stack_gets_the_floor_and_a_reason():
    assert "my-server" in answer(scenario(stack="my-server")).reason


def test_many_at_once_equal_one_at_a_time():
    asked = [scenario(concurrency=c) for c in (1, 4, None)] + [scenario(gpu="l4", precision="fp16")]
    assert answers(asked) == [answer(one) for one in asked]


def test_a_forecast_never_beats_its_floor():
    for tp in (1, 2, 4, 8):
        for concurrency in (1, 64, None):
            for isl in (16, 512, 8192):
                found = answer(scenario(gpu="h200", tp=tp, isl=isl, osl=256, concurrency=concurrency))
                assert found.forecast.ttft_ms.value >= found.floors.ttft_ms.value
                assert found.forecast.tpot_ms.value >= found.floors.tpot_ms.value
                assert found.forecast.tok_s.value <= found.floors.tok_s.value


def test_requests_beyond_the_cache_wait():
    few = answer(scenario(tp=1, isl=5000, osl=500, concurrency=8)).forecast
    many = answer(scenario(tp=1, isl=5000, osl=500, concurrency=200)).forecast
    assert many.in_flight < 20
    assert many.ttft_ms.value > 20 * few.ttft_ms.value


def test_eviction_admits_more_requests():
    full = answer(scenario(tp=1, isl=4096, osl=256, concurrency=64)).forecast
    half = answer(scenario(tp=1, isl=4096, osl=256, concurrency=64, kept_tokens=2176)).forecast
    assert half.in_flight > 1.7 * full.in_flight
    assert half.tok_s.value > full.tok_s.value


def test_pipeline_stages_add_memory_and_throughput_but_not_speed_for_one():
    one = answer(scenario(tp=2, concurrency=1)).forecast
    piped = answer(scenario(tp=2, pp=2, concurrency=1)).forecast
    assert piped.tpot_ms.value == pytest.approx(one.tpot_ms.value, rel=0.01)
    assert piped.capacity > 2 * one.capacity
    assert answer(scenario(tp=2, pp=2)).forecast.tok_s.value > 1.5 * answer(scenario(tp=2)).forecast.tok_s.value


def test_every_group_has_provenance_and_physical_shares():
    for name, group in load_calibration().groups.items():
        assert group.provenance, name
        assert all(value > 0 for value in group.rates.values()), name
        assert group.rates["decode_mfu"] < 1, name


def test_releases_between_known_ones_take_the_older():
    constants = load_calibration()
    assert constants.version(scenario(version="0.18.2")) == "0.17"
    assert constants.version(scenario(version="v1.2.1")) == "1.2"
    assert constants.version(scenario(version="0.1")) == "0.5"


def test_eviction_costs_scoring_and_compaction():
    rare = answer(scenario(tp=2, isl=4096, osl=256, concurrency=8, kept_tokens=4352, evict_interval=4096)).forecast
    often = answer(scenario(tp=2, isl=4096, osl=256, concurrency=8, kept_tokens=4352, evict_interval=1)).forecast
    whole = answer(scenario(tp=2, isl=4096, osl=256, concurrency=8)).forecast
    assert whole.tpot_ms.value < rare.tpot_ms.value < often.tpot_ms.value
    assert whole.ttft_ms.value < rare.ttft_ms.value


def test_neither_a_forecast_nor_its_band_crosses_the_floor():
    constants = load_calibration()
    magic = {name: {**values, "first": 1e-9, "host_ms": 1e-9} for name, values in constants.serving.items()}
    found = answer(scenario(isl=4096, concurrency=1), replace(constants, serving=magic))
    assert found.forecast.ttft_ms.value == found.forecast.ttft_ms.low == found.floors.ttft_ms.value
    wide = answer(scenario(gpu="h200", precision="int4-awq", tp=1, isl=512, osl=256, concurrency=1))
    assert wide.forecast.tpot_ms.low >= wide.floors.tpot_ms.value
    assert wide.forecast.tok_s.high <= wide.floors.tok_s.value


@pytest.mark.parametrize(("tp", "isl"), [(1, 512), (2, 200_000)])
def test_what_does_not_fit_is_not_forecast(tp, isl):
    found = answer(scenario(gpu="a100", precision="fp16", tp=tp, isl=isl, osl=10, concurrency=1))
    assert found.forecast is None
    assert "does not fit" in found.reason


def test_a_model_of_another_size_has_a_wider_band_and_a_note():
    known = answer(scenario(concurrency=8)).forecast.ttft_ms
    small = answer(replace(scenario(concurrency=8), model=model_preset("llama-3-8b"))).forecast.ttft_ms
    assert "70B models only" in small.note
    assert small.high / small.value > known.high / known.value
