"""What the GPU scripts share: timing, records that survive a kill, clocks, a short table.

A script puts the repository's root first on `sys.path` and imports `bench.gpu.common`: the tree needs no installation, and
the scripts' own folder leaves the path (`kernels.py` there must not pose as the package of that name).

Times are GPU time between CUDA events: of one call where it is long, of a replayed CUDA graph of many calls where it is
short, as decode runs. Inputs that a real step would read from memory rotate through copies larger than the L2 cache.
A rehearsal runs the same calls on a CPU with tiny shapes, times nothing and says so in its record.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
_HERE = str(Path(__file__).resolve().parent)
sys.path[:] = [part for part in sys.path if part != _HERE]
for _folder in (ROOT / "plugins" / "h2o", ROOT):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

from bench.gpu.sources import began_s  # noqa: E402 - the path comes first
from trtkit.benchmark.environment import fingerprint  # noqa: E402
from trtkit.benchmark.nvml import management_library  # noqa: E402
from trtkit.engine.device.capture import record, waiting_forbidden  # noqa: E402
from trtkit.spec.codec import from_plain, read_envelope, write_record  # noqa: E402
from trtkit.spec.measured import Measured  # noqa: E402
from trtkit.spec.result import Environment  # noqa: E402

Call = Callable[[int], object]
"""Something to time; its argument counts the calls and picks one of the rotating inputs."""

_SHORT_US = 500.0
_SAMPLE_US = 2_000.0
_MOST_NODES = 1024
_LAUNCH_BOUND_US = 60.0
_LAUNCH_BOUND_CALLS = 512
"""Launched one by one, calls shorter than that say more about the host than about the kernel."""
_ROTATED_OVER_L2 = 3
_WARMUP_US = 20_000.0
_REASONS = {
    0x01: "idle",
    0x02: "clocks set by an application",
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
    0x100: "display clocks",
}
"""Bits of NVML's clock event reasons (nvml.h)."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """GPU time of one call in microseconds, measured. `how`: "graph" (replayed) or "events" (launched one by one).

    `raw_us` are the samples in the order they were taken, each the mean of `calls_per_sample` calls.
    """

    median_us: float
    p10_us: float
    p90_us: float
    least_us: float
    samples: int
    calls_per_sample: int
    how: str
    note: str = ""
    raw_us: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Clocks:
    """The GPU's state at one moment, as NVML tells it; None or empty where it does not."""

    sm_mhz: int | None = None
    sm_max_mhz: int | None = None
    memory_mhz: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    reasons: tuple[str, ...] = ()


@dataclass(kw_only=True)
class Record:
    """One script's result. `lines` are what a terminal shows; `not_run` what the time limit left out."""

    rehearsal: bool
    environment: Environment
    gpu: str
    seed: int
    clocks_before: Clocks
    clocks_after: Clocks | None = None
    limits: dict[str, Measured] = field(default_factory=dict)
    rows: list[Any] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    seconds: float = 0.0
    complete: bool = False


class Session:
    """Device, time left and the record of one run; the record is written again after every item."""

    def __init__(
        self, kind: str, args: argparse.Namespace, row_type: type | None = None, *, began_s: float | None = None
    ) -> None:
        """Take stock of the machine.

        Args:
            kind: of the record.
            args: from `arguments`.
            row_type: what the record's rows are, for a run that goes on.
            began_s: since when the time limit counts, on `time.monotonic`; from now on if None.

        Raises:
            SystemExit: no CUDA device, and this is no rehearsal.
        """
        if not args.rehearse and not torch.cuda.is_available():
            raise SystemExit("no CUDA device here; --rehearse runs the same calls on a CPU, without rates")
        self.rehearsal = bool(args.rehearse)
        self.device = _device(rehearsal=self.rehearsal)
        self.kind, self.out, self._args = kind, Path(args.out), args
        self._started = time.monotonic() if began_s is None else began_s
        self._limit_s = float(args.time_limit_s)
        self.generator = torch.Generator(device=self.device).manual_seed(args.seed)
        self.l2_bytes = 0 if self.rehearsal else torch.cuda.get_device_properties(0).L2_cache_size
        self.record = Record(
            rehearsal=self.rehearsal,
            environment=fingerprint(device=self.device.type, command=(Path(sys.argv[0]).name, *sys.argv[1:])),
            gpu="none" if self.rehearsal else torch.cuda.get_device_name(0),
            seed=args.seed,
            clocks_before=clocks(rehearsal=self.rehearsal),
        )
        if args.resume_at and row_type is not None:
            self._go_on(row_type)

    @property
    def left_s(self) -> float:
        """Seconds until the time limit."""
        return self._limit_s - (time.monotonic() - self._started)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
        """Fresh normal numbers on the device, drawn a slice at a time where the result is narrow and large."""
        out = torch.empty(shape, dtype=dtype, device=self.device)
        flat, step = out.view(-1), 1 << 26
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step]
            part.copy_(torch.randn(part.shape, device=self.device, generator=self.generator).mul_(scale))
        return out

    def randint(self, low: int, high: int, shape: Sequence[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Fresh integers in [low, high)."""
        return torch.randint(low, high, tuple(shape), device=self.device, generator=self.generator, dtype=dtype)

    def copies(self, bytes_each: int, *, most: int = 8) -> int:
        """How many inputs of this size to rotate through so that none is still in the L2 cache; 1 in a rehearsal."""
        if self.rehearsal or bytes_each <= 0:
            return 1
        return min(most, max(2, math.ceil(_ROTATED_OVER_L2 * self.l2_bytes / bytes_each) + 1))

    def time(self, call: Call, copies: int = 1, *, budget_s: float = 0.3) -> Timing | None:
        """GPU time of a call; in a rehearsal it runs once and has no time."""
        if self.rehearsal:
            for index in range(copies):
                call(index)
            return None
        return time_on_gpu(call, copies, budget_s=budget_s)

    def add(self, row: Any) -> None:
        """Keep a row and write the record."""
        self.record.rows.append(row)
        self.write()

    def write(self) -> None:
        """Write the record as it stands, atomically."""
        self.record.seconds = time.monotonic() - self._started
        write_record(self.out, self.kind, self.record)

    def finish(self, lines: Sequence[str]) -> None:
        """Write the last state and print the short table."""
        self.record.clocks_after = clocks(rehearsal=self.rehearsal)
        self.record.lines = list(lines)
        self.record.complete = not self.record.not_run
        self.write()
        print("\n".join(lines))

    def items(self, planned: Sequence[tuple[str, float, Callable[[], object]]]) -> None:
        """Run named items, most important first, each if its expected seconds are left; an item that fails is noted.

        Running out of memory or a kernel that cannot run here must not cost the items after it. A fault that leaves
        the CUDA context unusable starts this script again at the next item.
        """
        for index, (name, expected_s, run) in enumerate(planned):
            if index < self._args.resume_at or (self._args.only and self._args.only not in name):
                continue
            if not self.rehearsal and self.left_s < expected_s:
                self.record.not_run.append(name)
                continue
            try:
                with torch.inference_mode():
                    run()
                    self._settle()
            except _survivable() as error:
                if self.rehearsal:
                    raise
                self.record.notes.append(f"{name}: {type(error).__name__}: {first_line(error)}")
                self.write()
                if _context_is_lost():
                    self._start_again(index + 1)
            if not self.rehearsal:
                torch.cuda.empty_cache()
            self.write()

    def _settle(self) -> None:
        """Wait for an item's work, so that its faults are told as its own."""
        if not self.rehearsal:
            torch.cuda.synchronize()

    def _start_again(self, index: int) -> None:
        print(f"the CUDA context is lost; going on at item {index} in a fresh process", file=sys.stderr, flush=True)
        # The process stays the same, and so does when it began.
        limit_s = max(0.0, self.left_s) + time.monotonic() - began_s()
        more = ["--resume-at", str(index), "--time-limit-s", f"{limit_s:.0f}", "--seed", str(self._args.seed)]
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *more])

    def _go_on(self, row_type: type) -> None:
        """Take over what the record holds from before the fresh start."""
        data = read_envelope(self.out, self.kind)
        self.record.rows = [from_plain(row_type, row) for row in data["rows"]]
        self.record.limits = {key: from_plain(Measured, value) for key, value in data["limits"].items()}
        self.record.notes, self.record.not_run = list(data["notes"]), list(data["not_run"])
        self.record.clocks_before = from_plain(Clocks, data["clocks_before"])


def arguments(doc: str | None, *, time_limit_s: float) -> argparse.ArgumentParser:
    """The options every script has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the record, a JSON file")
    parser.add_argument("--time-limit-s", type=float, default=time_limit_s, help="begin nothing that would not fit")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the random inputs; fresh by default")
    parser.add_argument("--only", default="", help="run only items whose name contains this")
    parser.add_argument("--resume-at", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny shapes, no rates")
    return parser


def time_on_gpu(call: Call, copies: int = 1, *, budget_s: float = 0.3) -> Timing:
    """Median GPU time of one call.

    Warm-up compiles and tunes. Calls shorter than half a millisecond are captured into a graph of at least 2 ms;
    where that is impossible they are launched one by one, and the note says why.
    """
    for index in range(max(2, copies)):
        call(index)
    torch.cuda.synchronize()
    once_us = _elapsed_us(lambda: _calls(call, copies)) / copies
    for _ in range(min(100, int(_WARMUP_US / max(once_us * copies, 1.0)))):
        _calls(call, copies)
    once_us = max(_elapsed_us(lambda: _calls(call, copies)) / copies, 0.5)
    wanted = _LAUNCH_BOUND_CALLS if once_us < _LAUNCH_BOUND_US else math.ceil(_SAMPLE_US / once_us)
    count = copies * max(1, min(_MOST_NODES, wanted) // copies)
    how, note, run = "events", "", lambda: _calls(call, count)
    if once_us < _SHORT_US:
        try:
            run, how = _captured(call, count), "graph"
        except (RuntimeError, AssertionError) as error:
            torch.cuda.synchronize()
            note = f"not captured: {first_line(error)}"
    run()
    torch.cuda.synchronize()
    samples, deadline = [], time.monotonic() + budget_s
    while len(samples) < 5 or (time.monotonic() < deadline and len(samples) < 50):
        samples.append(_elapsed_us(run) / count)
    return _timing(samples, count, how, note)


def clocks(*, rehearsal: bool = False) -> Clocks:
    """Ask NVML; nothing is known without it."""
    if rehearsal:
        return Clocks()
    nvml = management_library()
    if nvml is None:
        return Clocks()
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
    except nvml.NVMLError:
        return Clocks()
    found: dict[str, Any] = {}
    name = "nvmlDeviceGetCurrentClocksEventReasons"
    reasons = getattr(nvml, name, None) or getattr(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", None)
    readers: dict[str, Callable[[], Any]] = {
        "sm_mhz": lambda: int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        "sm_max_mhz": lambda: int(nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)),
        "memory_mhz": lambda: int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
        "temperature_c": lambda: int(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "reasons": lambda: tuple(text for bit, text in _REASONS.items() if reasons and int(reasons(handle)) & bit),
    }
    for key, read in readers.items():
        with contextlib.suppress(nvml.NVMLError):
            found[key] = read()
    return Clocks(**found)


def errors(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float] | None:
    """Relative error over all elements (ratio of 2-norms), and the largest one over the root mean square of `expected`.

    None where a value is NaN or infinite, or nothing but zeros was expected and something else came.
    """
    wide, truth = actual.double().flatten(), expected.double().flatten()
    difference = wide - truth
    norm = float(truth.norm())
    if norm == 0 and not bool(difference.any()):
        return 0.0, 0.0
    if norm == 0 or not bool(torch.isfinite(wide).all()):
        return None
    return float(difference.norm()) / norm, float(difference.abs().max()) / (norm / math.sqrt(truth.numel()))


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as aligned text, the first being the heads."""
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def plain(row: Any) -> dict[str, Any]:
    """A row's fields by name, for tables."""
    return dataclasses.asdict(row)


def _device(*, rehearsal: bool) -> torch.device:
    return torch.device("cpu" if rehearsal else "cuda")


def _survivable() -> tuple[type[Exception], ...]:
    """What one item may fail with: too little memory, a kernel that does not compile or run, a function not there.

    Nobody is there to start again, so whatever a compiler or a library raises costs its item and not those after it.
    """
    found: list[type[Exception]] = [
        *(RuntimeError, ValueError, TypeError, AssertionError, ImportError, AttributeError),
        *(LookupError, ArithmeticError, OSError),
    ]
    with contextlib.suppress(ImportError):
        from triton.errors import TritonError

        found.append(TritonError)
    return tuple(found)


def _context_is_lost() -> bool:
    """Whether CUDA refuses all further work in this process, as after an illegal address."""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").add_(1).cpu()
    except RuntimeError:
        return True
    return False


def _calls(call: Call, count: int) -> None:
    for index in range(count):
        call(index)


def _elapsed_us(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000


def _captured(call: Call, count: int) -> Callable[[], None]:
    """What replays so many calls. A call that waits for the device is refused before it breaks a capture."""
    with waiting_forbidden():
        call(0)
    torch.cuda.synchronize()
    return record(lambda: _calls(call, count)).replay


def _timing(samples: Sequence[float], count: int, how: str, note: str) -> Timing:
    ordered = sorted(samples)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return Timing(
        median_us=statistics.median(ordered),
        p10_us=at(0.1),
        p90_us=at(0.9),
        least_us=ordered[0],
        samples=len(ordered),
        calls_per_sample=count,
        how=how,
        note=note,
        raw_us=tuple(samples),
    )


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
