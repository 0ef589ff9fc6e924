"""Laws of the planner that hold for any shape and load."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from trtkit.plan import work
from trtkit.plan.cost import cost_per_million
from trtkit.plan.forecast import answer
from trtkit.plan.names import precision_from
from trtkit.plan.roofline import floors
from trtkit.plan.scenario import Scenario
from trtkit.spec.catalog import gpu_spec, model_preset
from trtkit.spec.quant import PRECISIONS

SCENARIOS = st.builds(
    Scenario,
    model=st.sampled_from(["llama-3-8b", "llama-3-70b", "qwen2.5-7b", "mistral-7b-v0.1"]).map(model_preset),
    gpu=st.sampled_from(["a100", "h100", "h200"]).map(gpu_spec),
    precision=st.sampled_from(["fp16", "int8", "int4-awq"]).map(precision_from),
    isl=st.integers(1, 20_000),
    osl=st.integers(1, 4096),
    concurrency=st.one_of(st.none(), st.integers(1, 512)),
    tp=st.sampled_from([1, 2, 4, 8]),
)


@settings(max_examples=150, deadline=None)
@given(SCENARIOS)
def test_a_forecast_lies_on_the_possible_side_of_its_floor(scenario):
    found = answer(scenario)
    limits, forecast = found.floors, found.forecast
    if forecast is None:
        assert found.reason
        return
    assert forecast.ttft_ms.value >= limits.ttft_ms.value > 0
    assert forecast.tpot_ms.value >= limits.tpot_ms.value > 0
    assert 0 < forecast.tok_s.value <= limits.tok_s.value


@settings(max_examples=100, deadline=None)
@given(SCENARIOS, st.integers(1, 4000))
def test_a_longer_prompt_is_never_faster(scenario, more):
    longer = replace(scenario, isl=scenario.isl + more)
    assert floors(longer).ttft_ms.value >= floors(scenario).ttft_ms.value


@settings(max_examples=100, deadline=None)
@given(SCENARIOS)
def test_more_devices_never_raise_the_floor_of_one_request(scenario):
    one = replace(scenario, concurrency=1)
    wider = replace(one, tp=one.tp * 2)
    assert floors(wider).tpot_ms.value <= floors(one).tpot_ms.value
    assert floors(wider).ttft_ms.value <= floors(one).ttft_ms.value


@settings(max_examples=100, deadline=None)
@given(SCENARIOS, st.floats(0, 1))
def test_a_cached_prefix_never_costs_more(scenario, share):
    cached = replace(scenario, cached_tokens=int(share * scenario.isl))
    assert floors(cached).ttft_ms.value <= floors(scenario).ttft_ms.value


@given(st.integers(0, 5000), st.integers(0, 5000), st.sampled_from(["llama-3-8b", "mistral-7b-v0.1"]))
def test_attention_of_two_halves_is_attention_of_the_whole(first, second, name):
    model = model_preset(name)
    whole = work.attention_flops(model, first + second)
    parts = work.attention_flops(model, first) + work.attention_flops(model, first + second, cached_tokens=first)
    assert abs(whole - parts) <= 1e-9 * max(whole, 1)


@given(st.sampled_from(sorted(PRECISIONS)), st.sampled_from(["llama-3-8b", "qwen2.5-7b"]))
def test_a_step_reads_no_more_weights_than_there_are(precision, name):
    model, quant = model_preset(name), PRECISIONS[precision]
    assert 0 < work.weight_read_bytes(model, quant) < work.weight_bytes(model, quant)


@given(st.floats(0.01, 1e6), st.floats(0.01, 100), st.integers(1, 64), st.floats(0.01, 1))
def test_cost_scales_with_price_and_falls_with_throughput(tok_s, usd, gpus, busy):
    base = cost_per_million(tok_s, usd, gpus, utilisation=busy)
    assert cost_per_million(tok_s, usd * 2, gpus, utilisation=busy) > base
    assert cost_per_million(tok_s * 2, usd, gpus, utilisation=busy) < base
