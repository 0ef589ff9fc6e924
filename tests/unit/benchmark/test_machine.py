from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import pytest

from trtkit.benchmark import machine
from trtkit.spec.dtype import DType
from trtkit.spec.limits import READ_BYTES_S, matmul_key, matmul_limit, read_key, read_limit
from trtkit.spec.measured import Measured, Source


@pytest.fixture(autouse=True)
def _fresh_cache() -> None:
    machine.measured_limits.cache_clear()


def test_rates_of_this_cpu_are_positive_and_small_buffers_are_no_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CPU_LARGE", 32 << 20)
    monkeypatch.setattr(machine, "_BUFFERS", (1 << 20, 4 << 20))
    monkeypatch.setattr(machine, "_CPU_SIDES", (64,))
    rates = machine.measure("cpu", budget_s=0.002)
    assert set(rates) == {
        READ_BYTES_S,
        read_key(1 << 20),
        read_key(4 << 20),
        *(matmul_key(dtype) for dtype in (DType.FP32, DType.BF16, DType.FP16)),
    }
    assert min(rates.values()) > 0
    assert rates[read_key(1 << 20)] >= rates[read_key(4 << 20)] >= rates[READ_BYTES_S]


def test_measured_in_another_process_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run(command: list[str], **_options: object) -> SimpleNamespace:
        calls.append(command)
        return SimpleNamespace(stdout="a warning\n" + json.dumps({READ_BYTES_S: 2.0, matmul_key(DType.FP32): 3.0}))

    monkeypatch.setattr(subprocess, "run", run)
    found = machine.measured_limits("cuda:1")
    assert machine.measured_limits("cuda:1") is found
    assert [command[1:] for command in calls] == [["-m", "trtkit.benchmark.machine", "cuda"]]
    assert (found[READ_BYTES_S].value, found[READ_BYTES_S].unit) == (2.0, "B/s")
    assert found[matmul_key(DType.FP32)].unit == "FLOP/s"


def test_a_machine_that_cannot_be_measured_has_no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_options: object) -> SimpleNamespace:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", run)
    assert machine.measured_limits("cuda") == {}


def test_a_working_set_is_bound_by_the_largest_buffer_that_is_no_larger() -> None:
    def rate(value: float) -> Measured:
        return Measured(value=value, unit="B/s", source=Source.MEASURED)

    limits = {READ_BYTES_S: rate(1), read_key(64): rate(2), read_key(16): rate(3)}
    assert [read_limit(limits, size).value for size in (1, 16, 63, 64, 65)] == [3, 3, 3, 2, 1]
    assert read_limit({READ_BYTES_S: rate(1)}, 5).value == 1
    assert read_limit({}, 5) is None
    assert matmul_limit(limits, DType.FP32) is None
