"""Run a program that dies with its parent: `python -m trtkit.trtllm.tether PARENT_PID program arguments...`.

A build that is killed must not leave a compiler behind that holds a GPU and writes into the next attempt's files.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Tie this process to its parent (Linux), then become the program."""
    parent_pid, program = int(arguments[0]), arguments[1:]
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent_pid:
            sys.exit(1)
    os.execvp(program[0], program)  # noqa: S606 - a fixed program, no shell


if __name__ == "__main__":
    main(sys.argv[1:])
