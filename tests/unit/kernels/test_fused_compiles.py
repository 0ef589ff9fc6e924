"""Serving must never wait for a compiler: what differs from step to step may not ask for another kernel."""

from __future__ import annotations

import collections
import importlib.util

import pytest
from support.compile_only import compiled_rows


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.slow
def test_offsets_and_counts_of_a_step_compile_nothing_new():
    rows = compiled_rows(["offsets"], [90])
    counts = collections.Counter(f"{row.case} {row.kernel}" for row in rows)
    assert counts == {
        "offsets: rope _rope_write": 1,
        "offsets: embed _embed": 1,
        "offsets: norm _add_rms_norm": 1,
        "offsets: greedy _best_of_tile": 1,
        "offsets: greedy _best_of_tiles": 1,
    }
