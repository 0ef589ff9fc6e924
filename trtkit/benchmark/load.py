"""Load: requests handed to an engine when they are due, with the moment from which their latency counts.

Closed loop: `concurrency` requests in flight; the next is submitted the moment one ends. Open loop: Poisson arrivals;
latency counts from the scheduled arrival even if the request had to wait for the engine to ask, so that a slow engine
cannot hide its queue.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from trtkit.spec.engine import Request
from trtkit.spec.units import NS_PER_S

Clock = Callable[[], int]
Sleep = Callable[[float], None]


def poisson_arrivals_ns(count: int, rate_per_s: float, seed: Sequence[int]) -> list[int]:
    """Arrival times from the first request on, with exponential gaps of mean 1 / rate."""
    gaps_s = np.random.default_rng(seed).exponential(1 / rate_per_s, size=count - 1)
    return [0, *(int(value) for value in np.cumsum(gaps_s) * NS_PER_S)]


class LoadGenerator:
    """The iterable an `Engine` polls. `submit_ns` maps each request that was handed out to when its latency starts."""

    def __init__(
        self,
        requests: Sequence[Request],
        *,
        concurrency: int | None = None,
        arrivals_ns: Sequence[int] | None = None,
        clock: Clock = time.monotonic_ns,
        sleep: Sleep = time.sleep,
    ) -> None:
        """`arrivals_ns` makes the loop open; `concurrency` caps what is in flight either way."""
        self.submit_ns: dict[str, int] = {}
        self._pending = deque(requests)
        self._arrivals_ns = deque(arrivals_ns) if arrivals_ns is not None else None
        self._clock = clock
        self._sleep = sleep
        self._in_flight: set[str] = set()
        self._start_ns: int | None = None
        self._concurrency = concurrency
        self._free_slots_ns: deque[int] = deque()

    def __iter__(self) -> LoadGenerator:
        return self

    def __next__(self) -> Request | None:
        if self._start_ns is None:
            self._start_ns = self._clock()
            self._free_slots_ns.extend([self._start_ns] * (self._concurrency or 0))
        if not self._pending:
            raise StopIteration
        wait_s = self.seconds_until_next()
        if wait_s is None:
            return None
        if wait_s > 0:
            if self._in_flight:
                return None
            self._sleep(wait_s)
        return self._hand_out()

    def finished(self, request_id: str) -> None:
        """A request has ended; in a closed loop its place is free from this moment on."""
        if request_id in self._in_flight:
            self._in_flight.remove(request_id)
            if self._concurrency is not None:
                self._free_slots_ns.append(self._clock())

    def seconds_until_next(self) -> float | None:
        """Seconds until the next request is due; None if only the end of another one, or nothing, can bring it."""
        if not self._pending or self._start_ns is None:
            return None
        if self._concurrency is not None and not self._free_slots_ns:
            return None
        if self._arrivals_ns is None:
            return 0.0
        return max(0, self._start_ns + self._arrivals_ns[0] - self._clock()) / NS_PER_S

    def _hand_out(self) -> Request:
        assert self._start_ns is not None
        request = self._pending.popleft()
        free_ns = self._free_slots_ns.popleft() if self._concurrency is not None else self._start_ns
        due_ns = free_ns if self._arrivals_ns is None else self._start_ns + self._arrivals_ns.popleft()
        self.submit_ns[request.request_id] = due_ns
        self._in_flight.add(request.request_id)
        return request
