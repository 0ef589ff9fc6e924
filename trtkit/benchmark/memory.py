"""Peak device memory, sampled from outside the measured process: NVML on an NVIDIA GPU, resident set on a CPU."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from trtkit.benchmark.nvml import management_library
from trtkit.spec.engine import EngineInfo, KVStats
from trtkit.spec.result import MemorySplit

try:
    import psutil

    _HAS_PSUTIL = True
except ImportError:  # a GPU box that runs from the source tree may lack it; NVML still knows the child by its id
    _HAS_PSUTIL = False

INTERVAL_S = 0.02
UNKNOWN_MEMORY = MemorySplit(
    peak_bytes=None, peak_method="none", weight_bytes=None, kv_pool_bytes=None, kv_peak_bytes=None, other_bytes=None
)
_TREE_REFRESH_S = 1.0


class Gauge(Protocol):
    """Something that can say how many bytes a process tree uses now."""

    method: str

    def read_bytes(self) -> int | None:
        """Bytes in use; None if it cannot be known."""


class ProcessTree:
    """A process and its descendants, refreshed now and then: walking /proc is slow. Without psutil, `pid` alone."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._processes: list[psutil.Process] = []
        self._next_refresh_s = 0.0

    def pids(self) -> set[int]:
        """Ids of the tree."""
        return {self._pid, *(process.pid for process in self.processes())}

    def processes(self) -> list[psutil.Process]:
        """Living processes of the tree; none without psutil."""
        if not _HAS_PSUTIL:
            return []
        now_s = time.monotonic()
        if now_s >= self._next_refresh_s:
            self._next_refresh_s = now_s + _TREE_REFRESH_S
            self._processes = []
            with contextlib.suppress(psutil.Error):
                root = psutil.Process(self._pid)
                self._processes = [root, *root.children(recursive=True)]
        return self._processes


class RssGauge:
    """Resident set of a process tree. Pages shared between its processes count once for each."""

    method = "rss"

    def __init__(self, pid: int) -> None:
        self._tree = ProcessTree(pid)

    def read_bytes(self) -> int | None:
        """Sum of resident sets."""
        total = 0
        for process in self._tree.processes():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total or None


class NvmlGauge:
    """Memory that a process tree holds on all NVIDIA devices.

    Inside a container NVML may know processes under other ids; then what the devices in use have more than at the
    start counts, so start the gauge before the engine and leave the devices to it.
    """

    method = "nvml"

    def __init__(self, pid: int, nvml: Any, baseline_bytes: dict[int, int]) -> None:  # noqa: ANN401 - pynvml is untyped
        self._tree = ProcessTree(pid)
        self._nvml = nvml
        self._baseline_bytes = baseline_bytes

    def read_bytes(self) -> int | None:
        """Bytes on all devices together; None where a driver does not answer, which must not end the measurement."""
        pids = self._tree.pids()
        by_process, growth = 0, 0
        try:
            for index, baseline in self._baseline_bytes.items():
                handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
                by_process += self._held_by(pids, handle)
                growth += max(self._nvml.nvmlDeviceGetMemoryInfo(handle).used - baseline, 0)
        except self._nvml.NVMLError:
            return None
        return by_process or growth or None

    def _held_by(self, pids: set[int], handle: Any) -> int:  # noqa: ANN401 - pynvml is untyped
        """Bytes of these processes on one device; 0 where it does not list any, as some virtual machines' do not."""
        try:
            entries = self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        except self._nvml.NVMLError:
            return 0
        return sum(entry.usedGpuMemory or 0 for entry in entries if entry.pid in pids)


def nvml_baseline() -> tuple[Any, dict[int, int]] | None:
    """NVML and the bytes in use on each device now; None without a driver. Take it before the engine starts."""
    nvml = management_library()
    if nvml is None:
        return None
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        return nvml, {i: nvml.nvmlDeviceGetMemoryInfo(handle).used for i, handle in enumerate(handles)}
    except nvml.NVMLError:
        return None


def gauge_for(info: EngineInfo, baseline: tuple[Any, dict[int, int]] | None) -> Gauge | None:
    """What can be sampled for this engine; None if it runs in no process of its own."""
    if info.pid is None:
        return None
    if not info.device.startswith("cuda"):
        return RssGauge(info.pid)
    return None if baseline is None else NvmlGauge(info.pid, *baseline)


class PeakSampler:
    """Reads a gauge every 20 ms in a thread while the `with` block runs."""

    def __init__(self, gauge: Gauge | None, *, interval_s: float = INTERVAL_S) -> None:
        self.peak_bytes: int | None = None
        self._gauge = gauge
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)

    def __enter__(self) -> PeakSampler:
        if self._gauge is not None:
            self._read(self._gauge.read_bytes)
            self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._gauge is not None:
            self._thread.join()
            self._read(self._gauge.read_bytes)

    def _run(self) -> None:
        assert self._gauge is not None
        while not self._stop.wait(self._interval_s):
            self._read(self._gauge.read_bytes)

    def _read(self, read_bytes: Callable[[], int | None]) -> None:
        value = read_bytes()
        if value is not None:
            self.peak_bytes = max(value, self.peak_bytes or 0)


def split(info: EngineInfo, stats: list[KVStats], peak_bytes: int | None, method: str) -> MemorySplit:
    """The peak by what it is for.

    `other` is absent where the peak is unknown, and where the parts exceed it: on a CPU a pool's pages are
    resident only once they were written.
    """
    block_bytes = stats[0].block_bytes if stats else 0
    peak_blocks = max((s.blocks_peak for s in stats), default=None)
    other = None if peak_bytes is None else peak_bytes - info.weight_bytes - info.kv_pool_bytes
    return MemorySplit(
        peak_bytes=peak_bytes,
        peak_method=method,
        weight_bytes=info.weight_bytes,
        kv_pool_bytes=info.kv_pool_bytes,
        kv_peak_bytes=None if peak_blocks is None else peak_blocks * block_bytes + max(s.side_bytes for s in stats),
        other_bytes=other if other is not None and other >= 0 else None,
    )
