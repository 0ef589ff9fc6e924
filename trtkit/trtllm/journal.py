"""Which pieces of a conversion are finished, so that a killed one continues instead of starting over.

One file in the working directory: a first line that names the plan, then one line per finished piece. The first line
holds the machine's boot id too: after a power cut a piece may be noted whose data never reached the disk, so nothing
noted before a reboot is believed.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType

from trtkit.spec.atomic import output_errors

NAME = ".journal"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Journal:
    """`finished` is what earlier runs of the same plan completed. The directory must be locked by its user."""

    def __init__(self, directory: Path, plan_digest: str) -> None:
        """Open or begin the journal in `directory`.

        Raises:
            OutputError: the directory cannot be written.
        """
        self.path = directory / NAME
        with output_errors(self.path):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._mutex = threading.Lock()
        self.finished: frozenset[int] = frozenset()
        self._title = f"{plan_digest} {_boot_id()}"
        *lines, _torn = self.path.read_text(encoding="ascii", errors="replace").split("\n")
        if lines and lines[0] == self._title:
            self.finished = frozenset(int(line) for line in lines[1:] if line.isdecimal())
        else:
            self.restart()

    def restart(self) -> None:
        """Forget what was finished."""
        self.finished = frozenset()
        with output_errors(self.path):
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, f"{self._title}\n".encode("ascii"))

    def note(self, piece: int) -> None:
        """Record a piece whose data has been written."""
        with self._mutex, output_errors(self.path):
            os.write(self._descriptor, f"{piece}\n".encode("ascii"))

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"
