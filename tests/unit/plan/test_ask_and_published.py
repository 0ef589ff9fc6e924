from dataclasses import replace

import pytest

from trtkit.plan.ask import LoadPoint, ask, load_title, plan_text
from trtkit.plan.memory import Placement
from trtkit.plan.names import gpu_word, model_word, precision_from
from trtkit.plan.prices import load_prices
from trtkit.plan.published import corrected, corrected_text
from trtkit.spec.catalog import gpu_spec, model_preset
from trtkit.spec.dtype import DType
from trtkit.spec.errors import TrtkitError, UnsupportedError
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.plan import Limits, Parallelism
from trtkit.spec.speculation import SpeculationSpec


def placed(gpu="a100", precision="fp16", tp=2, kv="full"):
    scheme = precision_from(precision)
    return Placement(
        model=model_preset("llama-3-70b"),
        gpu=gpu_spec(gpu),
        quant=scheme.quant,
        policy=parse_kv_policy(kv),
        parallel=Parallelism(tp=tp),
        limits=Limits(max_seq_len=4352),
    ), scheme


def test_an_answer_has_memory_both_answers_and_a_price():
    placement, precision = placed()
    found = ask("x", placement, precision, [LoadPoint(isl=512, osl=256, concurrency=8)], load_prices())
    line = found.loads[0]
    assert line.forecast.tpot_ms.value > line.floors.tpot_ms.value
    assert line.usd_per_million.value == pytest.approx(4.4 / 3600 / line.forecast.tok_s.value * 1e6)
    assert "512/256 at 8" in plan_text(found)


def test_an_arrival_rate_becomes_the_requests_it_keeps_in_flight():
    placement, precision = placed(gpu="h200", precision="fp8")
    slow, fast = (
        ask("x", placement, precision, [LoadPoint(isl=512, osl=256, request_rate=rate)]).loads[0] for rate in (0.2, 6)
    )
    assert slow.forecast.in_flight < 3 < fast.forecast.in_flight
    assert slow.forecast.ttft_ms.value < fast.forecast.ttft_ms.value


def test_an_arrival_rate_beyond_capacity_is_said_so():
    placement, precision = placed()
    found = ask("x", placement, precision, [LoadPoint(isl=4096, osl=256, request_rate=50)]).loads[0]
    assert found.forecast is None
    assert "more than it can serve" in found.reason


def test_a_plan_that_does_not_fit_has_no_forecast():
    placement, precision = placed(gpu="h100", tp=1)
    found = ask("x", placement, precision, [LoadPoint(isl=512, osl=256, concurrency=1)])
    assert found.loads[0].forecast is None
    assert found.would_fit
    assert "does not fit" in plan_text(found)


def test_loads_have_short_titles():
    assert load_title(LoadPoint(isl=5, osl=6)) == "5/6 at max"
    assert load_title(LoadPoint(isl=5, osl=6, request_rate=2)) == "5/6 at 2/s"


@pytest.mark.parametrize(
    ("gpu", "precision", "tp", "kv", "impossible"),
    [
        ("a100", "fp16", 2, "full", {"TTFT 512 ms", "TTFT 4096 ms", "peak memory GB", "USD per 1M"}),
        ("h100", "int8", 1, "full", {"TTFT 512 ms", "TTFT 4096 ms", "USD per 1M"}),
        ("a100", "fp16", 2, "h2o:50%", {"TTFT 512 ms", "TTFT 4096 ms", "peak memory GB", "USD per 1M"}),
        ("h100", "int8", 1, "h2o:50%", {"TPS b=32", "TTFT 512 ms", "TTFT 4096 ms", "peak memory GB", "USD per 1M"}),
    ],
)
def test_the_four_published_configurations_are_corrected(gpu, precision, tp, kv, impossible):
    placement, scheme = placed(gpu, precision, tp, kv)
    rows = corrected(placement, scheme, load_prices())
    assert {row.quantity for row in rows if not row.possible} == impossible
    assert all(row.forecast is not None for row in rows)
    assert "published" in corrected_text(rows)


def test_another_configuration_has_nothing_published():
    placement, scheme = placed(gpu="h200", precision="fp8", tp=1)
    assert corrected(placement, scheme, load_prices()) == ()
    placement, scheme = placed()
    other = replace(placement, model=model_preset("llama-2-70b"))
    assert corrected(other, scheme, load_prices()) == ()


@pytest.mark.parametrize(
    ("text", "name", "kv"),
    [
        ("Mixed(FP16)", "fp16", DType.FP16),
        ("FP8?", "fp8", DType.FP8),
        ("INT8-WO", "int8", DType.FP16),
        ("W8A8", "int8-sq", DType.FP16),
        ("INT4-AWQ", "int4-awq", DType.FP16),
        ("FP4", "fp4", DType.FP8),
    ],
)
def test_published_precisions_are_understood(text, name, kv):
    found = precision_from(text)
    assert (found.name, found.quant.kv) == (name, kv)


def test_a_stated_cache_type_wins():
    assert precision_from("FP8", kv_dtype="bf16").quant.kv is DType.BF16
    with pytest.raises(TrtkitError):
        precision_from("fp16", kv_dtype="fp3")


def test_fp4_needs_a_gpu_that_has_it():
    assert precision_from("fp4").gemm_flops_s(gpu_spec("b200")) == 9e15
    with pytest.raises(UnsupportedError, match="FP4"):
        precision_from("fp4").gemm_flops_s(gpu_spec("h100"))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A100-SXM-80GB", "a100-80gb-sxm"),
        ("H100", "h100-sxm"),
        ("GH200-480GB", "gh200"),
        ("A100-PCIe-80GB", "a100-80gb-pcie"),
    ],
)
def test_published_gpu_names_are_found(text, name):
    assert gpu_spec(gpu_word(text)).name == name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Llama-2-70B-chat", "llama-2-70b"),
        ("meta-llama/Meta-Llama-3-70B-Instruct", "llama-3-70b"),
        ("Llama-3.3-70B", "llama-3.3-70b"),
    ],
)
def test_published_model_names_are_found(text, name):
    assert model_preset(model_word(text)).name == name


def test_what_depends_on_the_text_is_named_beside_floors_that_leave_it_out():
    placement, precision = placed()
    load = [LoadPoint(isl=512, osl=256, concurrency=1)]
    assert ask("x", placement, precision, load).notes == ()
    guessing = replace(
        placement,
        speculation=SpeculationSpec(max_draft_tokens=4),
        limits=replace(placement.limits, enable_block_reuse=True),
    )
    text = plan_text(ask("x", guessing, precision, load))
    assert "speculation ngram:4: floors and forecasts are those without guesses; a step gives a request up to 5" in text
    assert "prefix reuse: floors and forecasts are those of prompts that share nothing" in text
