"""A double of torch.cuda's streams, graphs and allocator, with their rules: what torch 2.11 does where a recording breaks.

It runs no work and keeps a log. Rules come from torch's sources (`torch/cuda/graphs.py`, `CUDAGraph.cpp`,
`CUDACachingAllocator.cpp`): a recording that broke leaves the side stream current and the allocator recording, and then
`empty_cache` raises.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch


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
