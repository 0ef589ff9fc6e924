"""The child process of `RemoteEngine`: opens one engine and obeys the JSON lines on its standard input.

Three threads: the main one is the engine's alone, one reads commands, one writes events, so that neither a slow
parent nor a full pipe delays a token. What libraries print on standard output goes to the log. The process ends when
its standard input does, so a killed parent leaves no orphan.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, TypeVar

from trtkit.backends import wire
from trtkit.spec.codec import to_plain
from trtkit.spec.engine import Engine, FinishReason, KVStats, Request, Scorer, ScoreRequest, TokenEvent
from trtkit.spec.errors import EngineError, TrtkitError, UnsupportedError
from trtkit.spec.units import NS_PER_MS

_CONTROL = ("cancel", "abort", "kv_stats")
_IDLE_WAIT_S = 0.05
_KV_SAMPLE_NS = NS_PER_MS
_PR_SET_PDEATHSIG = 1
R = TypeVar("R", Request, ScoreRequest)


class Outbox:
    """Writes messages from its own thread; events that wait together leave in one line."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._queue: queue.SimpleQueue[wire.Message | TokenEvent | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def put(self, message: wire.Message | TokenEvent) -> None:
        """Queue a message; never blocks."""
        self._queue.put(message)

    def close(self) -> None:
        """Write what is queued, then stop."""
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._write(self._waiting()):
                pass
        except BrokenPipeError:
            os._exit(1)

    def _waiting(self) -> list[wire.Message | TokenEvent | None]:
        items = [self._queue.get()]
        with contextlib.suppress(queue.Empty):
            while True:
                items.append(self._queue.get_nowait())
        return items

    def _write(self, items: list[wire.Message | TokenEvent | None]) -> bool:
        lines: list[bytes] = []
        events: list[list[Any]] = []
        for item in items:
            if isinstance(item, TokenEvent):
                events.append(wire.pack_event(item))
                continue
            if events:
                lines.append(wire.dump({"events": events}))
                events = []
            if item is not None:
                lines.append(wire.dump(item))
        if events:
            lines.append(wire.dump({"events": events}))
        self._stream.write(b"".join(lines))
        self._stream.flush()
        return items[-1] is not None


class Inbox:
    """Reads commands in its own thread and sorts them: work in order, requests of the current call, control."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.calls: queue.SimpleQueue[wire.Message] = queue.SimpleQueue()
        self.requests: deque[wire.Message] = deque()
        self.control: deque[wire.Message] = deque()
        self.arrived = threading.Condition()
        self._stream = stream
        threading.Thread(target=self._run, name="inbox", daemon=True).start()

    def _run(self) -> None:
        for line in self._stream:
            message = json.loads(line)
            kind = message["op"]
            if kind in ("request", "end"):
                self.requests.append(message)
            elif kind in _CONTROL:
                self.control.append(message)
                self.calls.put({"op": "control"})
            else:
                self.calls.put(message)
            with self.arrived:
                self.arrived.notify_all()
            if kind == "close":
                return
        os._exit(0)


class Server:
    """Carries out calls on one engine."""

    def __init__(self, engine: Engine, inbox: Inbox, outbox: Outbox) -> None:
        self._engine = engine
        self._inbox = inbox
        self._outbox = outbox
        self._call = 0
        self._unfinished: set[str] = set()
        self._blocks_peak = self._requests_peak = 0
        self._next_sample_ns = 0

    def serve(self) -> None:
        """Obey until told to close."""
        while True:
            message = self._inbox.calls.get()
            kind = message["op"]
            if kind == "close":
                return
            if kind == "control":
                self._obey()
                continue
            self._call = message["call"]
            self._unfinished.clear()
            try:
                self._score() if kind == "score" else self._generate()
            except TrtkitError as error:
                self._outbox.put({"error": wire.pack_error(error)})

    def _generate(self) -> None:
        before = self._engine.kv_stats()
        self._blocks_peak, self._requests_peak = before.blocks_used, before.requests_running
        for event in self._engine.generate(self._feed(wire.unpack_request, block=False)):
            if event.finish is not None:
                self._unfinished.discard(event.request_id)
            self._outbox.put(event)
            self._obey()
            self._sample_pool(event.time_ns)
        self._close_peaks(before)
        self._outbox.put({"done": True})

    def _score(self) -> None:
        if not isinstance(self._engine, Scorer):
            raise UnsupportedError(f"the {self._engine.info.target} engine gives no log-probabilities")
        for result in self._engine.score(self._feed(wire.unpack_score_request, block=True)):  # type: ignore[arg-type]
            self._unfinished.discard(result.request_id)
            self._outbox.put({"score": wire.pack_score_result(result)})
            self._obey()
        self._outbox.put({"done": True})

    def _feed(self, unpack: Callable[[wire.Message], R], *, block: bool) -> Iterator[R | None]:
        """The requests that have arrived; None while there are none, unless the engine has nothing else to do."""
        while True:
            if self._inbox.requests:
                message = self._inbox.requests.popleft()
                if message["call"] != self._call:
                    continue
                if message["op"] == "end":
                    return
                self._outbox.put({"credit": 1})
                request = unpack(message["request"])
                self._unfinished.add(request.request_id)
                yield request
            elif block or not self._unfinished:
                with self._inbox.arrived:
                    if not (self._inbox.requests or self._inbox.control):
                        self._inbox.arrived.wait(_IDLE_WAIT_S)
                self._obey()
            else:
                yield None

    def _obey(self) -> None:
        """Carry out control messages; only between events, when the engine is not in the middle of a step."""
        while self._inbox.control:
            message = self._inbox.control.popleft()
            if message["op"] == "kv_stats":
                self._outbox.put({"kv": to_plain(self._stats())})
            elif message["op"] == "cancel":
                self._cancel(message["id"])
            elif message["call"] == self._call:
                self._abort()

    def _cancel(self, request_id: str) -> None:
        for message in list(self._inbox.requests):
            if message["op"] == "request" and message["request"]["id"] == request_id:
                self._inbox.requests.remove(message)
                self._outbox.put({"credit": 1})
                now_ns = time.monotonic_ns()
                self._outbox.put(
                    TokenEvent(
                        request_id=request_id, index=0, token_id=None, time_ns=now_ns, finish=FinishReason.CANCELLED
                    )
                )
                return
        self._engine.cancel(request_id)

    def _abort(self) -> None:
        self._inbox.requests.clear()
        self._inbox.requests.append({"op": "end", "call": self._call})
        for request_id in list(self._unfinished):
            self._engine.cancel(request_id)

    def _sample_pool(self, time_ns: int) -> None:
        if time_ns < self._next_sample_ns:
            return
        self._next_sample_ns = time_ns + _KV_SAMPLE_NS
        stats = self._engine.kv_stats()
        self._blocks_peak = max(self._blocks_peak, stats.blocks_used)
        self._requests_peak = max(self._requests_peak, stats.requests_running)

    def _close_peaks(self, before: KVStats) -> None:
        after = self._engine.kv_stats()
        if after.blocks_peak > before.blocks_peak:
            self._blocks_peak = after.blocks_peak
        if after.requests_peak > before.requests_peak:
            self._requests_peak = after.requests_peak

    def _stats(self) -> KVStats:
        """The pool, with peaks of the latest `generate` alone: the engine's own if it rose then, else as sampled."""
        stats = self._engine.kv_stats()
        return replace(
            stats,
            blocks_peak=max(self._blocks_peak, stats.blocks_used),
            requests_peak=max(self._requests_peak, stats.requests_running),
        )


def die_with(parent_pid: int) -> None:
    """Ask Linux to kill this process when its parent dies, even while a library holds the interpreter."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent_pid:
            os._exit(1)


def take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """The pipes from and to the parent, as files that only we use.

    From now on whatever prints to standard output prints to the log. Python's own `sys.stdin` would not do: its lock,
    held by a reading thread, aborts the interpreter's exit.
    """
    pipes = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return pipes


def load_opener(name: str) -> Callable[..., Engine]:
    """The function behind "module:function"."""
    module, _, function = name.partition(":")
    opener: Callable[..., Engine] = getattr(importlib.import_module(module), function)
    return opener


def _open(opener: str, message: wire.Message) -> Engine:
    try:
        return load_opener(opener)(Path(message["path"]), **wire.unpack_overrides(message["overrides"]))
    except MemoryError:
        raise EngineError(f"{message['path']}: not enough memory to open the engine") from None


def main() -> int:
    """Open, serve, close."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--opener", required=True)
    parser.add_argument("--parent-pid", type=int)
    arguments = parser.parse_args()
    if arguments.parent_pid is not None:
        die_with(arguments.parent_pid)
    commands, events = take_pipes()
    outbox, inbox = Outbox(events), Inbox(commands)
    try:
        engine = _open(arguments.opener, inbox.calls.get())
    except TrtkitError as error:
        outbox.put({"error": wire.pack_error(error)})
        outbox.close()
        return error.exit_code
    try:
        outbox.put({"opened": to_plain(engine.info)})
        Server(engine, inbox, outbox).serve()
    finally:
        engine.close()
        outbox.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
