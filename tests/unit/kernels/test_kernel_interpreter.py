"""Triton chooses its interpreter when it is first imported; where that is too late, a fresh process runs the file."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = (
    "test_fused_fp8_kernels.py",
    "test_fused_kernels.py",
    "test_layer_kernels.py",
    "test_matmul_kernels.py",
    "test_odd_shape_kernels.py",
    "test_odd_value_kernels.py",
    "test_paged_kernels.py",
    "test_prefill_kernels.py",
    "test_ranking_kernels.py",
    "test_sampling_kernels.py",
    "test_selfcheck_kernels.py",
    "test_slots_kernels.py",
    "../engine/device/test_eviction_kernels.py",
)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("file", FILES)
def test_kernels_run_in_the_interpreter_even_where_triton_came_first(file):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the file ran in this very process")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    folder = Path(__file__).parent
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "skipped" not in done.stdout
