"""`trtkit report`."""

from __future__ import annotations

from trtkit.spec.errors import UnsupportedError


def command() -> None:
    """Not written yet."""
    raise UnsupportedError("`trtkit report` is not written yet")
