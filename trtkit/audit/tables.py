"""Rows of claims from CSV and Markdown.

Long tables have a `metric` and a `value` column, wide ones a column per metric, transposed ones one per configuration.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence

from trtkit.audit.claims import kind_of
from trtkit.audit.transposed import is_transposed, turned
from trtkit.spec.errors import InputError

Row = dict[str, str]


def csv_rows(text: str, name: str) -> list[Row]:
    """Rows of a CSV table.

    Raises:
        InputError: not a table, or without the columns of a claim.
    """
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        header = [cell.strip() for cell in reader.fieldnames or ()]
        reader.fieldnames = header
        rows = [{key: value or "" for key, value in row.items() if isinstance(key, str)} for row in reader]
    except csv.Error as error:
        raise InputError(f"{name}: not a CSV table: {error}") from None
    if not is_claim_header(header):
        body = [[row.get(column, "") for column in header] for row in rows]
        if is_transposed(header, body):
            return turned(header, body)
        raise InputError(
            f"{name}: no table of claims: needs columns model, gpu, precision, and metric with value (or metric columns), "
            "or a column per configuration and rows model, gpu, precision and metrics"
        )
    return lengthened(header, rows)


def markdown_rows(text: str, name: str) -> list[Row]:
    """Rows of every table of claims in a Markdown text; other tables and prose are passed over.

    Raises:
        InputError: there is no table of claims.
    """
    found: list[Row] = []
    tables = 0
    for header, body in _markdown_tables(text):
        if is_claim_header(header):
            tables += 1
            padded = [[*cells, *[""] * len(header)][: len(header)] for cells in body]
            found += lengthened(header, [dict(zip(header, cells, strict=True)) for cells in padded])
        elif is_transposed(header, body):
            tables += 1
            found += turned(header, body)
    if not tables:
        raise InputError(
            f"{name}: no Markdown table of claims: needs columns model, gpu, precision, and metric with value "
            "(or metric columns), or a column per configuration and rows model, gpu, precision and metrics"
        )
    return found


def is_claim_header(header: Sequence[str]) -> bool:
    """A table of claims names a configuration and at least one number."""
    names = {cell.strip().lower() for cell in header}
    if "metric" in names and "value" in names:
        return True
    return {"model", "gpu", "precision"} <= names and any(kind_of(name) for name in names)


def lengthened(header: Sequence[str], rows: Sequence[Mapping[str, str]]) -> list[Row]:
    """Long rows as they are; each filled metric cell of a wide row as a long row of its own."""
    if "metric" in header:
        return [dict(row) for row in rows]
    metrics = [column for column in header if kind_of(column)]
    return [
        {**{k: v for k, v in row.items() if k not in metrics}, "metric": column, "value": row[column]}
        for row in rows
        for column in metrics
        if row.get(column, "").strip() not in ("", "-")
    ]


def _markdown_tables(text: str) -> list[tuple[list[str], list[list[str]]]]:
    tables: list[tuple[list[str], list[list[str]]]] = []
    lines = text.splitlines()
    index = 0
    while index + 1 < len(lines):
        if _is_table_line(lines[index]) and re.fullmatch(r"\s*\|?(\s*:?-+:?\s*\|?)+\s*", lines[index + 1]):
            end = index + 2
            while end < len(lines) and _is_table_line(lines[end]):
                end += 1
            tables.append((_cells(lines[index]), [_cells(line) for line in lines[index + 2 : end]]))
            index = end
        else:
            index += 1
    return tables


def _is_table_line(line: str) -> bool:
    return "|" in line.strip()


def _cells(line: str) -> list[str]:
    return [cell.strip().strip("*`").strip() for cell in line.strip().strip("|").split("|")]
