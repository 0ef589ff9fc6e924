"""A kernel that is compiled in the middle of serving makes every request wait a second: eviction's are compiled once."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
# Prompts and decoding rank rows of one power of two here; another power is another kernel, which opening compiles.
POLICIES = [
    "h2o:38,interval=8",
    "h2o:37,interval=5,scorer=decay",
    "snapkv:36,recent=8,interval=8",
    "random:40,interval=3",
]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_no_kernel_is_compiled_twice_whatever_lengths_layers_and_places_come():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    parts = [str(ROOT / "tests"), str(ROOT), str(ROOT / "plugins" / "h2o"), environment.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(parts), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "support.eviction_variants", *POLICIES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["rounds"] > 60
    scored = {"_score", "_keep_best", "_flag", "_compact"}
    assert [set(seen["counts"][kv]) for kv in POLICIES] == [scored, scored, scored, scored - {"_score"}]
    assert {count for counts in seen["counts"].values() for count in counts.values()} == {1}, seen
