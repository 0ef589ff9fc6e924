"""CSV, Markdown, console, and how files are written."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from support.synthetic_records import PRICES, bench, full_set

from trtkit.report import csv as report_csv
from trtkit.report import markdown
from trtkit.report.assemble import assemble
from trtkit.report.console import render_console
from trtkit.report.model import Report
from trtkit.report.records import Records
from trtkit.report.write import targets, write
from trtkit.spec.errors import OutputError, UsageError


def report_of(*names: str) -> Report:
    return assemble(Records(bench=tuple(bench(name) for name in names)), PRICES)


def test_csv_holds_every_cell_unrounded() -> None:
    cells, scores = full_set()
    report = assemble(Records(bench=cells, quality=scores), PRICES)
    lines = list(csv.DictReader(io.StringIO(report_csv.render(report))))
    assert len(lines) == sum(len(row.cells) for s in (*report.comparison, *report.details) for row in s.rows)
    first = report.comparison[0].rows[1].cells[0]
    assert float(lines[4]["value"]) == first.value
    assert float(lines[4]["low"]) == first.low


def test_csv_leaves_unknown_fields_empty() -> None:
    cell = bench()
    report = assemble(Records(bench=(replace(cell, memory=replace(cell.memory, peak_bytes=None)),)), PRICES)
    lines = [r for r in csv.DictReader(io.StringIO(report_csv.render(report))) if r["metric"] == "peak_memory"]
    assert {(line["status"], line["value"]) for line in lines} == {("missing", "")}


@pytest.mark.parametrize("start", ["=", "+", "-", "@"])
def test_csv_text_never_becomes_a_formula(start: str) -> None:
    cell = bench()
    report = assemble(Records(bench=(replace(cell, engine=replace(cell.engine, name=f"{start}1+1")),)), PRICES)
    lines = list(csv.DictReader(io.StringIO(report_csv.render(report))))
    assert {line["engine"] for line in lines} == {f"'{start}1+1"}


def test_markdown_tables_survive_what_a_name_may_hold() -> None:
    cell = bench()
    named = replace(cell, engine=replace(cell.engine, name="a|b\n# <b>*x*_y_ [z](javascript:1)", label="p|q"))
    text = markdown.render(assemble(Records(bench=(named,)), PRICES))
    assert "<b>" not in text
    assert "](" not in text.replace("]\\(", "")
    table = [line for line in text.splitlines() if line.startswith("| ")]
    columns = {line.replace("\\|", "").count("|") for line in table if "a\\|b" in line}
    assert columns == {9}


def test_console_lines_fit_four_configurations_in_a_wide_terminal() -> None:
    text = render_console(*full_set(), PRICES)
    table = text[: text.index("Valid cells")]
    assert max(len(line) for line in table.splitlines()) <= 140


def test_an_output_suffix_names_the_format(tmp_path: Path) -> None:
    assert targets(tmp_path / "a.html", []) == {tmp_path / "a.html": "html"}
    assert targets(tmp_path / "a.md", ["csv"]) == {tmp_path / "a.md": "csv"}


def test_any_other_output_is_a_directory_for_all_formats(tmp_path: Path) -> None:
    names = {path.name: fmt for path, fmt in targets(tmp_path / "out", []).items()}
    assert names == {"report.md": "md", "report.html": "html", "report.csv": "csv", "report.json": "json"}


def test_an_existing_directory_is_a_directory_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "results.csv").mkdir()
    assert list(targets(tmp_path / "results.csv", ["md"])) == [tmp_path / "results.csv" / "report.md"]


def test_several_formats_do_not_fit_into_one_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a\.md is one file and 2 formats were asked for; give a directory"):
        targets(tmp_path / "a.md", ["md", "csv"])


def test_an_existing_file_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "report.csv").write_text("precious", encoding="utf-8")
    with pytest.raises(OutputError, match=r"report\.csv exists; .*--force"):
        write(report_of("fp32"), targets(tmp_path, ["md", "csv"]))
    assert [path.name for path in tmp_path.iterdir()] == ["report.csv"]
    assert (tmp_path / "report.csv").read_text(encoding="utf-8") == "precious"


def test_force_replaces(tmp_path: Path) -> None:
    (tmp_path / "report.csv").write_text("old", encoding="utf-8")
    write(report_of("fp32"), targets(tmp_path, ["csv"]), force=True)
    assert (tmp_path / "report.csv").read_text(encoding="utf-8").startswith("table,section")
