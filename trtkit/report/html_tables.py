"""The tables of the HTML report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from trtkit.report.model import OK, Cell, Column, Report, Row, Section
from trtkit.report.plots import sign
from trtkit.report.text import (
    cell_source,
    ratio_text,
    row_heading,
    row_spreads,
    section_heading,
    share_text,
    spread_text,
    value_text,
)
from trtkit.spec.metrics import HIGHER, LOWER

_LEGEND = (
    "Beside a value: its ratio to the first column, grey with ~ where the two spreads overlap. Under it: its spread, and "
    "a bar for its share of this machine's limit."
)


def comparison(report: Report) -> str:
    """The main table: configurations as columns, one group of rows per section."""
    return f'<p class="hint">{_LEGEND}</p>\n{_table(report, report.comparison, "Configurations side by side")}'


def details(report: Report) -> str:
    """One closed table per load."""
    return "\n".join(
        f"<details><summary>{escape(section.title)}</summary>{_table(report, (section,), section.title)}</details>"
        for section in report.details
    )


def grid(caption: str, head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A plain table whose first column names its rows."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr class="{escape(line[0])}"><th scope="row">{escape(line[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in line[1:])
        + "</tr>"
        for line in lines
    )
    return _scrolling(caption, f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>", "grid")


def _scrolling(caption: str, inside: str, kind: str) -> str:
    """A table that scrolls by itself on a narrow screen, reachable by keyboard."""
    name = escape(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}">'
        f'<table class="{kind}"><caption>{name}</caption>{inside}</table></div>'
    )


def _table(report: Report, sections: Sequence[Section], caption: str) -> str:
    heads = "".join(_head(i, column) for i, column in enumerate(report.columns))
    bodies = "".join(_section(section, len(report.columns)) for section in sections)
    return _scrolling(caption, f'<thead><tr><th scope="col">quantity</th>{heads}</tr></thead>{bodies}', "numbers")


def _head(index: int, column: Column) -> str:
    lines = (f"KV {column.kv}", f"fidelity {column.fidelity}", column.gpus, column.batching, f"engine {column.engine}")
    small = "".join(f"<span>{escape(line)}</span>" for line in lines)
    mark = f'<span class="c{index} mark" aria-hidden="true">{sign(index)}</span> '
    return f'<th scope="col">{mark}{escape(column.title)}<small>{small}</small></th>'


def _section(section: Section, columns: int) -> str:
    spreads = row_spreads(section.rows)
    title = escape(section_heading(section)) + (f" <small>spread: {escape(spreads)}</small>" if spreads else "")
    rows = "".join(_row(section, row) for row in section.rows)
    return f'<tbody><tr class="group"><th scope="rowgroup" colspan="{columns + 1}"><span class="stay">{title}</span></th></tr>{rows}</tbody>'


def _row(section: Section, row: Row) -> str:
    cells = "".join(_cell(section, row, cell) for cell in row.cells)
    return f'<tr><th scope="row">{escape(row_heading(section, row))}</th>{cells}</tr>'


def _cell(section: Section, row: Row, cell: Cell) -> str:
    if cell.status != OK:
        reason = f'<span class="reason">{escape(cell.reason)}</span>'
        mark = "" if cell.note is None else f' <a href="#note-{cell.note}">[{cell.note}]</a>'
        return f'<td class="{cell.status}">{"n/a" if cell.status != "invalid" else "invalid"}{mark}{reason}</td>'
    small = (spread_text(cell, row), cell_source(section, cell), cell.remark)
    return f"<td>{_value(row, cell)}{''.join(_small(text) for text in small)}{_share(cell)}</td>"


def _value(row: Row, cell: Cell) -> str:
    value = value_text(cell, row)
    if cell.note is not None:
        mark = f" [{cell.note}]"
        value = f'{escape(value.removesuffix(mark))} <a href="#note-{cell.note}">[{cell.note}]</a>'
        return f'<span class="value">{value}</span>'
    ratio = ratio_text(cell)
    kind = _direction(row, cell)
    told = f' <span class="ratio {kind}">{escape(ratio)}<span class="unseen"> {kind}</span></span>' if ratio else ""
    return f'<span class="value">{escape(value)}</span>{told}'


def _direction(row: Row, cell: Cell) -> str:
    """Whether the ratio is an improvement; a ratio within the spread is neither."""
    judged = row.better in (HIGHER, LOWER) and cell.distinct is not False
    if cell.ratio is None or not judged or f"{cell.ratio:.2f}" == "1.00":
        return "same"
    return "better" if (cell.ratio > 1) == (row.better == HIGHER) else "worse"


def _small(text: str) -> str:
    return f'<span class="small">{escape(text)}</span>' if text else ""


def _share(cell: Cell) -> str:
    if cell.share is None:
        return ""
    over = " over" if cell.share.value > 1 else ""
    return (
        f'<span class="share{over}"><span class="track" aria-hidden="true">'
        f'<span style="width:{min(cell.share.value, 1.0):.1%}"></span></span>{share_text(cell)} of limit</span>'
    )
