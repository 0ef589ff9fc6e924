from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from trtkit.benchmark.clocks import ClockGauge, ClockReport, ClockSampler, clock_check, clock_gauge, report


class NvmlError(Exception):
    pass


def fake_nvml(clocks: dict[int, list[int]], reasons: dict[int, int] | None = None, **more: object) -> SimpleNamespace:
    """pynvml over devices (the handle is the index); each reading of a clock takes the next of its list."""

    def clock(handle: int, _kind: int) -> int:
        values = clocks[handle]
        if not values:
            raise NvmlError
        return values.pop(0) if len(values) > 1 else values[0]

    return SimpleNamespace(
        NVMLError=NvmlError,
        NVML_CLOCK_SM=1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetClockInfo=clock,
        nvmlDeviceGetMaxClockInfo=lambda _handle, _kind: 1980,
        nvmlDeviceGetCurrentClocksEventReasons=lambda handle: (reasons or {}).get(handle, 0),
        **more,
    )


def seen(*clocks: int, reasons: int = 0) -> ClockReport:
    return report(0, [(clock, reasons) for clock in clocks], 1980)


def test_a_steady_clock_passes_and_is_told() -> None:
    check = clock_check([seen(*[1980] * 10)])
    assert (check.name, check.status) == ("gpu_clock", "pass")
    assert "1980 MHz" in check.detail


def test_a_clock_that_falls_by_more_than_a_tenth_makes_the_cell_invalid() -> None:
    assert clock_check([seen(*[1980] * 10, *[1700] * 10)]).status == "fail"
    assert clock_check([seen(*[1980] * 10, *[1800] * 10)]).status == "pass"


@pytest.mark.parametrize("bit", [0x08, 0x20, 0x40, 0x80])
def test_heat_and_power_brakes_make_the_cell_invalid_even_when_seen_once(bit: int) -> None:
    readings = [(1980, 0)] * 20 + [(1980, bit)]
    check = clock_check([report(3, readings, 1980)])
    assert check.status == "fail"
    assert "device 3" in check.detail
    assert "1 samples" in check.detail


def test_the_boards_own_power_cap_is_told_and_fails_nothing() -> None:
    check = clock_check([seen(*[1700] * 10, reasons=0x4)])
    assert check.status == "pass"
    assert "power-capped in 10 samples" in check.detail


def test_idle_samples_do_not_count_as_a_fallen_clock() -> None:
    readings = [(1980, 0)] * 20 + [(345, 0x1)] * 20
    assert clock_check([report(0, readings, 1980)]).status == "pass"


def test_a_clock_locked_low_is_a_warning() -> None:
    assert clock_check([seen(*[800] * 10)]).status == "warn"


def test_too_few_samples_judge_nothing_but_a_fault_is_a_fault() -> None:
    assert clock_check([seen(1980, 300)]).status == "skipped"
    assert clock_check([seen(1980, reasons=0x40)]).status == "fail"
    assert clock_check([]).status == "skipped"


def test_the_worst_device_decides() -> None:
    good, hot = seen(*[1980] * 10), report(1, [(1980, 0x20)] * 10, 1980)
    check = clock_check([good, hot])
    assert check.status == "fail"
    assert "device 0" in check.detail
    assert "device 1" in check.detail


def test_only_devices_whose_memory_grew_are_the_engines() -> None:
    used = {0: 10 << 30, 1: 1 << 30}
    nvml = fake_nvml({0: [1980], 1: [345]}, nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=used[handle]))
    gauge = clock_gauge((nvml, {0: 1 << 30, 1: 1 << 30}))
    assert gauge is not None
    assert gauge.read() == {0: (1980, 0)}
    assert clock_gauge((nvml, used)) is None
    assert clock_gauge(None) is None


def test_a_device_that_does_not_answer_is_left_out() -> None:
    assert ClockGauge(fake_nvml({0: [], 1: [1500]}, {1: 4}), [0, 1]).read() == {1: (1500, 4)}


def test_an_older_driver_library_calls_the_reasons_by_another_name() -> None:
    nvml = fake_nvml({0: [1500]}, {0: 4})
    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = nvml.nvmlDeviceGetCurrentClocksEventReasons
    del nvml.nvmlDeviceGetCurrentClocksEventReasons
    assert ClockGauge(nvml, [0]).read() == {0: (1500, 4)}


def test_the_sampler_collects_until_its_block_ends() -> None:
    with ClockSampler(ClockGauge(fake_nvml({0: [1900]}), [0]), interval_s=0.0005) as sampler:
        deadline = time.monotonic() + 60
        while len(sampler._seen) < 10 and time.monotonic() < deadline:
            time.sleep(0.001)
    (found,) = sampler.reports()
    assert set(found.busy_mhz) == {1900}
    assert found.max_mhz == 1980


def test_without_a_gauge_nothing_is_sampled() -> None:
    with ClockSampler(None) as sampler:
        pass
    assert sampler.reports() == ()
