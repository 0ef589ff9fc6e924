"""Recording work as a CUDA graph, so that a recording that fails costs nothing but itself.

torch's own context manager, up to 2.11 at least, leaves two things behind where the recording broke: the side stream is
still the current one, and the memory allocator believes a recording under way, after which `torch.cuda.empty_cache`
raises for the rest of the process (pytorch pull requests 180395 and 190308). Both are put right here. What is known to
break a recording, an operator that waits for the device, is found before it: work is run once with such operators
forbidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import TypeAlias

import torch

Pool: TypeAlias = tuple[int, int]
"""torch's handle of a memory pool."""


def record(
    work: Callable[[], object], *, stream: torch.cuda.Stream | None = None, pool: Pool | None = None
) -> torch.cuda.CUDAGraph:
    """Record `work`, which was run before, so that nothing is compiled or tuned now.

    Args:
        work: what to record; nothing in it may wait for the device.
        stream: where; torch's own side stream if None.
        pool: memory to share with other graphs, from `torch.cuda.graph_pool_handle`; its own if None. After a failure it
            must not be used again.

    Raises:
        RuntimeError: it cannot be recorded. Everything else goes on as before.
    """
    graph = torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    before = torch.cuda.current_stream()
    try:
        # Other threads of this process may use CUDA meanwhile.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):  # type: ignore[arg-type]
            work()
    except BaseException:
        _abandon(graph, pool, before)
        raise
    return graph


@contextlib.contextmanager
def waiting_forbidden() -> Iterator[None]:
    """Inside, an operator of torch that waits for the device raises RuntimeError."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _abandon(graph: torch.cuda.CUDAGraph, pool: Pool, before: torch.cuda.Stream) -> None:
    """Put stream and allocator back to where they were before a recording that failed."""
    torch.cuda.set_stream(before)
    end, release = (getattr(torch._C, name, None) for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"))
    if end is None or release is None:
        return
    device = torch.cuda.current_device()
    try:
        end(device, pool)
    except RuntimeError:
        return  # torch has ended it itself, and its graph releases the pool
    release(device, pool)
    # The allocator of host memory may still ask this graph whose memory is whose, so it must not go.
    _abandoned().append(graph)


@cache
def _abandoned() -> list[torch.cuda.CUDAGraph]:
    return []
