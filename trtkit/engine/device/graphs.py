"""Decode steps captured once per batch size and replayed: one launch instead of a thousand.

A captured kernel reads the addresses it was captured with, so what changes from step to step lies in static memory
(`layout.DecodeLayout`) and the captured work takes nothing but a size. Batches run in the next larger bucket.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Protocol

import torch

from trtkit.engine.device.capture import Pool, record, waiting_forbidden

_SMALL = (1, 2, 4, 8)
_STRIDE = 16


class Capture(Protocol):
    """Records work on the device so that it can be replayed."""

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run `work` until it is warm, record it, and return what replays it.

        Raises:
            RuntimeError: it cannot be recorded.
        """


class CudaCapture:
    """CUDA graphs that share one memory pool: only one of them runs at a time.

    One side stream serves all warm-ups and captures, for torch keeps 32 MiB of scratch for matrix products on Hopper for
    every stream that it has multiplied on.
    """

    def __init__(self, device: torch.device) -> None:
        """Nothing is reserved before the first capture."""
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: Pool | None = None

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """See `Capture`. Kernels are compiled and tuned in the warm-up, which a capture could not.

        Work that waits for the device is refused in the warm-up already.
        """
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()
            with waiting_forbidden():
                work()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        torch.cuda.synchronize(self._device)
        return record(work, stream=self._stream, pool=self._pool).replay


def buckets(max_batch_size: int) -> tuple[int, ...]:
    """Batch sizes to capture: 1, 2, 4, 8, then every 16, and the largest there can be."""
    sizes = [size for size in (*_SMALL, *range(_STRIDE, max_batch_size, _STRIDE)) if size < max_batch_size]
    if max_batch_size > 16:
        sizes = sorted({*sizes, *(size for size in (24,) if size < max_batch_size)})
    return (*sizes, max_batch_size)


class DecodeGraphs:
    """Replays of `work(size)` for every bucket size; where a capture fails, `work` itself runs."""

    def __init__(
        self,
        sizes: tuple[int, ...],
        work: Callable[[int], None],
        capture: Capture | None,
        prepare: Callable[[int], None],
    ) -> None:
        """Capture every size, the largest first, so that its memory serves the others.

        Args:
            sizes: ascending.
            work: the step of a size, on static memory.
            capture: records it; None runs it as it is.
            prepare: fills the memory of a size with what the warm-up may run on.
        """
        self.sizes = sizes
        self.notes: list[str] = []
        self._work = work
        self._replays: dict[int, Callable[[], None]] = {}
        for size in reversed(sizes) if capture is not None else ():
            assert capture is not None
            prepare(size)
            try:
                self._replays[size] = capture(lambda size=size: work(size))  # type: ignore[misc]
            except RuntimeError as error:
                line = str(error).splitlines()[0] if str(error) else type(error).__name__
                self.notes.append(f"CUDA graph of batch size {size} not captured, it runs eagerly: {line}")
                break

    def bucket(self, rows: int) -> int:
        """The size that a step of `rows` runs in."""
        return self.sizes[bisect_left(self.sizes, rows)]

    def run(self, size: int) -> None:
        """Do the work of a bucket size."""
        replay = self._replays.get(size)
        if replay is None:
            self._work(size)
        else:
            replay()

    @property
    def captured(self) -> int:
        """Sizes that replay."""
        return len(self._replays)
