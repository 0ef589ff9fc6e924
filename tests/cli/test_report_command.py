from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.synthetic_records import full_set
from typer.testing import CliRunner, Result

from trtkit.cli.app import build_app
from trtkit.spec.codec import write_record


@pytest.fixture
def records(tmp_path: Path) -> Path:
    folder = tmp_path / "records"
    cells, scores = full_set()
    for index, cell in enumerate(cells[:4]):
        write_record(folder / f"c{index}.json", "bench", cell)
    write_record(folder / "q.json", "quality", scores[0])
    return folder


def report(*arguments: object) -> Result:
    return CliRunner().invoke(build_app(requested={"report"}), ["report", *(str(a) for a in arguments)])


def test_a_directory_of_records_becomes_a_table(records: Path) -> None:
    result = report(records)
    assert result.exit_code == 0
    assert "Throughput: TPS (tok/s), measured" in result.stdout
    assert "held-out perplexity" in result.stdout


def test_json_prints_one_object_with_every_section(records: Path) -> None:
    data = json.loads(report(records, "--json").stdout)["data"]
    assert [s["title"] for s in data["comparison"]][-1] == "Quality"


def test_an_output_directory_gets_all_formats(records: Path, tmp_path: Path) -> None:
    result = report(records, "--output", tmp_path / "out", "--json")
    assert result.exit_code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "report.csv",
        "report.html",
        "report.json",
        "report.md",
    ]
    assert json.loads(result.stdout)["problems"] == []


def test_a_damaged_record_is_named_and_the_rest_is_still_reported(records: Path) -> None:
    (records / "bad.json").write_text("{", encoding="utf-8")
    result = report(records)
    assert result.exit_code == 3
    assert "Throughput" in result.stdout
    assert result.stderr.count("bad.json") == 1
    assert json.loads(report(records, "--json").stdout)["data"]["problems"]


def test_an_unknown_format_lists_the_known_ones(records: Path) -> None:
    result = report(records, "--format", "pdf")
    assert result.exit_code == 2
    assert "allowed are console, md, html, csv, json" in result.stderr
    assert result.stdout == ""


def test_an_existing_output_is_refused_without_force(records: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.md"
    target.write_text("mine", encoding="utf-8")
    result = report(records, "-o", target)
    assert (result.exit_code, target.read_text(encoding="utf-8")) == (7, "mine")
    assert report(records, "-o", target, "--force").exit_code == 0


def test_an_output_under_a_file_is_one_line(records: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    result = report(records, "-o", tmp_path / "file" / "a.md")
    assert result.exit_code == 7
    assert len(result.stderr.splitlines()) == 1


def test_own_prices_change_the_cost_column(records: Path, tmp_path: Path) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text(
        '[[gpu]]\ngpu = "cpu"\nkind = "cloud"\nname = "mine"\nusd_per_gpu_h = 36.0\nsource = "contract"\ndate = "2026"\n',
        encoding="utf-8",
    )
    result = report(records, "--prices", prices)
    assert result.exit_code == 0
    assert "1 x 36 USD/h (cloud, contract, 2026)" in result.stdout
