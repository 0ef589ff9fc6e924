"""`RemoteEngine`: an engine in a fresh child process, so that what is measured shares nothing with who measures.

Both sides talk in JSON lines over pipes. Token events carry the child's monotonic time, which is this process's too.
A thread reads as fast as the child writes, so a slow consumer never delays the engine.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtkit.backends import wire
from trtkit.backends.feed import Call
from trtkit.spec.codec import from_plain
from trtkit.spec.engine import EngineInfo, KVStats, Request, ScoreRequest, ScoreResult, TokenEvent
from trtkit.spec.errors import EngineError, TrtkitError

DEFAULT_OPENER = "trtkit.backends:open_here"

_LOG_TAIL_LINES = 3
_NAMES_ERROR = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Resources)\b|Fatal Python error")
_LIVENESS_S = 0.25
_DYING_S = 10.0
"""From the end of its pipe to the end of a process, on a machine with much else to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeouts:
    """Seconds: to open the engine, between two messages while it owes some (None: for ever), to close."""

    start_s: float = 1800.0
    stall_s: float | None = 1800.0
    close_s: float = 20.0


class RemoteEngine:
    """`Engine` and `Scorer` over a child process that opens a bundle.

    `kv_stats` reports peaks of the latest `generate` call, so that one process can run several workloads.
    """

    def __init__(
        self,
        path: Path,
        overrides: Mapping[str, object] | None = None,
        *,
        opener: str = DEFAULT_OPENER,
        log_path: Path | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        """Start the child and wait until the engine is open.

        Args:
            path: the bundle.
            overrides: keyword arguments of the opener.
            opener: "module:function" called in the child with the path and the overrides.
            log_path: where the child's standard error goes; without one, a temporary file that is removed after a
                clean end.
            timeouts: how long to wait for what.

        Raises:
            EngineError: the process died or did not open the engine in time.
            TrtkitError: whatever the opener raised, as the same class.
        """
        self._path = path
        self._timeouts = timeouts or Timeouts()
        self._keep_log = log_path is not None
        self._log_path = log_path or _temporary_log()
        self._stream: queue.SimpleQueue[wire.Message | None] = queue.SimpleQueue()
        self._replies: queue.SimpleQueue[wire.Message | None] = queue.SimpleQueue()
        self._write_lock = threading.Lock()
        self._closed = False
        self._busy = False
        self._calls = 0
        self._process = self._spawn(opener)
        self._reader = threading.Thread(target=self._read, name="remote-engine", daemon=True)
        self._reader.start()
        try:
            self._info = self._open(wire.pack_overrides(overrides or {}))
        except BaseException:
            self._kill()
            self.close()
            raise

    def _spawn(self, opener: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-X", "faulthandler", "-m", "trtkit.backends.child", "--opener", opener]
        if threading.current_thread() is threading.main_thread():
            # Linux ties the wish to die with a parent to the thread that started the child; only the main one lasts.
            command += ["--parent-pid", str(os.getpid())]
        with self._log_path.open("wb") as log:
            return subprocess.Popen(  # noqa: S603 - our own module, no shell
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )

    def _open(self, overrides: wire.Message) -> EngineInfo:
        self._send({"op": "open", "path": str(self._path), "overrides": overrides})
        message = self._take(self._replies, self._timeouts.start_s, "opened")
        return replace(from_plain(EngineInfo, message["opened"]), pid=self._process.pid)

    @property
    def info(self) -> EngineInfo:
        """Sizes and limits; `pid` is the child's."""
        return self._info

    @property
    def log_path(self) -> Path:
        """What the child wrote to standard error, and whatever its libraries printed."""
        return self._log_path

    def generate(self, requests: Iterable[Request | None]) -> Iterator[TokenEvent]:
        """Run `requests` in the child; see `Engine.generate`.

        Raises:
            EngineError: the process died, fell silent, or is already running a call.
        """
        with contextlib.closing(self._run("generate", requests, wire.pack_request)) as messages:
            for message in messages:
                for event in message.get("events", ()):
                    yield wire.unpack_event(event)

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        """Score `requests` in the child; see `Scorer.score`."""
        with contextlib.closing(self._run("score", requests, wire.pack_score_request)) as messages:
            for message in messages:
                if "score" in message:
                    yield wire.unpack_score_result(message["score"])

    def cancel(self, request_id: str) -> None:
        """End a request early."""
        self._send({"op": "cancel", "id": request_id})

    def kv_stats(self) -> KVStats:
        """The block pool; while a call runs, the child answers after its next token."""
        self._send({"op": "kv_stats"})
        return from_plain(KVStats, self._take(self._replies, self._timeouts.stall_s, "answered")["kv"])

    def close(self) -> None:
        """End the child; it is killed if it does not end in time."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(EngineError):
            self._send({"op": "close"})
        with contextlib.suppress(OSError):
            self._stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(self._timeouts.close_s)
        self._kill()
        if not self._keep_log:
            self._log_path.unlink(missing_ok=True)

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if exc_info and exc_info[0] is not None:
            self._kill()
        self.close()

    def _run(
        self, kind: str, requests: Iterable[Any], pack: Callable[[Any], wire.Message]
    ) -> Generator[wire.Message, None, None]:
        if self._busy:
            raise EngineError(f"{self._path}: the engine is already running a call; finish or close that one first")
        self._busy = True
        self._calls += 1
        call = Call(self._calls, requests, pack, self._send)
        done = False
        try:
            self._send({"op": kind, "call": call.number})
            call.pump()
            while not done:
                message = self._next(call)
                if message is not None:
                    done = "done" in message
                    yield message
                call.pump()
        except TrtkitError:
            done = True
            raise
        finally:
            if not done and not self._closed:
                self._abort(call)
            self._busy = False

    def _next(self, call: Call) -> wire.Message | None:
        """The next message of the running call; None if the caller's iterable should be asked again first."""
        patience_s = call.patience_s()
        try:
            message = self._stream.get(timeout=_LIVENESS_S if patience_s is None else min(patience_s, _LIVENESS_S))
        except queue.Empty:
            stall_s = self._timeouts.stall_s
            if stall_s is not None and call.silent_s() > stall_s:
                self._kill()
                raise self._lost(f"said nothing for {stall_s:g} s and was ended") from None
            return None
        if message is None:
            self._stream.put(None)
            raise self._died()
        if "error" in message:
            raise wire.unpack_error(message["error"])
        call.note(message)
        return message

    def _abort(self, call: Call) -> None:
        """The consumer left early: cancel what runs, and read on until the child is ready for another call."""
        deadline = time.monotonic() + self._timeouts.close_s
        try:
            self._send({"op": "abort", "call": call.number})
            while time.monotonic() < deadline:
                message = self._next(call)
                if message is not None and "done" in message:
                    return
        except TrtkitError:
            return
        self._kill()

    def _take(
        self, replies: queue.SimpleQueue[wire.Message | None], timeout_s: float | None, verb: str
    ) -> wire.Message:
        try:
            message = replies.get(timeout=timeout_s)
        except queue.Empty:
            self._kill()
            raise self._lost(f"has not {verb} within {timeout_s:g} s and was ended") from None
        if message is None:
            replies.put(None)
            raise self._died()
        if "error" in message:
            raise wire.unpack_error(message["error"])
        return message

    def _read(self) -> None:
        opened = False
        for line in self._stdout:
            try:
                message = json.loads(line)
            except json.JSONDecodeError:
                break
            to_replies = "kv" in message or not opened
            opened = opened or "opened" in message
            (self._replies if to_replies else self._stream).put(message)
        self._stream.put(None)
        self._replies.put(None)

    def _send(self, message: Mapping[str, Any]) -> None:
        line = wire.dump(message)
        try:
            with self._write_lock:
                self._stdin.write(line)
                self._stdin.flush()
        except (OSError, ValueError):
            raise self._died() from None

    def _died(self) -> EngineError:
        if self._closed:
            return EngineError(f"{self._path}: this engine is closed; open it again")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_DYING_S)
        code = self._process.poll()
        if code is not None and code < 0:
            return self._lost(f"was killed by {signal.Signals(-code).name}")
        return self._lost("closed its pipe" if code is None else f"ended with exit code {code}")

    def _lost(self, what: str) -> EngineError:
        self._keep_log = True
        tail = " | ".join(_tail(self._log_path)) or "nothing"
        return EngineError(f"{self._path}: the engine's process {what}; its log ({self._log_path}) ends: {tail}")

    def _kill(self) -> None:
        """End the child and whatever it started; harmless when it has ended."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(self._timeouts.close_s)
        for pipe in (self._stdin, self._stdout):
            with contextlib.suppress(OSError):
                pipe.close()

    @property
    def _stdin(self) -> Any:  # noqa: ANN401 - Popen's pipes are optional in its type, never here
        return self._process.stdin

    @property
    def _stdout(self) -> Any:  # noqa: ANN401
        return self._process.stdout


def _temporary_log() -> Path:
    handle, name = tempfile.mkstemp(prefix="trtkit-engine-", suffix=".log")
    os.close(handle)
    return Path(name)


def _tail(log: Path) -> list[str]:
    """The last lines, or those from the last one that names an error: what CUDA adds to its errors is many lines long."""
    with contextlib.suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        written = [line.rstrip() for line in lines if line.strip()]
        named = [index for index, line in enumerate(written) if _NAMES_ERROR.match(line)]
        first = max(0, min([*named[-1:], len(written) - _LOG_TAIL_LINES]))
        return [line.strip() for line in written[first : first + _LOG_TAIL_LINES]]
    return []
