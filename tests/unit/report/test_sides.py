"""What a person may name as a side of a comparison."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.fake_engine import fake_bundle
from support.synthetic_records import bench, engine, quality

from trtkit.report.sides import load_sides
from trtkit.spec.bundle import open_bundle
from trtkit.spec.codec import write_record
from trtkit.spec.errors import InputError, UsageError
from trtkit.spec.result import BENCH_KIND, QUALITY_KIND


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    for name in ("fp32", "int8"):
        write_record(folder / name / "bench.json", BENCH_KIND, bench(name))
        write_record(folder / name / "quality.json", QUALITY_KIND, quality(name))
    return folder


def names(sides) -> list[tuple[str, int, int]]:
    return [(side.name, len(side.bench), len(side.quality)) for side in sides]


def test_directories_of_one_engine_each(results: Path) -> None:
    sides = load_sides([str(results / "fp32"), str(results / "int8")], results)
    assert names(sides) == [("fp32", 1, 1), ("int8", 1, 1)]


def test_names_and_record_files(results: Path) -> None:
    sides = load_sides(["fp32", str(results / "int8" / "bench.json")], results)
    assert names(sides) == [("fp32", 1, 1), ("int8", 1, 0)]


def test_an_engine_directory_is_found_by_its_digest(tmp_path: Path, results: Path) -> None:
    bundle = open_bundle(fake_bundle(tmp_path, "mine"))
    ref = replace(engine("fp32"), name="mine", digest=bundle.manifest.digest)
    write_record(results / "mine.json", BENCH_KIND, replace(bench(), engine=ref))
    assert names(load_sides([str(bundle.path), "int8"], results)) == [("mine", 1, 0), ("int8", 1, 1)]


def test_an_engine_without_records_says_what_to_run(tmp_path: Path, results: Path) -> None:
    path = str(fake_bundle(tmp_path, "mine"))
    with pytest.raises(InputError, match=r"no record of this engine .*run `trtkit bench`"):
        load_sides([path, "int8"], results)
    with pytest.raises(InputError, match="does not exist"):
        load_sides([path, "int8"], tmp_path / "none")


def test_labels_tell_configurations_of_one_engine_apart(results: Path) -> None:
    for label in ("calm", "busy"):
        record = replace(bench("fp32-h2o"), engine=engine("fp32-h2o", label=label))
        write_record(results / f"{label}.json", BENCH_KIND, record)
    write_record(results / "shared.json", QUALITY_KIND, quality("fp32-h2o"))
    assert names(load_sides(["calm", "busy"], results)) == [("calm", 1, 1), ("busy", 1, 1)]


def test_a_directory_of_several_engines_is_refused_with_their_names(results: Path) -> None:
    with pytest.raises(UsageError, match=r"holds records of 2 engines \(fp32, int8\)"):
        load_sides([str(results), "int8"], results)


def test_an_unknown_name_lists_what_is_there(results: Path) -> None:
    with pytest.raises(InputError, match="there are int8"):
        load_sides(["int9", "fp32"], results)


def test_one_side_is_not_a_comparison(results: Path) -> None:
    with pytest.raises(UsageError, match="at least two"):
        load_sides(["fp32"], results)


def test_a_damaged_record_is_named_and_nothing_is_compared(results: Path) -> None:
    (results / "fp32" / "bench.json").write_text('{"kind": "bench", "schema_version": 1, "data": {}}')
    with pytest.raises(InputError, match=r"bench\.json"):
        load_sides(["fp32", "int8"], results)
