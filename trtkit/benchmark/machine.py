"""Measured ceilings of this machine's device: how fast it reads memory and multiplies matrices.

Measured in a process of its own (`python -m trtkit.benchmark.machine cpu`), so that neither torch nor a CUDA context
stays behind in the process that watches memory. The best of several rounds counts: a ceiling is what was reached.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from trtkit.spec.dtype import DType
from trtkit.spec.limits import READ_BYTES_S, matmul_key, read_key
from trtkit.spec.measured import Measured, Source
from trtkit.spec.units import MIB

_DTYPES = (DType.FP32, DType.BF16, DType.FP16)
_BUFFERS = (MIB, 4 * MIB, 16 * MIB, 64 * MIB)
_CPU_LARGE, _GPU_LARGE = 512 * MIB, 4096 * MIB
_CPU_SIDES, _GPU_SIDES = (512, 1536), (4096, 8192)
_FP8_CAPABILITY = (8, 9)
_BUDGET_S = 0.25
_TIMEOUT_S = 180.0


@cache
def measured_limits(device: str) -> Mapping[str, Measured]:
    """Ceilings of `device` ("cpu" or "cuda"); a few seconds the first time, empty if it cannot be measured."""
    return remeasured_limits(device)


def best_of(first: Mapping[str, Measured], second: Mapping[str, Measured]) -> Mapping[str, Measured]:
    """The higher of two measurements of each ceiling: something else may have held the machine during one."""
    both = {**first, **second}
    return {
        key: max((limits[key] for limits in (first, second) if key in limits), key=lambda m: m.value) for key in both
    }


def remeasured_limits(device: str) -> Mapping[str, Measured]:
    """The same, measured now."""
    command = [sys.executable, "-m", "trtkit.benchmark.machine", "cuda" if device.startswith("cuda") else "cpu"]
    try:
        result = subprocess.run(  # noqa: S603 - our own module
            command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S
        )
        rates = json.loads(result.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}
    return {
        key: Measured(
            value=value,
            unit="B/s" if key.startswith(READ_BYTES_S) else "FLOP/s",
            source=Source.MEASURED,
            note="best of several rounds, torch, this machine",
        )
        for key, value in rates.items()
    }


def measure(device: str, *, budget_s: float = _BUDGET_S) -> dict[str, float]:
    """Rates by the keys of `trtkit.spec.limits`, each given about `budget_s` seconds."""
    import torch

    synchronize: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else _nothing
    with torch.inference_mode():
        rates = _read_rates(device, synchronize, budget_s)
        for dtype in _DTYPES:
            rates[matmul_key(dtype)] = _matmul_rate(dtype, device, synchronize, budget_s)
        if device == "cuda" and torch.cuda.get_device_capability() >= _FP8_CAPABILITY:
            with contextlib.suppress(RuntimeError):  # torch without these kernels: the rate stays unknown
                rates[matmul_key(DType.FP8)] = _matmul_rate(DType.FP8, device, synchronize, budget_s)
    return rates


def _read_rates(device: str, synchronize: Callable[[], None], budget_s: float) -> dict[str, float]:
    """Sums over buffers, largest first: what a larger buffer reached, a smaller one can too."""
    import torch

    large = _GPU_LARGE if device == "cuda" else _CPU_LARGE
    best, rates = 0.0, {}
    for buffer_bytes in (large, *reversed(_BUFFERS)):
        buffer = torch.ones(buffer_bytes // 4, dtype=torch.float32, device=device)
        best = max(best, buffer_bytes / _best_s(buffer.sum, synchronize, budget_s))
        rates[READ_BYTES_S if buffer_bytes == large else read_key(buffer_bytes)] = best
        del buffer
    return rates


def _matmul_rate(dtype: DType, device: str, synchronize: Callable[[], None], budget_s: float) -> float:
    """Best of two sizes; the larger is left out where it would take far longer than its budget."""
    best = 0.0
    for side in _GPU_SIDES if device == "cuda" else _CPU_SIDES:
        operations = 2.0 * side**3
        if best and operations / best > budget_s:
            break
        best = max(best, operations / _best_s(_product(side, dtype, device), synchronize, budget_s))
    return best


def _product(side: int, dtype: DType, device: str) -> Callable[[], Any]:
    import torch

    if dtype is DType.FP8:
        return _fp8_product(side, device)
    left, right = (_normal(side, device).to(getattr(torch, dtype.trtllm_name)) for _ in range(2))
    return lambda: torch.mm(left, right)


def _normal(side: int, device: str) -> Any:  # noqa: ANN401 - torch is not imported at module level
    """Operands as weights and activations are: a GPU multiplies equal numbers faster, for they cost it less power."""
    import torch

    return torch.randn(side, side, device=device)


def _fp8_product(side: int, device: str) -> Callable[[], Any]:
    """8-bit floats with one scale per row and per column, the second operand column-major, as the kernels want it."""
    import torch

    left, right = (_normal(side, device).to(torch.float8_e4m3fn) for _ in range(2))
    rows, columns = torch.ones(side, 1, device=device), torch.ones(1, side, device=device)
    return lambda: torch._scaled_mm(left, right.t(), scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16)


def _best_s(work: Callable[[], Any], synchronize: Callable[[], None], budget_s: float) -> float:
    """Shortest time of one call within the budget, after one call to warm up."""
    work()
    synchronize()
    best = float("inf")
    deadline = time.perf_counter() + budget_s
    while best == float("inf") or time.perf_counter() < deadline:
        started = time.perf_counter()
        work()
        synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def _nothing() -> None:
    """A CPU's work is done when the call returns."""


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))  # noqa: T201 - the answer to the parent process
