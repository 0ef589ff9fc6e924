"""The verdict strip: the few statements a reader wants first, each taken from a row of the comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trtkit.report.cells import best_of
from trtkit.report.columns import Configuration
from trtkit.report.model import OK, Cell, Column, Row, Section, Tile
from trtkit.report.text import number, ratio_text, spread_text
from trtkit.spec.metrics import HIGHER, LOWER


def tiles(found: Sequence[Configuration], sections: Sequence[Section]) -> tuple[Tile, ...]:
    """Validity first, then speed, memory, cost and quality as far as they were measured."""
    columns = [configuration.column for configuration in found]
    rows = {section.title: section.rows for section in sections}
    named = (
        ("Highest throughput", rows.get("Throughput", ())),
        ("Shortest time to first token", rows.get("Time to first token", ())),
        ("Smallest peak memory", rows.get("Memory", ())[:1]),
        ("Lowest cost", rows.get("Cost", ())),
    )
    best = [_best(title, candidates, columns) for title, candidates in named]
    strip = (_validity(found), *best, _quality(rows.get("Quality", ()), columns))
    return tuple(tile for tile in strip if tile is not None)


def _validity(found: Sequence[Configuration]) -> Tile:
    records = [record for c in found for record in c.records]
    bad = sum(not record.valid for record in records)
    detail = "a cell that fails a check is shown as invalid and counts nowhere" if bad else "every check passed"
    warned = sum(check.status == "warn" for record in records for check in record.checks)
    if warned and not bad:
        detail = f"no check failed, {warned} warned"
    return Tile(title="Valid cells", value=f"{len(records) - bad} of {len(records)}", detail=detail, good=not bad)


def _best(title: str, rows: Iterable[Row], columns: Sequence[Column]) -> Tile | None:
    """The best number over the rows, and the configuration it belongs to."""
    picked = [(row, index) for row in rows if (index := _leader(row)) is not None]
    if not picked:
        return None

    def value(pair: tuple[Row, int]) -> float:
        return pair[0].cells[pair[1]].value or 0.0

    row, index = min(picked, key=value) if picked[0][0].better == LOWER else max(picked, key=value)
    cell = row.cells[index]
    amount = _amount(cell, row)
    where = f"{columns[index].title}, {row.condition}"
    if cell.ratio is None:
        return Tile(title=title, value=amount, detail=where)
    beyond = " (within the spread)" if cell.distinct is False else ""
    return Tile(title=title, value=amount, detail=f"{where}; {ratio_text(cell)} {columns[0].title}{beyond}")


def _leader(row: Row) -> int | None:
    best = best_of(row)
    if best is not None:
        return best
    return next((i for i, cell in enumerate(row.cells) if cell.status == OK and cell.value is not None), None)


def _amount(cell: Cell, row: Row) -> str:
    text = number(cell.value or 0.0, row.unit, row.digits)
    return text if row.unit == "B" or row.unit.startswith("USD") else f"{text} {row.unit}"


def _quality(rows: Sequence[Row], columns: Sequence[Column]) -> Tile | None:
    """The first task: the configuration that loses most against the first column."""
    for row in rows:
        scored = [(cell.value, i) for i, cell in enumerate(row.cells) if cell.status == OK and cell.value is not None]
        if not scored or row.better not in (HIGHER, LOWER):
            continue
        worst = (max(scored) if row.better == LOWER else min(scored))[1]
        cell, base = row.cells[worst], row.cells[0]
        detail = columns[worst].title
        if worst and base.value is not None:
            detail += (
                f", against {number(base.value, row.unit, row.digits)} {spread_text(base, row)} of {columns[0].title}"
            )
        value = f"{number(cell.value or 0.0, row.unit, row.digits)} {spread_text(cell, row)}".strip()
        return Tile(title=f"Lowest quality: {row.label}", value=value, detail=detail)
    return None
