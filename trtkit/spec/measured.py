"""`Measured`: a number with its unit and where it came from. The weaker source wins when two combine."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Source(str, Enum):
    """How a number came to be, strongest first."""

    MEASURED = "measured"
    MODELED = "modeled"
    DATASHEET = "datasheet"
    ASSUMED = "assumed"

    @property
    def strength(self) -> int:
        """Higher is stronger."""
        return len(Source) - list(Source).index(self)


def weakest(*sources: Source) -> Source:
    """The source a number has that was computed from numbers of these sources."""
    return min(sources, key=lambda source: source.strength)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A value, its unit and its source; `low` and `high` bound it at 95 % where that is known."""

    value: float
    unit: str
    source: Source
    low: float | None = None
    high: float | None = None
    note: str = ""
