"""`trtkit bench`."""

from __future__ import annotations

from trtkit.spec.errors import UnsupportedError


def command() -> None:
    """Not written yet."""
    raise UnsupportedError("`trtkit bench` is not written yet")
