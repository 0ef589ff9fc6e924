"""A user's regular expression, searched in a child process that is killed when it takes too long.

Python's `re` backtracks and cannot be interrupted, so a pattern like `(a+)+$` would hang an evaluation for ever.
"""

from __future__ import annotations

import contextlib
import json
import re
import selectors
import subprocess
import sys

from trtkit.spec.errors import InputError

MAX_PATTERN_CHARACTERS = 1000
MAX_TEXT_CHARACTERS = 100_000
TIMEOUT_S = 2.0
_WORKER = (
    "import json, re, sys\n"
    "print('ready', flush=True)\n"
    "for line in sys.stdin:\n"
    "    pattern, text = json.loads(line)\n"
    "    print(int(re.search(pattern, text) is not None), flush=True)\n"
)


def check_pattern(pattern: str) -> str | None:
    """Why a pattern cannot be used, None if it can."""
    if len(pattern) > MAX_PATTERN_CHARACTERS:
        return f"the pattern has {len(pattern)} characters, {MAX_PATTERN_CHARACTERS} are allowed"
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return f"the pattern is not a regular expression: {error}"
    return None


class RegexGuard:
    """Searches patterns, one child process for all of them."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> RegexGuard:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop()

    def search(self, pattern: str, text: str) -> bool:
        """Whether `pattern` occurs in the first MAX_TEXT_CHARACTERS of `text`.

        Raises:
            InputError: the search took longer than the time limit.
        """
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([pattern, text[:MAX_TEXT_CHARACTERS]]) + "\n")
        process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(self._timeout_s):
                self._stop()
                raise InputError(
                    f"the pattern {pattern[:60]!r} took longer than {self._timeout_s:g} s on one answer; "
                    "simplify it (nested repetition backtracks)"
                )
        return process.stdout.readline().strip() == "1"

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter, a constant program
                [sys.executable, "-I", "-c", _WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            assert self._process.stdout is not None
            self._process.stdout.readline()  # an interpreter that starts slowly is not a slow pattern
        return self._process

    def _stop(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
