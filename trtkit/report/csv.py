"""The report as CSV: one line per number, in the units of the model, nothing rounded."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from trtkit.report.model import Cell, Column, Report, Row

FIELDS = (
    "table",
    "section",
    "configuration",
    "engine",
    "digest",
    "fidelity",
    "metric",
    "label",
    "condition",
    "status",
    "value",
    "unit",
    "low",
    "high",
    "stderr",
    "spread",
    "source",
    "share_of_limit",
    "ratio_to_first",
    "samples",
    "better",
    "reason",
    "remark",
)


def render(report: Report) -> str:
    """Comparison and details under one header; an unknown value is an empty field."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(FIELDS)
    for line in _lines(report):
        writer.writerow(["" if field is None else _safe(field) for field in line])
    return out.getvalue()


def _lines(report: Report) -> Iterator[tuple[object, ...]]:
    for table, sections in (("comparison", report.comparison), ("details", report.details)):
        for section in sections:
            for row in section.rows:
                for column, cell in zip(report.columns, row.cells, strict=True):
                    yield (table, section.title, *_line(column, row, cell))


def _line(column: Column, row: Row, cell: Cell) -> tuple[object, ...]:
    who = (column.title, column.engine, column.digest, column.fidelity)
    what = (row.metric, row.label, row.condition, cell.status, cell.value, cell.unit or row.unit)
    spread = (cell.low, cell.high, cell.error, cell.spread, None if cell.source is None else cell.source.value)
    share = None if cell.share is None else cell.share.value
    return (*who, *what, *spread, share, cell.ratio, cell.samples, row.better, cell.reason, cell.remark)


def _safe(field: object) -> object:
    """Text that a spreadsheet would take for a formula is marked as text."""
    return f"'{field}" if isinstance(field, str) and field[:1] in "=+-@\t\r" and field else field
