"""How numbers are spelled, the same in every format. Formatting only: what is printed was decided before."""

from __future__ import annotations

from collections.abc import Sequence

from trtkit.report.model import INVALID, MISSING, Cell, Row, Section
from trtkit.spec.units import format_gib

ABSENT = "n/a"


def number(value: float, unit: str, digits: int) -> str:
    """A value without its unit, except memory, which brings its own."""
    if unit == "B":
        return format_gib(value)
    if unit.startswith("USD"):
        return f"${value:,.{digits}f}" if abs(value) >= 0.01 or value == 0 else f"${value:.2g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0 < abs(value) < 10 ** -(digits + 1):
        return f"{value:.2g}"
    return f"{value:,.{digits}f}"


def value_text(cell: Cell, row: Row) -> str:
    """The cell's number, "invalid" or "n/a", with the mark of its note."""
    mark = f" [{cell.note}]" if cell.note is not None else ""
    if cell.status == INVALID:
        return f"invalid{mark}"
    if cell.status == MISSING or cell.value is None:
        return f"{ABSENT}{mark or f' ({cell.reason})'}"
    return f"{number(cell.value, cell.unit or row.unit, row.digits)}{mark}"


def spread_text(cell: Cell, row: Row) -> str:
    """The bounds, without what they are."""
    unit = cell.unit or row.unit
    if cell.error is not None:
        return f"± {number(cell.error, unit, row.digits)}"
    if cell.low is None or cell.high is None:
        return ""
    return f"{number(cell.low, unit, row.digits)} - {number(cell.high, unit, row.digits)}"


def ratio_text(cell: Cell) -> str:
    """The ratio to the first column; "~" in front says that the two spreads overlap."""
    if cell.ratio is None:
        return ""
    return f"{'' if cell.distinct is not False else '~'}{cell.ratio:.2f}x"


def share_text(cell: Cell) -> str:
    """The share of the machine's own limit, as a percentage."""
    return "" if cell.share is None else f"{cell.share.value * 100:.3g} %"


def source_text(cell: Cell) -> str:
    """Where the number came from."""
    return "" if cell.source is None else cell.source.value


def unit_text(row: Row) -> str:
    """The unit where the numbers do not bring their own."""
    return "" if row.unit == "B" or row.unit.startswith("USD") else f" ({row.unit})"


def row_spreads(rows: Sequence[Row]) -> str:
    """What the bounds of these rows are, once each."""
    return ", ".join(dict.fromkeys(cell.spread for row in rows for cell in row.cells if cell.spread))


def section_heading(section: Section) -> str:
    """The section's title with everything that all of its rows share: quantity and unit, condition, source."""
    labels = {f"{row.label}{unit_text(row)}" for row in section.rows}
    conditions = {row.condition for row in section.rows}
    shared = [f"{text}" for texts in (labels, conditions, _sources(section)) if len(texts) == 1 for text in texts]
    return f"{section.title}: {', '.join(shared)}" if shared else section.title


def row_heading(section: Section, row: Row) -> str:
    """What is left to say of one row under its section's heading."""
    labels = {f"{r.label}{unit_text(r)}" for r in section.rows}
    conditions = {r.condition for r in section.rows}
    own = [
        text
        for text, texts in ((f"{row.label}{unit_text(row)}", labels), (row.condition, conditions))
        if len(texts) > 1
    ]
    return ", ".join(own) or row.label


def _sources(section: Section) -> set[str]:
    return {source_text(cell) for row in section.rows for cell in row.cells if cell.source is not None}


def cell_source(section: Section, cell: Cell) -> str:
    """The cell's source where the section's heading could not say it for all."""
    return source_text(cell) if len(_sources(section)) > 1 else ""
