"""What was aimed at beside what records say: every aim has its line, from its own measurement, and is judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import aims, h2o, page, summary

UNREACHED = ["-", "-"]


def cell(
    name: str, *, valid: bool = True, peak: int = 1, floor: dict[str, float] | None = None, **medians: float
) -> Any:
    metrics = {key: {"stats": {"p50": {"value": value}}} for key, value in medians.items()}
    result = {"valid": valid, "metrics": metrics, "repeats": [{"kv": {"requests_peak": peak}}]}
    return {"name": name, "result": result, "floor_measured": {k: {"value": v} for k, v in (floor or {}).items()}}


def row(key: str, *cells: Any, started: str = "", **memory: float) -> Any:
    return {
        "row": key,
        "cells": list(cells),
        "environment": {"started_utc": started},
        "memory": {name.replace("_", "."): {"value": value} for name, value in memory.items()},
    }


def llama(*rows: Any, **more: Any) -> Any:
    return {"gpu": "h100-sxm", "rehearsal": False, "rows": list(rows)} | more


def item(name: str, variant: str, **values: float) -> Any:
    return {"item": name, "variant": variant, "values": {key: {"value": value} for key, value in values.items()}}


def h2o_record(*items: Any) -> Any:
    return {"gpu": "NVIDIA H100 80GB HBM3", "rehearsal": False, "rows": list(items)}


def answers(*records: Any) -> dict[str, list[str]]:
    return {text: told for text, _, *told in aims.aim_rows(records)}


FIRST, BATCH, TTFT, FP8, STEP, HELD, FLIGHT, PLAN = (aim.text for aim in aims.AIMS)


@pytest.mark.parametrize(
    ("text", "records", "told"),
    [
        (FIRST, [llama(row("int8", cell("c1-isl512", floor={"step_ms": 22.5}, itl_ms=25.0)))], ["90.0%", "yes"]),
        (FIRST, [llama(row("int8", cell("c1-isl512", floor={"step_ms": 22.0}, itl_ms=25.0)))], ["88.0%", "NO"]),
        (FIRST, [llama(row("int8", cell("c1-isl512", valid=False, floor={"step_ms": 22.5}, itl_ms=25.0)))], UNREACHED),
        (BATCH, [llama(row("int8", cell("c32-isl512", floor={"step_ms": 17.0}, itl_ms=20.0)))], ["85.0%", "yes"]),
        (TTFT, [llama(row("int8", cell("c1-isl4096", floor={"ttft_ms": 600.0}, ttft_ms=800.0)))], ["75.0%", "NO"]),
        (TTFT, [llama(row("int4", cell("c1-isl4096", floor={"ttft_ms": 600.0}, ttft_ms=800.0)))], UNREACHED),
        (FP8, [llama(row("fp8", cell("c1-isl4096", ttft_ms=449.0)))], ["449 ms", "yes"]),
        (FP8, [llama(row("fp8", cell("c1-isl4096", ttft_ms=450.4)))], ["450 ms", "NO"]),
        (STEP, [h2o_record(item("equal live length", "h2o:1", over_full=0.021))], ["+2.1%", "NO"]),
        (STEP, [h2o_record(item("equal live length", "h2o:1", over_full=-0.01))], ["-1.0%", "yes"]),
        (STEP, [h2o_record(item("equal request", "h2o:1", over_full=-0.2))], UNREACHED),
        (HELD, [h2o_record(item("equal request", "full", held=4400), item("equal request", "h2o:1", held=2330))], ["53%", "yes"]),
        (HELD, [h2o_record(item("equal request", "full", held=4400), item("equal request", "h2o:1", held=2500))], ["57%", "NO"]),
        (FLIGHT, [llama(row("int8", cell("c32-isl4096", peak=7)), row("int8-h2o-long", cell("c32-isl4096", peak=13)))], ["13 of 7: 1.86x", "yes"]),
        (FLIGHT, [h2o_record(item("in flight", "full", in_flight=7.0), item("in flight", "h2o:1", in_flight=11.9))], ["11.9 of 7.0: 1.70x", "NO"]),
        (PLAN, [llama(row("int8", plan_total=84.0, seen_total=84.5))], ["-0.6%", "yes"]),
        (PLAN, [llama(row("int8", plan_total=84.0, seen_total=82.0))], ["+2.4%", "NO"]),
    ],
)  # fmt: skip
def test_each_aim_is_read_from_its_own_measurement(text: str, records: list[Any], told: list[str]) -> None:
    found = answers(*records)
    assert found.pop(text) == told
    assert list(found.values()) == [UNREACHED] * (len(aims.AIMS) - 1)


def test_a_rehearsal_reaches_no_aim_and_takes_no_line() -> None:
    rehearsed = llama(row("fp8", cell("c1-isl4096", ttft_ms=1.0)), rehearsal=True)
    assert set(map(tuple, answers(rehearsed).values())) == {("-", "-")}
    assert aims.aim_lines([rehearsed]) == []


def test_the_summary_begins_with_the_aims_and_names_the_card(tmp_path: Path) -> None:
    for name, record in (
        ("llama70b.json", llama(gpu="h200")),
        ("h2o.json", h2o_record(item("equal live length", "h2o:1", over_full=0.0123)) | {"lines": ["h2o"]}),
    ):
        (tmp_path / name).write_text(json.dumps({"data": record}))
    lines = summary.lines_of(tmp_path, ["core", "h2o"])
    assert lines[0].startswith("aim for one H100, on h200")
    assert [line for line in lines if "+1.2%" in line and line.endswith("yes")]
    assert not [line for line in summary.lines_of(tmp_path, ["core"]) if "+1.2%" in line]


def test_the_page_counts_the_newest_record_by_its_date_and_h2os_own(tmp_path: Path) -> None:
    for name, ms, date in (("z", 470.0, "2026-12-01"), ("a", 440.0, "2027-01-01")):
        record = llama(row("fp8", cell("c1-isl4096", ttft_ms=ms), started=date))
        (tmp_path / f"gpu-h100-{name}-llama70b.json").write_text(json.dumps({"data": record}))
    half = h2o_record(item("equal live length", "h2o:1", over_full=0.01))
    (tmp_path / "gpu-h100-a-h2o.json").write_text(json.dumps({"data": half}))
    other = llama(row("int8", plan_total=1.0, seen_total=1.0), gpu="h200")
    (tmp_path / "gpu-h200-llama70b.json").write_text(json.dumps({"data": other}))
    table = page.aims_table(tmp_path)
    assert "| below 450 ms | 440 ms | yes |" in table
    assert "| +1.0% | yes |" in table
    assert "| within 1% | - | - |" in table


def test_a_share_and_its_span_are_told_in_the_same_unit() -> None:
    from types import SimpleNamespace

    values = {"over_full": h2o._spread([0.01, 0.02, 0.04], "share")}
    rows = [h2o.Row(item="equal live length", variant="h2o:1", values=values)]
    (line, *_) = h2o.lines_of(SimpleNamespace(record=SimpleNamespace(rows=rows, notes=[])))[1:]  # type: ignore[arg-type]
    assert line.split()[-2:] == ["2.00%", "1.00%..4.00%"]
