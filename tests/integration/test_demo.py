"""The demonstration end to end, on a protocol of seconds: real engines, child processes, records and reports."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from trtkit.cli.demo_run import Demo, DemoSettings, run_demo
from trtkit.quality.heldout import HeldoutRules
from trtkit.report.records import load_records
from trtkit.spec.errors import UsageError

PROTOCOL = """
name = "seconds"
repeats = 1
[defaults]
osl = 8
warmup_requests = 1
[[workload]]
concurrency = 1
isl = [200]
num_requests = 2
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> DemoSettings:
    folder = tmp_path_factory.mktemp("demo")
    (folder / "seconds.toml").write_text(PROTOCOL, encoding="utf-8")
    return DemoSettings(
        output_dir=folder / "results",
        engines_dir=folder / "builds",
        protocol=str(folder / "seconds.toml"),
        recipes=("tiny-fp32-cpu", "tiny-int8-h2o50-cpu", "no-such-recipe"),
        rules=HeldoutRules(context=256, scored=16, piece=64, limit=2),
    )


@pytest.fixture(scope="module")
def demo(settings: DemoSettings) -> Demo:
    return run_demo(settings)


pytestmark = pytest.mark.slow


def test_the_demonstration_reports_speed_memory_cost_and_quality_of_every_engine(demo: Demo) -> None:
    assert [column.role for column in demo.report.columns] == ["baseline", "optimised"]
    by_title = {section.title: section for section in demo.report.comparison}
    assert {"Throughput", "Time to first token", "Memory", "Cost", "Quality"} <= set(by_title)
    values = [cell.value for title in by_title for cell in by_title[title].rows[0].cells]
    assert None not in values, demo.report.notes
    weights = next(row for row in by_title["Memory"].rows if row.metric == "memory_weights")
    assert (weights.cells[1].value or 0) < (weights.cells[0].value or 0), "INT8 weights are smaller"


def test_an_engine_that_cannot_be_built_is_left_out_with_the_reason(demo: Demo) -> None:
    assert len(demo.left_out) == 1
    assert demo.left_out[0].startswith("no-such-recipe is left out: ")
    assert demo.left_out[0] in demo.report.notes


def test_the_reports_lie_beside_the_records(demo: Demo, settings: DemoSettings) -> None:
    assert sorted(path.name for path in demo.files) == ["report.html", "report.json", "report.md"]
    assert not re.search(r"https?://", (settings.output_dir / "report.html").read_text(encoding="utf-8"))
    data = json.loads((settings.output_dir / "report.json").read_text(encoding="utf-8"))
    assert data["kind"] == "report"
    records = load_records([settings.output_dir])
    assert (len(records.bench), len(records.quality), records.problems) == (2, 4, ())


def test_a_second_run_builds_and_measures_nothing_again(demo: Demo, settings: DemoSettings) -> None:
    before = {path: path.stat().st_mtime_ns for path in settings.output_dir.glob("*.json") if path.stem != "report"}
    engines = {path: (path / "trtkit.json").stat().st_mtime_ns for path in demo.engines}
    again = run_demo(settings)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert {path: (path / "trtkit.json").stat().st_mtime_ns for path in again.engines} == engines
    assert again.report.comparison == demo.report.comparison


def test_without_the_baseline_there_is_no_demonstration(settings: DemoSettings) -> None:
    with pytest.raises(UsageError, match="no recipe 'no-such-recipe'"):
        run_demo(replace(settings, recipes=("no-such-recipe",)))
