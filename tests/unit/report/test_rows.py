from __future__ import annotations

from dataclasses import replace

import pytest
from support.synthetic_records import PRICES, bench, full_set, invalid, quality

from trtkit.report.assemble import assemble
from trtkit.report.model import Report, Row
from trtkit.report.records import Records
from trtkit.spec.result import BenchResult, Check, DocumentOutcome, QualityResult
from trtkit.spec.workload import SLO


def report_of(*results: BenchResult, scores: tuple[QualityResult, ...] = ()) -> Report:
    return assemble(Records(bench=results, quality=scores), PRICES)


def rows(report: Report, title: str) -> list[Row]:
    return [row for section in report.comparison if section.title == title for row in section.rows]


def test_the_comparison_has_throughput_at_each_load_and_first_token_at_each_context() -> None:
    cells, scores = full_set()
    report = report_of(*cells, scores=scores)
    assert [s.title for s in report.comparison] == [
        "Throughput",
        "Time to first token",
        "Time per output token",
        "Memory",
        "Cost",
        "Quality",
    ]
    assert [row.condition for row in rows(report, "Throughput")] == [
        f"concurrency {c}, ISL {isl}, OSL 32" for isl in (64, 256) for c in (1, 4, 8)
    ]
    assert [row.condition for row in rows(report, "Time to first token")] == [
        f"concurrency 1, ISL {isl}, OSL 32" for isl in (64, 256)
    ]


def test_every_row_has_one_cell_per_column() -> None:
    cells, scores = full_set()
    report = report_of(*cells, scores=scores)
    counts = {len(row.cells) for s in (*report.comparison, *report.details) for row in s.rows}
    assert counts == {len(report.columns)} == {4}


def test_an_invalid_cell_counts_nowhere() -> None:
    fine, broken = bench(concurrency=1), invalid(bench(concurrency=8))
    huge = replace(broken, memory=replace(broken.memory, peak_bytes=10**12))
    report = report_of(fine, huge)
    peak = rows(report, "Memory")[0].cells[0]
    assert peak.value == fine.memory.peak_bytes
    cost = rows(report, "Cost")[0].cells[0]
    assert cost.value == pytest.approx(0.1 / (100.0 * 3600) * 1e6)
    assert [row.cells[0].status for row in rows(report, "Throughput")] == ["ok", "invalid"]
    assert all(
        point.y < 200 for plot in report.plots if plot.key == "throughput" for c in plot.curves for point in c.points
    )


def test_a_best_over_fewer_loads_is_marked_and_not_compared() -> None:
    cells = (
        bench(concurrency=1),
        bench(concurrency=8),
        bench("int8", concurrency=1),
        invalid(bench("int8", concurrency=8)),
    )
    report = report_of(*cells)
    for row in (rows(report, "Cost")[0], rows(report, "Memory")[0]):
        assert (row.cells[0].note, row.cells[1].ratio) == (None, None)
        assert "1 of 2 loads have no valid record" in row.cells[1].reason
    weights = rows(report, "Memory")[1]
    assert weights.cells[1].ratio == pytest.approx(0.25), "weights do not depend on the load"


def test_memory_that_was_not_sampled_is_unknown_and_not_zero() -> None:
    cell = bench()
    unknown = replace(cell, memory=replace(cell.memory, peak_bytes=None, other_bytes=None))
    peak, weights, _, _, other = (row.cells[0] for row in rows(report_of(unknown), "Memory"))
    assert (peak.status, peak.value) == (other.status, other.value) == ("missing", None)
    assert weights.value == 400_000


def test_an_engine_without_any_valid_cell_is_reported_without_numbers() -> None:
    report = report_of(invalid(bench()))
    values = [cell.value for s in (*report.comparison, *report.details) for row in s.rows for cell in row.cells]
    assert set(values) == {None}
    assert report.tiles[0].value == "0 of 1"
    assert report.plots == ()


def test_loads_of_one_label_are_told_apart() -> None:
    one = bench()
    other = replace(one, workload=replace(one.workload, num_requests=40))
    conditions = [row.condition for row in rows(report_of(one, other), "Throughput")]
    assert len(set(conditions)) == 2
    assert "40 requests" in " ".join(conditions)


def test_goodput_is_shown_where_there_are_limits_to_keep() -> None:
    cell = bench()
    assert rows(report_of(cell), "Goodput") == []
    strict = replace(cell, workload=replace(cell.workload, slo=SLO(ttft_ms=100.0)))
    (row,) = rows(report_of(strict), "Goodput")
    assert row.cells[0].reason == "the run recorded no goodput"


def test_a_score_carries_its_standard_error() -> None:
    (row,) = rows(report_of(bench(), scores=(quality(score=5.0, stderr=0.25),)), "Quality")
    assert (row.cells[0].error, row.cells[0].low, row.cells[0].high) == (0.25, 4.75, 5.25)


def scored(name: str, *scores: float, better: str = "lower") -> QualityResult:
    documents = tuple(DocumentOutcome(document=f"d{i}", group="", score=s) for i, s in enumerate(scores))
    return replace(quality(name, score=sum(scores) / len(scores)), documents=documents, unit="nats", better=better)


def test_scores_are_compared_on_the_same_documents_in_whatever_order() -> None:
    base = scored("fp32", 1.0, 5.0, 9.0, 2.0)
    worse = scored("int8", 1.1, 5.11, 9.1, 2.12)
    mixed = replace(worse, documents=worse.documents[::-1])
    (row,) = rows(report_of(scores=(base, mixed)), "Quality")
    assert row.cells[1].distinct is True, "a small difference on every document is beyond chance"
    assert row.cells[1].remark.startswith("paired -0.11 [")


def test_a_difference_within_chance_is_marked_although_the_errors_are_small() -> None:
    (row,) = rows(report_of(scores=(scored("fp32", 1.0, 2.0, 3.0), scored("int8", 1.1, 1.9, 3.0))), "Quality")
    assert row.cells[1].distinct is False


def test_other_documents_are_not_paired() -> None:
    base, other = scored("fp32", 1.0, 2.0), scored("int8", 1.0, 2.0, 3.0)
    (row,) = rows(report_of(scores=(base, other)), "Quality")
    assert row.cells[1].distinct is None
    assert "not paired" in row.cells[1].remark


def test_an_unknown_standard_error_stays_unknown() -> None:
    (row,) = rows(report_of(bench(), scores=(quality(stderr=None),)), "Quality")
    assert (row.cells[0].error, row.cells[0].low, row.cells[0].high) == (None, None, None)


def test_an_invalid_score_is_shown_as_invalid() -> None:
    bad = replace(quality(), valid=False, checks=(Check(name="eviction", status="fail", detail="never evicted"),))
    report = report_of(bench(), scores=(bad,))
    (row,) = rows(report, "Quality")
    assert (row.cells[0].status, row.cells[0].value) == ("invalid", None)
    assert "never evicted" in " ".join(report.notes)


def test_details_hold_every_statistic_of_every_metric() -> None:
    cell = bench()
    (section,) = report_of(cell).details
    found = {row.key.partition("@")[0] for row in section.rows}
    wanted = {f"{key}.{stat}" for key, metric in cell.metrics.items() for stat in metric.stats}
    assert wanted <= found
    assert {"peak_memory", "memory_weights", "memory_kv_pool", "memory_kv_peak", "memory_other"} <= found


def test_columns_from_different_machines_are_said_to_be() -> None:
    other = replace(bench("int8"), environment=replace(bench().environment, cpu="another CPU"))
    assert report_of(bench("fp32"), bench("int8")).notes == ()
    notes = report_of(bench("fp32"), other).notes
    assert notes == ("records come from 2 different environments; ratios compare those too",)


def test_the_newer_of_two_records_is_noted_in_the_report() -> None:
    newer = replace(bench(), environment=replace(bench().environment, started_utc="2027-01-01T00:00:00Z"))
    assert "of two records of the same cell the newer counts" in " ".join(report_of(bench(), newer).notes)


def test_checks_that_failed_come_first() -> None:
    passed, failed = Check(name="a", status="pass", detail=""), Check(name="b", status="fail", detail="")
    report = report_of(replace(bench(), checks=(passed, failed, passed)))
    assert [check.status for check in report.checks] == ["fail", "pass", "pass"]
