"""The report as Markdown: tables that a pull request or an issue shows as they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trtkit.report.model import Cell, Report, Row, Section
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

_LEGEND = (
    "Each value is followed by its ratio to the first column (`~`: the spreads overlap, so it may be noise), "
    "its spread in brackets and its share of this machine's limit."
)


def render(report: Report) -> str:
    """The whole report; every check that did not pass is listed, passed ones are counted."""
    lines = [f"# {_inline(report.title)}", "", _inline(report.subtitle), ""]
    lines += [f"- **{_inline(tile.title)}**: {_inline(tile.value)} ({_inline(tile.detail)})" for tile in report.tiles]
    lines += ["", "## Configurations", "", *_configurations(report)]
    lines += ["", "## Comparison", "", _LEGEND]
    for section in report.comparison:
        lines += ["", f"### {_inline(section_heading(section))}", "", *_table(report, section)]
    lines += _notes(report)
    lines += ["", "## Assumptions", "", *_facts((f.name, f.text) for f in report.assumptions)]
    lines += ["", "## Checks", "", *_checks(report)]
    lines += ["", "## Definitions", "", *_facts((f"{d.label} ({d.unit})", d.formula) for d in report.definitions)]
    lines += ["", "## Environment", "", *_facts((f.name, f.text) for f in report.environment)]
    return "\n".join(lines) + "\n"


def _configurations(report: Report) -> list[str]:
    head = ("configuration", "engine", "digest", "KV cache", "fidelity", "batching", "devices", "target")
    body = [(c.title, c.engine, c.digest, c.kv, c.fidelity, c.batching, c.gpus, c.target) for c in report.columns]
    return _grid(head, body)


def _table(report: Report, section: Section) -> list[str]:
    head = ("", *(column.title for column in report.columns))
    body = [(row_heading(section, row), *(_cell(section, row, c) for c in row.cells)) for row in section.rows]
    spreads = row_spreads(section.rows)
    return [*_grid(head, body), *(["", f"Spread: {_inline(spreads)}."] if spreads else [])]


def _cell(section: Section, row: Row, cell: Cell) -> str:
    spread, share = spread_text(cell, row), share_text(cell)
    parts = (
        value_text(cell, row),
        ratio_text(cell),
        f"[{spread}]" if spread else "",
        f"{share} of limit" if share else "",
        cell_source(section, cell),
        cell.remark,
    )
    return ", ".join(filter(None, parts))


def _notes(report: Report) -> list[str]:
    lines = ["", "## Notes", ""] if report.notes or report.problems else []
    lines += [f"{i}. {_inline(note)}" for i, note in enumerate(report.notes, 1)]
    lines += [f"- left out: {_inline(problem)}" for problem in report.problems]
    return lines


def _checks(report: Report) -> list[str]:
    passed = sum(check.status == "pass" for check in report.checks)
    rest = [check for check in report.checks if check.status != "pass"]
    lines = [f"{passed} of {len(report.checks)} passed."]
    if rest:
        body = [(c.status, c.column, c.condition, c.name, c.detail) for c in rest]
        lines += ["", *_grid(("status", "configuration", "cell", "check", "arithmetic"), body)]
    return lines


def _facts(pairs: Iterable[tuple[str, str]]) -> list[str]:
    return [f"- **{_inline(name)}**: {_inline(text)}" for name, text in pairs] or ["None."]


def _grid(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *body]
    return [f"| {' | '.join(_inline(cell) for cell in line)} |" for line in lines]


def _inline(text: str) -> str:
    """Text that cannot end a table cell, start a line or a tag, or be read as markup."""
    flat = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("](", "]\\(")
    return flat.replace("<", "&lt;").replace(">", "&gt;").replace("`", "\\`").replace("*", "\\*").replace("_", "\\_")
