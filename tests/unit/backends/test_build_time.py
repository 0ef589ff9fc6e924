"""Expected build times: scaled from earlier builds of the same kind, else assumed from published logs, else unknown."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from trtkit.backends.build_time import expected_seconds, in_words
from trtkit.spec.bundle import Manifest, file_entry, write_manifest
from trtkit.spec.catalog import model_preset
from trtkit.spec.kv import KVFidelity
from trtkit.spec.measured import Source
from trtkit.spec.plan import BuildPlan, Parallelism
from trtkit.spec.quant import quant_for
from trtkit.spec.units import GIB

PLAN = BuildPlan(
    name="p", model=model_preset("llama-3-70b"), model_source="x", gpu="h100-sxm", quant=quant_for("int8"),
    target="tensorrt",
)  # fmt: skip
PHASES = {"convert": 100.0, "verify": 20.0, "trtllm-build": 60.0, "manifest": 20.0}


def earlier(folder: Path, plan: BuildPlan, phases: dict[str, float], name: str = "old") -> None:
    path = folder / f"{name}.engine"
    (path / "engine").mkdir(parents=True)
    (path / "engine" / "rank0.engine").write_bytes(bytes(1000))
    files = {"engine/rank0.engine": file_entry(path / "engine" / "rank0.engine")}
    manifest = Manifest(
        plan=plan, fidelity=KVFidelity.EXACT, versions={}, files=files, created_utc="", phases_s=phases
    )  # fmt: skip
    write_manifest(path, manifest)


def test_without_an_earlier_build_published_logs_give_a_range_that_says_assumed(tmp_path: Path) -> None:
    found = expected_seconds(PLAN, tmp_path, 68 * GIB)
    assert found is not None
    assert found.source is Source.ASSUMED
    assert found.low is not None
    assert found.high is not None
    assert (found.low, found.high) == (pytest.approx(98), pytest.approx(608))
    assert found.low < found.value < found.high
    assert "assumed" in in_words(found)


def test_ranks_are_built_side_by_side(tmp_path: Path) -> None:
    one = expected_seconds(PLAN, tmp_path, 68 * GIB)
    two = expected_seconds(dataclasses.replace(PLAN, parallel=Parallelism(tp=2)), tmp_path, 68 * GIB)
    assert one is not None
    assert two is not None
    assert two.value < one.value


def test_an_earlier_build_of_the_kind_is_scaled_by_its_weights(tmp_path: Path) -> None:
    earlier(tmp_path, PLAN, PHASES)
    found = expected_seconds(PLAN, tmp_path, 3000)
    assert found is not None
    assert (found.value, found.source) == (600.0, Source.MODELED)
    assert in_words(found) == "about 10 min (modeled from p, by the weights' size)"


def test_resumed_and_foreign_builds_are_no_guide(tmp_path: Path) -> None:
    earlier(tmp_path, PLAN, {"trtllm-build": 60.0, "manifest": 1.0}, "resumed")
    earlier(tmp_path, dataclasses.replace(PLAN, gpu="h200"), PHASES, "other")
    (tmp_path / "broken.engine").mkdir()
    (tmp_path / "broken.engine" / "trtkit.json").write_text("{")
    found = expected_seconds(PLAN, tmp_path, 3000)
    assert found is not None
    assert found.source is Source.ASSUMED


def test_where_nothing_is_known_nothing_is_claimed(tmp_path: Path) -> None:
    embedded = dataclasses.replace(PLAN, target="embedded")
    assert expected_seconds(embedded, tmp_path, 1) is None
    assert "not known" in in_words(None)
