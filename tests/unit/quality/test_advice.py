"""The written read: its arithmetic, its ranking, its refusals and its words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.synthetic_records import bench, engine, environment

from trtkit.plan.prices import load_prices
from trtkit.quality.advice import PlannedLever, Readiness, Situation, advise
from trtkit.quality.amounts import tokens_per_month, usd_per_month
from trtkit.quality.planned import read_planned
from trtkit.quality.sides import Side
from trtkit.report.advice import render_advice
from trtkit.spec.errors import InputError, MeasurementError, UsageError
from trtkit.spec.kv import KVFidelity
from trtkit.spec.result import BenchResult, DocumentOutcome, EngineRef, QualityResult

PRICES = """
[[gpu]]
gpu = "h100-sxm"
kind = "cloud"
name = "test"
usd_per_gpu_h = 3.0
source = "made up"
date = "2026-01-01"
"""


@pytest.fixture
def prices(tmp_path: Path):
    path = tmp_path / "prices.toml"
    path.write_text(PRICES)
    return load_prices(path)


def on_gpu(name: str, fidelity: KVFidelity = KVFidelity.EXACT) -> EngineRef:
    ref = engine(name, fidelity=fidelity)
    return replace(ref, plan=replace(ref.plan, gpu="h100-sxm"))


def side(name: str, right: int | None = None, total: int = 1000, fidelity: KVFidelity = KVFidelity.EXACT) -> Side:
    ref = on_gpu(name, fidelity)
    quality = ()
    if right is not None:
        documents = tuple(DocumentOutcome(document=f"d{i}", group="g", score=float(i < right)) for i in range(total))
        quality = (
            QualityResult(
                engine=ref,
                task="mmlu",
                metric="acc",
                unit="fraction",
                better="higher",
                protocol="p",
                score=right / total,
                stderr=0.01,
                documents=documents,
                evictions=0,
                tokens_evicted=0,
                environment=environment(),
            ),
        )
    records: list[BenchResult] = [replace(bench(name, concurrency=c), engine=ref) for c in (1, 8)]
    return Side(engine=ref, bench=tuple(records), quality=quality)


SITUATION = Situation(tokens_month=2000e6, spend_usd_month=47_000)


def test_machines_and_savings_follow_from_the_fastest_throughput(prices) -> None:
    advice = advise(SITUATION, [side("fp32", 700), side("int8", 698)], prices)
    # 100 and 150 tok/s x 8**0.7 at concurrency 8; half of 730 h busy; 3 USD/h.
    tps = 100 * 8**0.7
    need = -(-2000e6 // (tps * 3600 * 730 * 0.5))
    need_int8 = -(-2000e6 // (1.5 * tps * 3600 * 730 * 0.5))
    assert (advice.baseline.machines, advice.levers[0].running.machines) == (need, need_int8)
    assert advice.baseline.usd_month == need * 3 * 730
    assert advice.levers[0].saving_usd_month == (need - need_int8) * 3 * 730


def test_a_lever_with_equal_quality_is_ready(prices) -> None:
    lever = advise(SITUATION, [side("fp32", 700), side("int8", 698)], prices).levers[0]
    assert lever.readiness is Readiness.SHIP
    assert lever.changes[0].startswith("precision fp32 -> int8")


def test_a_lever_that_lost_quality_is_not_shipped(prices) -> None:
    lever = advise(SITUATION, [side("fp32", 700), side("int8", 600)], prices).levers[0]
    assert (lever.readiness, lever.reason) == (Readiness.REJECT, "mmlu/acc is worse by more than its margin")


def test_a_lever_without_quality_is_measured_first(prices) -> None:
    assert advise(SITUATION, [side("fp32"), side("int8")], prices).levers[0].readiness is Readiness.MEASURE


def test_an_undecided_lever_says_how_many_documents_would_decide(prices) -> None:
    lever = advise(SITUATION, [side("fp32", 20, 30), side("int8", 19, 30)], prices).levers[0]
    assert lever.readiness is Readiness.MEASURE
    assert "documents would decide" in lever.reason


def test_ready_levers_come_first_then_the_larger_saving_per_friction(prices) -> None:
    sides = [side("fp32", 700), side("int8-h2o", 600), side("int8", 699), side("fp32-h2o", 700)]
    busy = Situation(tokens_month=20_000e6)
    assert [lever.running.name for lever in advise(busy, sides, prices).levers] == ["int8", "fp32-h2o", "int8-h2o"]


def test_an_approximate_kv_policy_costs_friction_and_is_named(prices) -> None:
    exact = advise(SITUATION, [side("fp32", 700), side("fp32-h2o", 700)], prices).levers[0]
    window = side("fp32-h2o", 700, fidelity=KVFidelity.WINDOW_ONLY)
    approximate = advise(SITUATION, [side("fp32", 700), window], prices).levers[0]
    assert approximate.friction == exact.friction + 2
    assert "window_only" in approximate.changes[0]


def test_a_planned_lever_is_never_ready_and_says_modeled(prices) -> None:
    planned = PlannedLever(name="FP8", gpu="h100-sxm", num_gpus=1, tok_s=5000, change="fp8 weights")
    lever = advise(SITUATION, [side("fp32", 700)], prices, (planned,)).levers[0]
    assert (lever.readiness, lever.running.source.value) == (Readiness.MEASURE, "modeled")


def test_small_traffic_and_small_models_are_told_not_to(prices) -> None:
    text = " ".join(advise(Situation(tokens_month=1e6), [side("fp32", 700), side("int8", 700)], prices).cautions)
    assert "below 1M" in text
    assert "tune batching before" in text


def test_a_lever_without_a_price_is_left_out_and_named(prices) -> None:
    nameless = replace(side("int8", 700), bench=(replace(bench("int8"), engine=engine("int8")),))
    advice = advise(SITUATION, [side("fp32", 700), nameless], replace(prices, gpu=prices.gpu[:1]))
    assert advice.levers == ()
    assert advice.missing == ("int8: no price for cpu; give one with --prices",)


def test_a_baseline_without_throughput_is_refused(prices) -> None:
    with pytest.raises(MeasurementError, match="no valid throughput"):
        advise(SITUATION, [Side(engine=on_gpu("fp32")), side("int8")], prices)
    with pytest.raises(UsageError, match="at least one other"):
        advise(SITUATION, [side("fp32")], prices)


@pytest.mark.parametrize("fmt", ["md", "html"])
def test_the_read_holds_every_part_and_escapes_names(prices, fmt: str) -> None:
    hostile = replace(side("int8", 699), engine=replace(on_gpu("int8"), label="<script>x</script>"))
    text = render_advice(advise(SITUATION, [side("fp32", 700), hostile], prices), fmt)
    for part in ("Today", "Levers", "What to do on Monday", "When not to", "47,000 USD", "trtkit gate"):
        assert part in text
    assert "<script>" not in text
    assert "http" not in text


def test_an_unknown_format_is_refused(prices) -> None:
    with pytest.raises(UsageError, match="allowed are md, html"):
        render_advice(advise(SITUATION, [side("fp32"), side("int8")], prices), "pdf")


@pytest.mark.parametrize(
    ("text", "expected"), [("200M", 200e6), ("200M/month", 200e6), ("6M/day", 182.5e6), ("1,500,000", 1.5e6)]
)
def test_traffic_is_read_as_people_write_it(text: str, expected: float) -> None:
    assert tokens_per_month(text) == pytest.approx(expected)


def test_spend_is_read_as_people_write_it() -> None:
    assert usd_per_month("$47K/month") == usd_per_month("47,000") == 47_000


@pytest.mark.parametrize("text", ["", "lots", "-5M", "0", "5M/week", "M"])
def test_other_amounts_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected a positive amount"):
        tokens_per_month(text)


def test_planned_levers_are_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "planned.json"
    row = {"name": "x", "gpu": "h100-sxm", "num_gpus": 1, "tok_s": 10.0, "change": "c"}
    path.write_text(json.dumps([row]))
    assert read_planned(path)[0].friction == 3
    for body, error, message in (
        ([row | {"speed": 1}], InputError, "unknown key 'speed'"),
        ({}, InputError, "a list of levers"),
        ([row | {"tok_s": 0}], UsageError, "must be positive"),
    ):
        path.write_text(json.dumps(body))
        with pytest.raises(error, match=message):
            read_planned(path)
    assert read_planned(None) == ()
