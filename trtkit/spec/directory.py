"""Output directories that are either there in full or not there: worked on beside the target, then renamed.

The working directory `<name>.partial` survives a kill, so the next run continues where this one stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from trtkit.spec.atomic import output_errors
from trtkit.spec.errors import OutputError

PARTIAL_SUFFIX = ".partial"
LOCK_NAME = ".lock"


def absolute(path: Path) -> Path:
    """`path` without `..` and trailing dots; symbolic links stay (the link's own name is what is replaced)."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow the link


def partial_directory(path: Path) -> Path:
    """Where `path` is worked on until it is complete."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


@contextlib.contextmanager
def working_directory(path: Path) -> Iterator[Path]:
    """Yield the partial directory of `path`, created and locked; it stays on any error, for the next run to continue.

    Raises:
        OutputError: it cannot be created, or another process is working in it.
    """
    partial = partial_directory(path)
    with output_errors(path):
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(f"{partial}: another process is writing here; wait for it to end") from None
        yield partial
    finally:
        os.close(descriptor)


def check_free(path: Path, *, force: bool, marker: str) -> None:
    """Refuse an output that would destroy something.

    Args:
        path: the directory that is to appear.
        force: an older output may be replaced, if it holds the file `marker`; nothing else ever is.
        marker: a file name every output of this kind has.

    Raises:
        OutputError: `path` exists and may not be replaced.
    """
    if not path.name:
        raise OutputError(f"{path}: not a directory that can be created; name a new one")
    if not os.path.lexists(path) or (path.is_dir() and not path.is_symlink() and not any(path.iterdir())):
        return
    if not force:
        raise OutputError(f"{path}: exists already; choose another output or replace it with --force")
    if not path.is_dir() or path.is_symlink() or not (path / marker).is_file():
        raise OutputError(
            f"{path}: --force only replaces an earlier output, and this has no {marker}; remove it yourself"
        )


def check_space(path: Path, needed_bytes: int) -> None:
    """Refuse before the work what would fail at its end.

    Raises:
        OutputError: the file system of `path` (whose parent exists) has less than `needed_bytes` free.
    """
    with output_errors(path):
        free = shutil.disk_usage(path.parent).free
    if needed_bytes > free:
        gib = 1 << 30
        raise OutputError(
            f"{path}: needs {needed_bytes / gib:.2f} GiB, the disk has {free / gib:.2f} GiB free; "
            f"free {(needed_bytes - free) / gib:.2f} GiB or choose another output"
        )


def publish(partial: Path, path: Path) -> None:
    """Give a finished directory its name; an older one goes only after the new one is complete.

    Dotfiles at its top (locks, journals) belonged to the work and are removed once the name is there.
    """
    with output_errors(path):
        for file in (p for p in partial.rglob("*") if p.is_file()):
            _sync(file)
        if not path.is_dir() or not any(path.iterdir()):
            partial.rename(path)
            _tidy(path)
            return
        retired = path.with_name(f".{path.name}.{os.getpid()}.old")
        path.rename(retired)
        try:
            partial.rename(path)
        except OSError:
            retired.rename(path)
            raise
        _tidy(path)
        shutil.rmtree(retired)


def _tidy(path: Path) -> None:
    _sync(path.parent)
    for file in path.glob(".*"):
        file.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
