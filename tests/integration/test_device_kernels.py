"""The device path through its Triton kernels: in the interpreter it writes the CPU engine's tokens, and it compiles."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.slow,
]


def _run(module: str, *arguments: str, interpreted: bool) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_INTERPRET": "1"} if interpreted else {}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("tests", "", "plugins/h2o"))
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    ("policy", "cache", "weights"), [("full", "fp16", "int8"), ("h2o:32", "fp16", "fp16"), ("snapkv:32", "fp8", "int8")]
)
def test_kernels_write_the_cpu_engines_tokens(policy: str, cache: str, weights: str) -> None:
    _run("support.triton_engine", policy, cache, weights, interpreted=True)


def test_every_kernel_the_engine_launches_compiles_for_hopper() -> None:
    launched = set(_run("support.compile_engine", interpreted=False).split())
    expected = {"_linear", "_decode", "_prefill", "_score", "_compact", "_rope_write", "_add_rms_norm", "_silu_mul"}
    assert expected <= launched, f"not launched: {expected - launched}"
