"""`trtkit demo`."""

from __future__ import annotations

from trtkit.spec.errors import UnsupportedError


def command() -> None:
    """Not written yet."""
    raise UnsupportedError("`trtkit demo` is not written yet")
