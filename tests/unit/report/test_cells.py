from __future__ import annotations

from dataclasses import replace

import pytest
from support.synthetic_records import bench, invalid

from trtkit.report.cells import Notes, against_first, best_of, condition, metric_cell, missing, restricted, stat_cell
from trtkit.report.model import Cell, Row
from trtkit.spec.measured import Source
from trtkit.spec.result import MetricResult, Stat
from trtkit.spec.workload import Workload


def row(*cells: Cell, better: str = "higher") -> Row:
    return Row(key="k", metric="tps", label="", condition="", unit="", digits=1, better=better, cells=cells)


def metric(stat: Stat, samples: int = 20) -> MetricResult:
    return MetricResult(unit="ms", source=Source.MEASURED, samples=samples, stats={"value": stat})


@pytest.mark.parametrize(
    ("stat", "bounds", "spread"),
    [
        (Stat(value=2.0, low=1.0, high=3.0, repeats=(1.0, 2.0, 3.0)), (1.0, 3.0), "95 % interval of 3 repeats"),
        (Stat(value=2.5, repeats=(3.0, 2.0)), (2.0, 3.0), "min-max of 2 repeats"),
        (Stat(value=2.0, repeats=(2.0,)), (None, None), "1 repeat, no spread"),
    ],
)
def test_a_spread_says_what_it_is(stat: Stat, bounds: tuple[float | None, float | None], spread: str) -> None:
    cell = stat_cell(stat, metric(stat))
    assert ((cell.low, cell.high), cell.spread) == (bounds, spread)


def test_an_invalid_cell_has_no_number_and_carries_its_reason() -> None:
    notes = Notes()
    cell = metric_cell(invalid(bench(), "above the limit"), "tps", "value", notes)
    assert (cell.status, cell.value, cell.note) == ("invalid", None, 1)
    assert "roofline: above the limit" in notes.texts[0]
    assert "fp32" in notes.texts[0]


def test_an_invalid_record_without_a_failed_check_says_that() -> None:
    cell = metric_cell(replace(bench(), valid=False), "tps", "value", Notes())
    assert "without a reason" in cell.reason


def test_a_load_that_was_not_run_is_missing_and_not_zero() -> None:
    cell = metric_cell(None, "tps", "value", Notes())
    assert (cell.status, cell.value, cell.reason) == ("missing", None, "not measured")


def test_a_percentile_with_too_few_samples_says_how_many_it_needs() -> None:
    cell = metric_cell(bench(), "ttft_ms", "p99", Notes())
    assert cell.reason == "TTFT p99 needs 299 samples, this run has 20"


def test_a_share_of_the_limit_goes_with_the_value_only() -> None:
    shared = replace(bench(), shares={"ttft_ms": bench().shares["tps"]})
    assert metric_cell(shared, "ttft_ms", "p50", Notes()).share is not None
    assert metric_cell(shared, "ttft_ms", "max", Notes()).share is None


def test_equal_notes_share_a_number() -> None:
    notes = Notes()
    assert [notes.number(text) for text in ("a", "b", "a")] == [1, 2, 1]


@pytest.mark.parametrize(
    ("low", "high", "distinct"),
    [(11.0, 13.0, False), (12.5, 13.5, True), (8.0, 9.0, True), (None, None, None)],
    ids=["overlapping", "above", "below", "unknown"],
)
def test_ratios_know_whether_the_spreads_are_apart(
    low: float | None, high: float | None, distinct: bool | None
) -> None:
    compared = against_first(row(Cell(value=10.0, low=9.5, high=12.0), Cell(value=12.0, low=low, high=high)))
    assert compared.cells[0].ratio is None
    assert compared.cells[1].ratio == pytest.approx(1.2)
    assert compared.cells[1].distinct is distinct


@pytest.mark.parametrize(
    "first",
    [missing("not measured"), Cell(status="invalid"), Cell(value=0.0), restricted(Cell(value=1.0), "partial", Notes())],
    ids=["missing", "invalid", "zero", "restricted"],
)
def test_nothing_is_compared_with_a_first_column_that_has_no_sound_number(first: Cell) -> None:
    assert against_first(row(first, Cell(value=1.0))).cells[1].ratio is None


def test_a_restricted_number_is_not_compared() -> None:
    cells = (Cell(value=2.0), restricted(Cell(value=4.0), "partial", Notes()), Cell(value=3.0))
    assert [cell.ratio for cell in against_first(row(*cells)).cells] == [None, None, 1.5]
    assert best_of(row(*cells)) == 2


def test_the_best_depends_on_the_direction() -> None:
    cells = (Cell(value=2.0), Cell(value=1.0), missing("not measured"))
    assert best_of(row(*cells, better="higher")) == 0
    assert best_of(row(*cells, better="lower")) == 1
    assert best_of(row(*cells, better="neither")) is None


@pytest.mark.parametrize(
    ("workload", "text"),
    [
        (Workload(isl=512, osl=256, num_requests=1, concurrency=8), "concurrency 8, ISL 512, OSL 256"),
        (
            Workload(isl=512, osl=256, num_requests=1, concurrency=8, shared_prefix_tokens=448),
            "concurrency 8, ISL 512 (448 shared), OSL 256",
        ),
        (
            Workload(isl=512, osl=2, num_requests=1, concurrency=None, request_rate=2.5),
            "2.5 requests/s, ISL 512, OSL 2",
        ),
        (
            Workload(isl=0, osl=2, num_requests=1, concurrency=4, request_rate=2.0, dataset="a/b.jsonl"),
            "2 requests/s, at most 4 in flight, ISL as given, OSL 2, b.jsonl",
        ),
    ],
)
def test_a_load_reads_as_a_person_would_say_it(workload: Workload, text: str) -> None:
    assert condition(workload) == text
