"""The report as one HTML file that needs no network, no script and no other file.

Everything that came from a record is escaped; the page's own policy forbids the browser to load anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources

from trtkit.report import json as report_json
from trtkit.report.html_tables import comparison, details, grid
from trtkit.report.model import Plot, Report
from trtkit.report.plots import colour, draw, sign
from trtkit.spec.errors import MissingDependencyError

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def render(report: Report) -> str:
    """The whole page."""
    sections = (
        ("comparison", "Comparison", comparison(report)),
        ("plots", "Plots", _plots(report)),
        ("notes", "Notes", _notes(report)),
        ("assumptions", "Assumptions", _facts((fact.name, fact.text) for fact in report.assumptions)),
        ("checks", "Checks", _checks(report)),
        ("all-metrics", "Every metric of every cell", details(report)),
        ("definitions", "Definitions", _definitions(report)),
        ("environment", "Environment", _facts((fact.name, fact.text) for fact in report.environment)),
        ("data", "Data", _data(report)),
    )
    body = "\n".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>\n{text}\n</section>'
        for key, title, text in sections
        if text
    )
    links = " ".join(f'<a href="#{key}">{title}</a>' for key, title, text in sections if text)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="color-scheme" content="light dark">
<title>{escape(report.title)}</title>
<style>
{_style(report)}
</style>
</head>
<body>
<header>
<h1>{escape(report.title)}</h1>
<p class="subtitle">{escape(report.subtitle)}</p>
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{_tiles(report)}
{body}
</main>
</body>
</html>
"""


def _style(report: Report) -> str:
    """The style sheet, and one colour class per column."""
    sheet = resources.files("trtkit.report").joinpath("style.css").read_text(encoding="utf-8")
    return sheet + "\n".join(f".c{i} {{ color: {colour(i)}; }}" for i in range(len(report.columns)))


def _tiles(report: Report) -> str:
    kinds = {True: "good", False: "bad", None: "plain"}
    tiles = "\n".join(
        f'<li class="tile {kinds[tile.good]}"><span class="tile-title">{escape(tile.title)}</span>'
        f'<strong>{escape(tile.value)}</strong><span class="tile-detail">{escape(tile.detail)}</span></li>'
        for tile in report.tiles
    )
    return f'<ul class="tiles" aria-label="Verdict">\n{tiles}\n</ul>'


def _plots(report: Report) -> str:
    if not report.plots:
        return ""
    legend = " ".join(
        f'<li><span class="c{i}" aria-hidden="true">{sign(i)}</span> {escape(column.title)}</li>'
        for i, column in enumerate(report.columns)
    )
    names = [f"{sign(i)} {column.role}" for i, column in enumerate(report.columns)]
    figures = "\n".join(_figure(plot, names) for plot in report.plots)
    return (
        f'<ul class="legend" aria-label="Colours and markers">{legend}</ul>\n<div class="figures">\n{figures}\n</div>'
    )


def _figure(plot: Plot, names: Sequence[str]) -> str:
    try:
        picture = draw(plot, names).replace("<svg", f'<svg role="img" aria-label="{escape(plot.summary)}"', 1)
    except MissingDependencyError as error:
        picture = f'<p class="missing">{escape(str(error))}</p>'
    return (
        f"<figure>\n<h3>{escape(plot.title)}</h3>\n{picture}\n<figcaption>{escape(plot.caption)}"
        f"<details><summary>In words</summary><p>{escape(plot.summary)}</p></details></figcaption>\n</figure>"
    )


def _notes(report: Report) -> str:
    notes = "".join(f'<li id="note-{i}">{escape(note)}</li>' for i, note in enumerate(report.notes, 1))
    problems = "".join(f"<li>{escape(problem)}</li>" for problem in report.problems)
    left_out = f'<h3>Records left out</h3><ul class="bad-list">{problems}</ul>' if problems else ""
    return (f"<ol>{notes}</ol>" if notes else "") + left_out


def _checks(report: Report) -> str:
    head = ("status", "configuration", "cell", "check", "arithmetic")
    lines = [(c.status, c.column, c.condition, c.name, c.detail) for c in report.checks]
    rest = [line for line in lines if line[0] != "pass"]
    passed = [line for line in lines if line[0] == "pass"]
    text = f"<p>{len(passed)} of {len(lines)} passed.</p>"
    if rest:
        text += grid("Checks that did not pass", head, rest)
    if passed:
        text += f"<details><summary>Passed checks</summary>{grid('Passed checks', head, passed)}</details>"
    return text


def _definitions(report: Report) -> str:
    lines = [(d.label, d.unit, d.better, d.formula) for d in report.definitions]
    return grid("What each quantity means", ("quantity", "unit", "better", "definition"), lines)


def _facts(pairs: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in pairs)
    return f"<dl>{lines}</dl>" if lines else ""


def _data(report: Report) -> str:
    """The report's own JSON; no character in it can end the element."""
    text = report_json.compact(report)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return (
        "<p>Every number on this page, unrounded, is in this file as JSON, in the element <code>report-data</code>.</p>\n"
        f'<script type="application/json" id="report-data">\n{text}</script>'
    )
