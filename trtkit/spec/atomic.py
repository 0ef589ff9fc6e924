"""Files that are either there in full or not there: written beside the target, flushed, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from trtkit.spec.errors import OutputError


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write `path` into one `OutputError` line."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OutputError(f"{path}: the disk is full; free some space and run the same command again") from error
        raise OutputError(f"{path}: cannot be written ({error.strerror or error}); choose another output") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; on success it becomes `path`, on any error it is removed.

    Raises:
        OutputError: the directory cannot be written or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with output_errors(path):
            yield temporary
            with temporary.open("rb+") as handle:
                os.fsync(handle.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
