"""An engine that falls silent on a GPU box where nobody watches: it is ended, told, and opened again for other cells."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from bench.gpu import llama70b, sweep
from bench.gpu import rows as table

ROOT = Path(__file__).parents[2]


def test_silence_costs_a_cell_and_not_the_rest_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [str(ROOT), str(ROOT / "tests"), str(ROOT / "plugins" / "h2o")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(parts))
    monkeypatch.setattr(sweep, "STALL_S", 0.5)
    job = llama70b.Job(
        out=tmp_path,
        scale=table.rehearsal_scale(),
        rows=["int8"],
        cells=None,
        limits={},
        time_limit_s=900.0,
        opener="support.fake_dummy:open_hanging",
        say=lambda _text: None,
    )
    started = time.monotonic()
    (row,) = llama70b.run(job).rows
    assert time.monotonic() - started < 60
    measured = {cell.name for cell in row.cells if cell.not_run is None}
    assert measured == {"c1-isl512", "c1-isl4096"}
    assert all("said nothing for 0.5 s" in cell.not_run for cell in row.cells if cell.name not in measured)
