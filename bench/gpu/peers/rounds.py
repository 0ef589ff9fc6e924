"""Rounds of a peer and of ours, told the same way: each round's numbers, then medians with the lowest and the highest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrivals:
    """One request: when it was asked, and when how many of its tokens were there, in ms since its round began.

    Sides that show no single times have their first token and their last alone.
    """

    asked_ms: float
    times_ms: tuple[float, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One pass over a batch: median first-token time, median time per output token, output tokens a second over it all.

    `requests` are the raw times behind them.
    """

    ttft_ms: float
    tpot_ms: float
    tps: float
    requests: tuple[Arrivals, ...] = ()


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


def round_of(requests: Sequence[Arrivals], osl: int) -> Round:
    """A round's numbers from its raw times, the same way for every side.

    A first message may carry several tokens; the time per token counts those that came after it.

    Raises:
        RuntimeError: a request has another number of tokens than `osl`, more than one.
    """
    for each in requests:
        if each.tokens[-1:] != (osl,):
            raise RuntimeError(f"{(each.tokens or (0,))[-1]} tokens were made, {osl} were asked for")
    last_ms, first_ms = max(each.times_ms[-1] for each in requests), min(each.asked_ms for each in requests)
    return Round(
        ttft_ms=median(each.times_ms[0] - each.asked_ms for each in requests),
        tpot_ms=median((each.times_ms[-1] - each.times_ms[0]) / max(osl - each.tokens[0], 1) for each in requests),
        tps=len(requests) * osl / (last_ms - first_ms) * 1e3,
        requests=tuple(requests),
    )


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
