"""A double of torch.cuda's streams, graphs and allocator, with their rules: what torch 2.11 does where a recording breaks.

It runs no work and keeps a log. Rules come from torch's sources (`torch/cuda/graphs.py`, `CUDAGraph.cpp`,
`CUDACachingAllocator.cpp`): a recording that broke leaves the side stream current and the allocator recording, and then
`empty_cache` raises.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode


class Stream:
    """A name for a queue of work."""

    def __init__(self, fake: FakeCuda, name: str) -> None:
        self.fake, self.name = fake, name

    def wait_stream(self, other: Stream) -> None:
        self.fake.log.append(f"{self.name} waits for {other.name}")


class FakeCuda:
    """Install it in place of `torch.cuda`'s functions with `FakeCuda(monkeypatch)`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, unwinds: bool = False) -> None:
        """`unwinds` is the torch after 2.11, which ends the allocator's recording itself."""
        self.log: list[str] = []
        self.unwinds = unwinds
        self.default = self.current = Stream(self, "default")
        self.streams = 0
        self.pools = 0
        self.recording: list[tuple[int, int]] = []
        self.used: dict[tuple[int, int], int] = {}
        self.broken = False
        self.sync_mode = 0
        fakes = {
            "Stream": lambda *_: self._stream(),
            "stream": self._on,
            "current_stream": lambda *_: self.current,
            "set_stream": lambda stream: setattr(self, "current", stream),
            "current_device": lambda: 0,
            "synchronize": self._synchronize,
            "empty_cache": self.empty_cache,
            "graph_pool_handle": self._pool,
            "CUDAGraph": self._graph,
            "graph": self._record,
            "get_sync_debug_mode": lambda: self.sync_mode,
            "set_sync_debug_mode": self._set_sync_mode,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self._end_pool, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self._release, raising=False)

    def launch(self, name: str) -> None:
        """Work on the current stream."""
        self.log.append(f"{name} on {self.current.name}" + (" recorded" if self.recording else ""))

    def wait(self) -> None:
        """An operator that waits for the device."""
        if self.sync_mode == 2:
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.recording:
            self.broken = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def empty_cache(self) -> None:
        """Torch's assertion, the one that outlives a broken recording."""
        if self.recording:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def _set_sync_mode(self, mode: int | str) -> None:
        self.sync_mode = {"default": 0, "warn": 1, "error": 2}[mode] if isinstance(mode, str) else mode

    def _stream(self) -> Stream:
        self.streams += 1
        return Stream(self, f"side {self.streams}")

    def _pool(self) -> tuple[int, int]:
        self.pools += 1
        return 0, self.pools

    @contextlib.contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def _synchronize(self, *_: object) -> None:
        assert not self.recording, "the device is waited for while a recording is under way"

    def _graph(self) -> Any:
        fake = self

        class Graph:
            def replay(self) -> None:
                fake.log.append(f"replay on {fake.current.name}")

        return Graph()

    @contextlib.contextmanager
    def _record(
        self, graph: Any, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        del graph
        self._synchronize()
        self.empty_cache()
        assert pool not in self.recording, "beginAllocateToPool: already recording to mempool_id"
        before, self.current = self.current, stream or Stream(self, "torch's own")
        self.recording.append(pool)
        self.used[pool] = self.used.get(pool, 0) + 1
        self.log.append(f"recording, {capture_error_mode}")
        failed = False
        try:
            yield
        except BaseException:
            failed = True
            raise
        finally:
            if self.broken:
                if self.unwinds:
                    self._end_pool(0, pool)
                self.broken = False
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            self._end_pool(0, pool)
            self.current = before
            if failed:
                self.log.append("recorded in part")

    def _end_pool(self, _: int, pool: tuple[int, int]) -> None:
        if pool not in self.recording:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.recording.remove(pool)

    def _release(self, _: int, pool: tuple[int, int]) -> None:
        self.used[pool] -= 1


class _Event:
    """A moment that has passed: the CPU works in order."""

    def __init__(self, **_: object) -> None:
        pass

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class PretendedDevice(TorchFunctionMode):
    """Inside, "cuda" is a device: tensors asked for there lie on the CPU, and torch.cuda answers as an H100 with memory.

    Code that asks which device it was opened on takes its CUDA branches; tensors say that they are the CPU's, so twins
    run instead of kernels.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, total_bytes: int = 1 << 30) -> None:
        super().__init__()
        self.cuda = FakeCuda(monkeypatch)
        held, peak = 1 << 20, 3 << 20
        properties = SimpleNamespace(multi_processor_count=132, L2_cache_size=50 << 20, total_memory=total_bytes)
        answers = {
            "is_available": True, "mem_get_info": (total_bytes // 2, total_bytes), "memory_allocated": held,
            "memory_reserved": held, "max_memory_allocated": peak, "reset_peak_memory_stats": None,
            "get_device_properties": properties, "get_device_capability": (9, 0), "is_current_stream_capturing": False,
            "get_device_name": "NVIDIA H100 80GB HBM3", "set_device": None,
        }  # fmt: skip
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
        monkeypatch.setattr(torch.cuda, "Event", _Event)
        real = torch.Generator
        monkeypatch.setattr(torch, "Generator", lambda device="cpu": real(_on_cpu(device)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        given = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **given)
        if "device" in given:
            given["device"] = _on_cpu(given["device"])
        if given.pop("pin_memory", False):
            self.cuda.log.append("pinned")
        return func(*(_on_cpu(arg) for arg in args), **given)


def _on_cpu(value: Any) -> Any:
    is_cuda = isinstance(value, str | torch.device) and str(value).startswith("cuda")
    return "cpu" if is_cuda else value
