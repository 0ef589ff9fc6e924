"""Rounds of a peer and of ours, told the same way: each round's numbers, then medians with the lowest and the highest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One pass over a batch: median first-token time, median time per output token, output tokens a second over it all."""

    ttft_ms: float
    tpot_ms: float
    tps: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerCell:
    """One load on one engine. `not_run` says in one line why there are no rounds."""

    who: str
    version: str
    model: str
    precision: str
    concurrency: int
    isl: int
    osl: int
    rounds: tuple[Round, ...] = ()
    seconds_to_open: float | None = None
    note: str = ""
    not_run: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerRecord:
    """What peers.json holds; numbers of a rehearsal mean nothing and are never rendered."""

    rehearsal: bool
    cells: tuple[PeerCell, ...] = ()
    lines: tuple[str, ...] = ()


def summed(rounds: Sequence[Round], key: str) -> str:
    """Median and range of one number, `24.1 (23.9-24.6)`."""
    values = [getattr(each, key) for each in rounds]
    middle = f"{median(values):,.4g}"
    return middle if len(values) < 2 else f"{middle} ({min(values):,.4g}-{max(values):,.4g})"


def line(cell: PeerCell) -> str:
    """A cell as one line of text."""
    head = f"{cell.who} {cell.version}, {cell.model} {cell.precision}, c{cell.concurrency} {cell.isl}/{cell.osl}"
    if cell.not_run is not None:
        return f"{head}: not run: {cell.not_run}"
    parts = [f"{text} {summed(cell.rounds, key)}" for key, text in _COLUMNS]
    return f"{head}: {', '.join(parts)}, {len(cell.rounds)} rounds"


_COLUMNS = (("ttft_ms", "TTFT ms"), ("tpot_ms", "TPOT ms"), ("tps", "tok/s"))
