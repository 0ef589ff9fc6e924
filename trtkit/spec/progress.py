"""How long work tells its caller how far it is, without knowing whether anybody looks."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called often; must be cheap."""

    def __call__(self, phase: str, done: float, total: float) -> None:
        """`done` of `total` units of `phase` are finished; the first call of a phase opens it."""


def no_progress(phase: str, done: float, total: float) -> None:
    """Nobody looks."""
