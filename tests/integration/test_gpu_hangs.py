"""An engine that falls silent on a GPU box where nobody watches: it is ended, told, and opened again for other cells."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.gpu import llama70b, sweep
from bench.gpu import rows as table

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("failure", [TypeError("nvml"), AttributeError("nvml"), ZeroDivisionError("rate")], ids=repr)
def test_whatever_fails_around_a_cell_costs_that_cell_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    parts = [str(ROOT), str(ROOT / "tests"), str(ROOT / "plugins" / "h2o")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(parts))
    judge, seen = sweep.judged, []

    def broken_once(*args: object) -> object:
        seen.append(args)
        if len(seen) == 1:
            raise failure
        return judge(*args)

    monkeypatch.setattr(sweep, "judged", broken_once)
    job = llama70b.Job(
        out=tmp_path,
        scale=table.rehearsal_scale(),
        rows=["int8"],
        cells=["c1-isl512", "c1-isl4096"],
        limits={},
        time_limit_s=900.0,
        opener="support.fake_dummy:open_scripted",
        say=lambda _text: None,
    )
    (row,) = llama70b.run(job).rows
    assert [cell.result is not None for cell in row.cells] == [False, True]
    assert str(failure) in row.cells[0].not_run


def test_silence_costs_a_cell_and_not_the_rest_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [str(ROOT), str(ROOT / "tests"), str(ROOT / "plugins" / "h2o")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(parts))
    monkeypatch.setattr(sweep, "STALL_S", 5.0)  # more than a busy machine makes a healthy engine wait
    job = llama70b.Job(
        out=tmp_path,
        scale=table.rehearsal_scale(),
        rows=["int8"],
        cells=["c1-isl512", "c32-isl512", "c1-isl4096"],
        limits={},
        time_limit_s=900.0,
        opener="support.fake_dummy:open_hanging",
        say=lambda _text: None,
    )
    (row,) = llama70b.run(job).rows
    measured = {cell.name for cell in row.cells if cell.not_run is None}
    assert measured == {"c1-isl512", "c1-isl4096"}
    (silent,) = [cell for cell in row.cells if cell.name not in measured]
    assert "said nothing for 5 s" in silent.not_run
