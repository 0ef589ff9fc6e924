"""Did the GPU keep its speed while a cell ran? SM clock and throttle reasons, sampled through NVML outside the engine.

A number measured on a hot or power-braked card says nothing about the engine, so such a cell is invalid. The board's own
power limit is part of the product: it is told, and fails nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from types import TracebackType
from typing import Any

from trtkit.benchmark.checks import FAIL, PASS, SKIPPED, WARN
from trtkit.spec.result import Check

CHECK_NAME = "gpu_clock"
INTERVAL_S = 0.1
MAX_FALL = 0.10
"""A clock that ends this share below where it began has fallen."""
MIN_SAMPLES = 8
_IDLE = 0x1
_POWER_CAP = 0x4
_FAULTS: Mapping[int, str] = {
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}
"""Bits of NVML's clock event reasons (nvml.h) that mean a fault of the machine; the power cap (0x4) is none."""

Reading = tuple[int, int]
"""SM clock in MHz and the reasons' bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClockReport:
    """What was seen on one device: clocks of the samples in which it worked, and how many samples had each reason."""

    device: int
    max_mhz: int | None
    busy_mhz: tuple[int, ...]
    reasons: Mapping[str, int]
    capped: int


class ClockGauge:
    """Reads the devices that an engine runs on. A device that will not answer is left out of that sample."""

    def __init__(self, nvml: Any, devices: Sequence[int]) -> None:  # noqa: ANN401 - pynvml is untyped
        self._nvml = nvml
        self._handles = {index: nvml.nvmlDeviceGetHandleByIndex(index) for index in devices}

    def read(self) -> dict[int, Reading]:
        """Clock and reasons by device."""
        found = {}
        for index, handle in self._handles.items():
            try:
                clock = self._nvml.nvmlDeviceGetClockInfo(handle, self._nvml.NVML_CLOCK_SM)
                found[index] = (int(clock), int(self._reasons()(handle)))
            except self._nvml.NVMLError:
                continue
        return found

    def max_mhz(self) -> dict[int, int]:
        """The highest SM clock of each device that tells it."""
        found = {}
        for index, handle in self._handles.items():
            try:
                found[index] = int(self._nvml.nvmlDeviceGetMaxClockInfo(handle, self._nvml.NVML_CLOCK_SM))
            except self._nvml.NVMLError:
                continue
        return found

    def _reasons(self) -> Callable[[Any], int]:
        """NVML renamed the call: event reasons since driver 535, throttle reasons before."""
        name = "nvmlDeviceGetCurrentClocksEventReasons"
        if not hasattr(self._nvml, name):
            name = "nvmlDeviceGetCurrentClocksThrottleReasons"
        call: Callable[[Any], int] = getattr(self._nvml, name)
        return call


def clock_gauge(baseline: tuple[Any, dict[int, int]] | None, *, grown_bytes: int = 1 << 28) -> ClockGauge | None:
    """A gauge of the devices whose memory in use grew since `baseline`, which are the engine's; None without NVML."""
    if baseline is None:
        return None
    nvml, used_before = baseline
    try:
        handles = {index: nvml.nvmlDeviceGetHandleByIndex(index) for index in used_before}
        grown = [i for i, h in handles.items() if nvml.nvmlDeviceGetMemoryInfo(h).used - used_before[i] >= grown_bytes]
    except nvml.NVMLError:
        return None
    return ClockGauge(nvml, grown) if grown else None


class ClockSampler:
    """Reads a gauge ten times a second in a thread while the `with` block runs."""

    def __init__(self, gauge: ClockGauge | None, *, interval_s: float | None = None) -> None:
        self._gauge = gauge
        self._interval_s = INTERVAL_S if interval_s is None else interval_s
        self._seen: list[dict[int, Reading]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="clock-sampler", daemon=True)

    def __enter__(self) -> ClockSampler:
        if self._gauge is not None:
            self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._gauge is not None:
            self._thread.join()

    def _run(self) -> None:
        assert self._gauge is not None
        self._seen.append(self._gauge.read())
        while not self._stop.wait(self._interval_s):
            self._seen.append(self._gauge.read())

    def reports(self) -> tuple[ClockReport, ...]:
        """One report a device; none without a gauge or a sample."""
        if self._gauge is None:
            return ()
        most = self._gauge.max_mhz()
        devices = sorted({device for sample in self._seen for device in sample})
        return tuple(
            report(device, [sample[device] for sample in self._seen if device in sample], most.get(device))
            for device in devices
        )


def report(device: int, readings: Sequence[Reading], max_mhz: int | None) -> ClockReport:
    """The readings of one device, those while it idled left out of the clocks."""
    busy = [clock for clock, reasons in readings if not reasons & _IDLE]
    counts = {name: sum(bool(reasons & bit) for _, reasons in readings) for bit, name in _FAULTS.items()}
    return ClockReport(
        device=device,
        max_mhz=max_mhz,
        busy_mhz=tuple(busy),
        reasons={name: count for name, count in counts.items() if count},
        capped=sum(bool(reasons & _POWER_CAP) for _, reasons in readings),
    )


def clock_check(reports: Sequence[ClockReport]) -> Check:
    """Fails where a device was slowed by heat or a power brake, or its clock fell by a tenth while the cell ran."""
    if not reports:
        return Check(name=CHECK_NAME, status=SKIPPED, detail="no clock was sampled")
    rows = [_judge(found) for found in reports]
    worst = next(status for status in (FAIL, WARN, PASS, SKIPPED) if status in {row[0] for row in rows})
    return Check(name=CHECK_NAME, status=worst, detail="; ".join(detail for _, detail in rows))


def _judge(found: ClockReport) -> tuple[str, str]:
    where = f"device {found.device}"
    if found.reasons:
        seen = ", ".join(f"{name} in {count} samples" for name, count in found.reasons.items())
        return FAIL, f"{where}: slowed by {seen}; cool the machine or give it power, then measure again"
    clocks = found.busy_mhz
    if len(clocks) < MIN_SAMPLES:
        return SKIPPED, f"{where}: {len(clocks)} samples at work are too few to judge its clock"
    first, last = _ends(clocks)
    text = f"{where}: SM clock {first:.0f} MHz at first, {last:.0f} at last (most: {found.max_mhz or 'unknown'})"
    if found.capped:
        text += f", power-capped in {found.capped} samples"
    if last < first * (1 - MAX_FALL):
        return FAIL, f"{text}: it fell while the cell ran, so its repeats do not compare"
    if found.max_mhz is not None and median(clocks) < found.max_mhz / 2:
        return WARN, f"{text}: it ran below half its highest clock"
    return PASS, text


def _ends(clocks: Sequence[int]) -> tuple[float, float]:
    """Medians of the first and the last quarter."""
    quarter = max(len(clocks) // 4, 1)
    return median(clocks[:quarter]), median(clocks[-quarter:])
