"""The comparison as plain text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from trtkit.plan.prices import PriceBook
from trtkit.report.assemble import assemble
from trtkit.report.model import Cell, Report, Row, Section
from trtkit.report.records import Records
from trtkit.report.text import (
    cell_source,
    ratio_text,
    row_heading,
    section_heading,
    share_text,
    spread_text,
    value_text,
)
from trtkit.spec.result import BenchResult, QualityResult

_LEGEND = (
    "Under each value: its spread (95 % interval or min-max over repeats, ± one standard error) and its share of this\n"
    "machine's limit in %. x is against the first column, with ~ where the spreads overlap."
)
_LABEL_WIDTH = 34
_COLUMN_WIDTH = 23


def render_console(
    results: Sequence[BenchResult], quality: Sequence[QualityResult] = (), prices: PriceBook | None = None
) -> str:
    """The comparison of these records, as text."""
    return render(assemble(Records(bench=tuple(results), quality=tuple(quality)), prices))


def render(report: Report) -> str:
    """Configurations as columns, one block per section, notes below."""
    heads = [[column.title, f"KV {column.kv}", column.gpus, f"fidelity {column.fidelity}"] for column in report.columns]
    lines = [report.title, report.subtitle, ""]
    lines += _line([""], heads)
    for section in report.comparison:
        lines += ["", section_heading(section)]
        for row in section.rows:
            lines += _row(section, row)
    lines += _remarks(report)
    return "\n".join(line.rstrip() for line in lines)


def _row(section: Section, row: Row) -> list[str]:
    return _line([f"  {row_heading(section, row)}"], [_cell(section, row, cell) for cell in row.cells])


def _cell(section: Section, row: Row, cell: Cell) -> list[str]:
    """Value and ratio; under it the spread and the share of the limit."""
    first = "  ".join(filter(None, (value_text(cell, row), ratio_text(cell))))
    second = ", ".join(filter(None, (spread_text(cell, row), share_text(cell), cell_source(section, cell))))
    return [first, second, cell.remark]


def _line(label: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    """One table line: every cell is several short texts under each other, wrapped to its column."""
    columns = [_wrapped(label, _LABEL_WIDTH), *(_wrapped(cell, _COLUMN_WIDTH) for cell in cells)]
    widths = [_LABEL_WIDTH, *([_COLUMN_WIDTH] * len(cells))]
    height = max(len(column) for column in columns)
    return [
        "  ".join((column[i] if i < len(column) else "").ljust(w) for column, w in zip(columns, widths, strict=True))
        for i in range(height)
    ]


def _wrapped(texts: Sequence[str], width: int) -> list[str]:
    """The texts under each other, long ones broken, their indent kept."""
    lines: list[str] = []
    for text in texts:
        indent = " " * (len(text) - len(text.lstrip()))
        lines += textwrap.wrap(text, width, subsequent_indent=indent, initial_indent="") if text.strip() else []
    return lines


def _remarks(report: Report) -> list[str]:
    lines = ["", _LEGEND, ""]
    lines += [f"{tile.title}: {tile.value} ({tile.detail})" for tile in report.tiles]
    lines += ["", *(f"[{i}] {note}" for i, note in enumerate(report.notes, 1))] if report.notes else []
    warned = [check for check in report.checks if check.status == "warn"]
    lines += [f"warning: {c.column}, {c.condition}: {c.name}: {c.detail}" for c in warned]
    lines += [f"{fact.name}: {fact.text}" for fact in report.assumptions]
    lines += [f"left out: {problem}" for problem in report.problems]
    return lines
