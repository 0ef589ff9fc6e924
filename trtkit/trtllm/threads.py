"""Running many small pieces of work on a few threads, stopping at the first error."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

MAX_THREADS = 4
"""More threads than this only queue at the disk."""


def in_parallel(work: Callable[[int], None], items: Sequence[int]) -> None:
    """Run `work` on every item, roughly in order.

    The first error stops the rest and is raised; so does Ctrl-C. Either way pieces in flight are finished first.
    """
    queue, mutex, stop = iter(items), threading.Lock(), threading.Event()

    def loop() -> None:
        while not stop.is_set():
            with mutex:
                item = next(queue, None)
            if item is None:
                return
            work(item)

    threads = max(1, min(MAX_THREADS, _cores(), len(items)))
    with ThreadPoolExecutor(max_workers=threads) as pool:
        futures = [pool.submit(loop) for _ in range(threads)]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
    for future in futures:
        future.result()


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
