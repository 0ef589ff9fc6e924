from __future__ import annotations

from pathlib import Path

import pytest
from support.synthetic_records import bench, quality

from trtkit.report.records import load_records
from trtkit.spec.codec import dumps_record, write_record
from trtkit.spec.errors import InputError


def store(directory: Path) -> tuple[Path, Path]:
    paths = directory / "cell.json", directory / "deep" / "score.json"
    write_record(paths[0], "bench", bench())
    write_record(paths[1], "quality", quality())
    return paths


def test_a_directory_is_searched_to_the_bottom(tmp_path: Path) -> None:
    store(tmp_path)
    records = load_records([tmp_path])
    assert (records.bench, records.quality, records.problems) == ((bench(),), (quality(),), ())


def test_a_record_given_twice_is_read_once(tmp_path: Path) -> None:
    cell, _ = store(tmp_path)
    assert len(load_records([cell, tmp_path, cell]).bench) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param('{"kind": "bench", "schema', "not JSON", id="truncated"),
        pytest.param('{"kind": "bench", "schema_version": 1, "data": {}}', "'engine' is missing", id="empty"),
        pytest.param('{"kind": "bench", "schema_version": 99, "data": {}}', "schema version 99", id="newer"),
        pytest.param(dumps_record("bench", bench()).replace('"osl": 32', '"osl": 0'), "osl=0", id="absurd"),
        pytest.param("[" * 100_000, "nested too deeply", id="bomb"),
    ],
)
def test_a_damaged_record_is_one_line_that_names_the_file_and_the_rest_is_read(
    tmp_path: Path, text: str, said: str
) -> None:
    store(tmp_path)
    bad = tmp_path / "bad.json"
    bad.write_text(text, encoding="utf-8")
    records = load_records([tmp_path])
    assert (len(records.bench), len(records.quality), len(records.problems)) == (1, 1, 1)
    line = records.problems[0]
    assert line.startswith(f"{bad}: ")
    assert said in line
    assert "\n" not in line


def test_binary_rubbish_is_a_damaged_record(tmp_path: Path) -> None:
    store(tmp_path)
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe\x00")
    assert len(load_records([tmp_path]).problems) == 1


def test_other_json_in_a_searched_directory_is_passed_over(tmp_path: Path) -> None:
    store(tmp_path)
    (tmp_path / "report.json").write_text('{"kind": "report", "schema_version": 1, "data": {}}', encoding="utf-8")
    (tmp_path / "list.json").write_text("[1, 2]", encoding="utf-8")
    assert load_records([tmp_path]).problems == ()


def test_a_named_file_of_another_kind_is_a_problem(tmp_path: Path) -> None:
    cell, _ = store(tmp_path)
    other = tmp_path / "report.json"
    other.write_text('{"kind": "report", "schema_version": 1, "data": {}}', encoding="utf-8")
    (problem,) = load_records([cell, other]).problems
    assert "'report'" in problem


def test_nothing_readable_is_refused_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"nothing to report: .*bad\.json"):
        load_records([tmp_path])


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no bench or quality record in"):
        load_records([tmp_path])


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or directory"):
        load_records([tmp_path / "gone"])
