from __future__ import annotations

from dataclasses import replace

import pytest
from support.synthetic_records import PRICES, bench, stat

from trtkit.report.cells import Notes
from trtkit.report.columns import configurations
from trtkit.report.cost_rows import cost_section, fastest
from trtkit.report.model import Fact, Section
from trtkit.spec.measured import Source
from trtkit.spec.result import BenchResult


def priced(*results: BenchResult) -> tuple[Section, tuple[Fact, ...], Notes]:
    notes = Notes()
    found, _ = configurations(results, ())
    section, facts = cost_section(found, PRICES, notes)
    return section, facts, notes


def test_the_cost_is_the_hour_over_the_tokens_of_the_fastest_load() -> None:
    section, facts, _ = priced(bench(concurrency=1), bench(concurrency=8))
    (cell,) = section.rows[0].cells
    tps = bench(concurrency=8).metrics["tps"].stats["value"]
    assert cell.value == pytest.approx(0.1 / (tps.value * 3600) * 1e6)
    assert tps.low is not None
    assert cell.high == pytest.approx(0.1 / (tps.low * 3600) * 1e6), "the slowest repeat is the dearest"
    assert [fact.name for fact in facts] == ["price of 1 x cpu", "Baseline (FP32), concurrency 8, ISL 64, OSL 32"]
    assert "0.1 USD/h" in facts[1].text


def test_an_assumed_price_makes_an_assumed_cost() -> None:
    section, _, _ = priced(bench())
    assert section.rows[0].cells[0].source is Source.ASSUMED


def test_prompts_with_a_shared_prefix_are_priced_by_themselves() -> None:
    plain = bench()
    alike = replace(plain, workload=replace(plain.workload, shared_prefix_tokens=32))
    section, _, _ = priced(plain, alike)
    assert [row.condition.rpartition("concurrency, ")[2] for row in section.rows] == [
        "ISL 64, OSL 32, 32 tokens shared",
        "ISL 64, OSL 32",
    ]
    assert len({row.key for row in section.rows}) == 2


def test_each_prompt_length_is_priced_by_itself() -> None:
    section, _, _ = priced(bench(isl=64), bench(isl=256))
    assert [row.condition.partition(", ")[2] for row in section.rows] == ["ISL 64, OSL 32", "ISL 256, OSL 32"]


def test_a_device_without_a_price_is_missing_with_the_remedy() -> None:
    cell = bench()
    plan = replace(cell.engine.plan, gpu="h100-sxm")
    section, facts, notes = priced(replace(cell, engine=replace(cell.engine, plan=plan)))
    assert section.rows[0].cells[0].value is None
    assert "no price for h100-sxm; give one with --prices FILE" in notes.texts
    assert facts == ()


def test_two_devices_cost_twice_the_hour() -> None:
    cell = bench()
    plan = replace(cell.engine.plan, parallel=replace(cell.engine.plan.parallel, tp=2))
    two = replace(cell, engine=replace(cell.engine, plan=plan))
    costs = [priced(c)[0].rows[0].cells[0].value or 0.0 for c in (cell, two)]
    assert costs[1] == pytest.approx(2 * costs[0])


def test_a_throughput_of_zero_has_no_price() -> None:
    cell = bench()
    metrics = {**cell.metrics, "tps": replace(cell.metrics["tps"], stats={"value": stat(0.0)})}
    section, _, _ = priced(replace(cell, metrics=metrics))
    assert section.rows[0].cells[0].status == "missing"


def test_the_fastest_load_is_never_an_invalid_one() -> None:
    found, _ = configurations([bench(concurrency=1), replace(bench(concurrency=8), valid=False)], ())
    best = fastest(found[0])
    assert best is not None
    assert best.workload.concurrency == 1


def test_an_interval_that_reaches_below_zero_bounds_the_cost_on_one_side_only() -> None:
    cell = bench()
    wide = replace(stat(100.0), low=-50.0, high=250.0)
    metrics = {**cell.metrics, "tps": replace(cell.metrics["tps"], stats={"value": wide})}
    section, _, _ = priced(replace(cell, metrics=metrics))
    (priced_cell,) = section.rows[0].cells
    assert priced_cell.high is None
    assert priced_cell.low == pytest.approx(0.1 / (250.0 * 3600) * 1e6)
