"""`trtkit cost`."""

from __future__ import annotations

from trtkit.spec.errors import UnsupportedError


def command() -> None:
    """Not written yet."""
    raise UnsupportedError("`trtkit cost` is not written yet")
