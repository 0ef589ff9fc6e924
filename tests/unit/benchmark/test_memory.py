from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from support.fake_engine import FakeEngine

from trtkit.benchmark import memory
from trtkit.benchmark.memory import NvmlGauge, PeakSampler, RssGauge, gauge_for, split
from trtkit.spec.units import MIB

HOLD = "import sys; block = bytearray({size}); print('ready', flush=True); sys.stdin.readline()"


def held(size: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(size=size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    return process


def test_resident_set_of_another_process_is_seen() -> None:
    with held(0) as small, held(64 * MIB) as large:
        difference = RssGauge(large.pid).read_bytes() - RssGauge(small.pid).read_bytes()
        for process in (small, large):
            process.communicate("\n")
    assert 60 * MIB < difference < 80 * MIB, "64 MiB, and what the interpreters share differently"


def test_descendants_count() -> None:
    with held(64 * MIB) as child:
        assert RssGauge(os.getpid()).read_bytes() > RssGauge(child.pid).read_bytes() + 5 * MIB
        child.communicate("\n")


def test_a_process_that_is_gone_has_no_memory_rather_than_none_used() -> None:
    with held(0) as process:
        process.communicate("\n")
    assert RssGauge(process.pid).read_bytes() is None


class Script:
    """A gauge that reads a list."""

    method = "script"

    def __init__(self, *values: int | None) -> None:
        self._values = list(values)

    def read_bytes(self) -> int | None:
        return self._values.pop(0) if self._values else None


def test_the_peak_is_the_largest_reading_and_unknown_readings_are_skipped() -> None:
    gauge = Script(5, None, 9, 7)
    with PeakSampler(gauge, interval_s=0.0005) as sampler:
        while gauge._values:
            pass
    assert sampler.peak_bytes == 9


def test_nothing_read_leaves_the_peak_unknown() -> None:
    with PeakSampler(Script()) as sampler:
        pass
    assert sampler.peak_bytes is None
    with PeakSampler(None) as sampler:
        pass
    assert sampler.peak_bytes is None


def fake_nvml(used: dict[int, int], processes: dict[int, dict[int, int]]) -> SimpleNamespace:
    """pynvml's functions over devices (the handle is the index): bytes in use, and bytes by process."""
    return SimpleNamespace(
        NVMLError=ZeroDivisionError,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetComputeRunningProcesses=lambda handle: [
            SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in processes[handle].items()
        ],
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=used[handle]),
    )


def test_gpu_memory_is_that_of_the_process_on_all_devices_and_of_nobody_else() -> None:
    me = os.getpid()
    nvml = fake_nvml({0: 900, 1: 900}, {0: {me: 10, 1: 500}, 1: {me: 20}})
    assert NvmlGauge(me, nvml, {0: 0, 1: 0}).read_bytes() == 30


def test_gpu_memory_of_a_process_that_nvml_names_otherwise_is_the_growth_since_the_start() -> None:
    nvml = fake_nvml({0: 900, 1: 300}, {0: {999_999: 10}, 1: {}})
    assert NvmlGauge(os.getpid(), nvml, {0: 100, 1: 400}).read_bytes() == 800


def test_a_driver_that_lists_no_processes_leaves_the_growth_and_one_that_says_nothing_leaves_it_unknown() -> None:
    def refuse(_: object) -> None:
        raise ZeroDivisionError

    nvml = fake_nvml({0: 900}, {0: {os.getpid(): 10}})
    nvml.nvmlDeviceGetComputeRunningProcesses = refuse
    assert NvmlGauge(os.getpid(), nvml, {0: 100}).read_bytes() == 800
    nvml.nvmlDeviceGetMemoryInfo = refuse
    with PeakSampler(NvmlGauge(os.getpid(), nvml, {0: 100}), interval_s=0.0005) as sampler:
        pass
    assert sampler.peak_bytes is None


def test_without_psutil_a_gpu_process_is_still_found_by_its_own_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_HAS_PSUTIL", False)
    nvml = fake_nvml({0: 900}, {0: {4321: 10, 1: 500}})
    assert NvmlGauge(4321, nvml, {0: 0}).read_bytes() == 10
    assert RssGauge(os.getpid()).read_bytes() is None


def test_an_engine_in_this_process_cannot_be_told_apart_and_a_gpu_needs_a_baseline() -> None:
    info = FakeEngine().info
    assert gauge_for(info, None) is None
    assert gauge_for(replace(info, pid=1), None).method == "rss"
    assert gauge_for(replace(info, pid=1, device="cuda:0"), None) is None
    assert gauge_for(replace(info, pid=1, device="cuda:0"), (fake_nvml({}, {}), {})).method == "nvml"


def test_the_split_adds_up_and_says_what_it_does_not_know() -> None:
    engine = FakeEngine()
    stats = [replace(engine.kv_stats(), blocks_peak=3, side_bytes=5), replace(engine.kv_stats(), blocks_peak=7)]
    whole = split(engine.info, stats, 300_000, "rss")
    assert whole.weight_bytes + whole.kv_pool_bytes + whole.other_bytes == whole.peak_bytes == 300_000
    assert whole.kv_peak_bytes == 7 * 64 + 5
    assert split(engine.info, stats, None, "none").other_bytes is None
    assert split(engine.info, stats, 10, "rss").other_bytes is None
    assert split(engine.info, [], 10, "rss").kv_peak_bytes is None
