"""`trtkit convert`."""

from __future__ import annotations

from trtkit.spec.errors import UnsupportedError


def command() -> None:
    """Not written yet."""
    raise UnsupportedError("`trtkit convert` is not written yet")
