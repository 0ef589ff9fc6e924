"""How a caller's requests travel to a child process: as many as it has room for, when the caller has them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

from trtkit.backends import wire

PREFETCH_REQUESTS = 1024
"""Requests sent ahead of those the engine has taken; more wait in the caller's iterable."""

_POLL_S = 0.001


@runtime_checkable
class Paced(Protocol):
    """An iterable of requests that knows when it is worth asking again."""

    def seconds_until_next(self) -> float | None:
        """Seconds until the next request may come by itself; None if only an event can bring it."""


class Call:
    """The requests of one call on their way to the child, and what it still owes for them."""

    def __init__(
        self,
        number: int,
        requests: Iterable[Any],
        pack: Callable[[Any], wire.Message],
        send: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self.number = number
        self._requests = requests
        self._iterator = iter(requests)
        self._pack = pack
        self._send = send
        self._credits = PREFETCH_REQUESTS
        self._owed = 0
        self._heard_s = time.monotonic()
        self._exhausted = False
        self._waiting = False

    def note(self, message: wire.Message) -> None:
        """Count what a message settles."""
        self._heard_s = time.monotonic()
        self._credits += message.get("credit", 0)
        self._owed -= sum(event[4] is not None for event in message.get("events", ())) + ("score" in message)

    def silent_s(self) -> float:
        """Seconds without a message while at least one is owed."""
        owes = self._owed > 0 or self._exhausted
        return time.monotonic() - self._heard_s if owes else 0.0

    def pump(self) -> None:
        """Send what the iterable gives now, as far as the child has room."""
        self._waiting = False
        while self._credits > 0 and not self._exhausted:
            try:
                request = next(self._iterator)
            except StopIteration:
                self._exhausted = True
                self._send({"op": "end", "call": self.number})
                return
            if request is None:
                self._waiting = True
                return
            if self._owed == 0:
                self._heard_s = time.monotonic()
            self._send({"op": "request", "call": self.number, "request": self._pack(request)})
            self._credits -= 1
            self._owed += 1

    def patience_s(self) -> float | None:
        """How long to wait for the child before the iterable must be asked again; None: no need to ask."""
        if not self._waiting:
            return None
        if isinstance(self._requests, Paced):
            return self._requests.seconds_until_next()
        return _POLL_S
