from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from support.synthetic_records import PRICES, bench, full_set, quality

from trtkit.report import html
from trtkit.report import json as report_json
from trtkit.report.assemble import assemble
from trtkit.report.model import Report
from trtkit.report.records import Records

VOID = {"meta", "br", "link", "img", "input", "hr"}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class Page(HTMLParser):
    """Elements, the text of scripts, and whether every element is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def report() -> Report:
    cells, scores = full_set()
    return assemble(Records(bench=cells, quality=scores, problems=("bad.json: damaged",)), PRICES)


@pytest.fixture(scope="module")
def source(report: Report) -> str:
    return html.render(report)


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_the_page_is_well_formed(page: Page) -> None:
    assert page.open == []


def test_the_page_loads_nothing(source: str, page: Page) -> None:
    assert re.findall(r"https?://", source) == []
    assert [a for _, a in page.elements if "src" in a or "srcset" in a] == []
    assert [a["href"] for _, a in page.elements if not a.get("href", "#").startswith("#")] == []
    assert "@import" not in source
    assert not re.search(r"url\((?!#)", source)
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


def test_no_script_runs(page: Page) -> None:
    assert [script["type"] for script in page.all("script")] == ["application/json"]
    assert [a for _, a in page.elements if any(key.startswith("on") for key in a)] == []


def test_every_link_leads_somewhere_and_ids_are_unique(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {a["href"].removeprefix("#") for a in page.all("a")} <= set(ids)


def test_the_embedded_data_is_the_json_report(report: Report, page: Page) -> None:
    assert json.loads("".join(page.scripts)) == json.loads(report_json.render(report))


def test_every_metric_shown_is_in_the_data(report: Report, page: Page) -> None:
    data = json.loads("".join(page.scripts))["data"]
    stored = {row["label"] for s in (*data["comparison"], *data["details"]) for row in s["rows"]}
    shown = {row.label for s in (*report.comparison, *report.details) for row in s.rows}
    assert shown == stored
    assert all(definition.label in page.text for definition in report.definitions)


def test_tables_have_captions_and_header_cells(page: Page) -> None:
    assert len(page.all("caption")) == len(page.all("table")) > 5
    assert all("scope" in head for head in page.all("th"))


def test_figures_have_a_text_alternative(report: Report, page: Page) -> None:
    pictures = [svg for svg in page.all("svg") if svg.get("role") == "img"]
    assert [picture["aria-label"] for picture in pictures] == [plot.summary for plot in report.plots]


def test_invalid_cells_notes_and_damaged_records_are_shown(page: Page) -> None:
    assert "invalid [1]" in page.text
    assert "above the limit of 900 tok/s" in page.text
    assert "bad.json: damaged" in page.text


def test_text_from_records_is_escaped_wherever_it_is_printed() -> None:
    cell, score = bench(), quality()
    model = replace(cell.engine.plan.model, name=HOSTILE)
    plan = replace(cell.engine.plan, model=model, name=HOSTILE, gpu=HOSTILE)
    engine = replace(cell.engine, name=HOSTILE, label=HOSTILE, plan=plan, digest=HOSTILE)
    environment = replace(cell.environment, device=HOSTILE, command=HOSTILE, versions={HOSTILE: HOSTILE})
    check = replace(cell.checks[0], name=HOSTILE, detail=HOSTILE, status="fail")
    bad = replace(
        cell,
        engine=engine,
        environment=environment,
        checks=(check,),
        protocol=HOSTILE,
        workload=replace(cell.workload, dataset=HOSTILE),
    )
    worse = replace(score, engine=engine, task=HOSTILE, metric=HOSTILE, unit=HOSTILE, protocol=HOSTILE)
    hostile = assemble(Records(bench=(bad, replace(bad, valid=False)), quality=(worse,), problems=(HOSTILE,)), PRICES)
    page = Page(html.render(replace(hostile, title=HOSTILE, subtitle=HOSTILE)))
    assert page.open == []
    assert len(page.all("script")) == 1
    assert page.all("img") == []
    assert json.loads("".join(page.scripts))["data"]["title"] == HOSTILE


def test_without_matplotlib_the_page_keeps_its_tables_and_says_what_is_missing(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = Page(html.render(report))
    assert page.all("svg") == []
    assert "plots need matplotlib" in page.text
    assert report.plots[0].summary in page.text


def test_a_ratio_is_judged_by_the_direction_and_the_spread(page: Page) -> None:
    faster, slower = re.search(r"1\.50x better", page.text), re.search(r"0\.67x better", page.text)
    assert faster, "more tokens per second is better"
    assert slower, "a shorter time is better"
    assert "1.08x worse" in page.text, "a higher perplexity is worse"


def test_a_share_above_the_limit_is_marked() -> None:
    cell = bench()
    share = replace(cell.shares["tps"], value=1.2)
    over = html.render(assemble(Records(bench=(replace(cell, shares={"tps": share}),)), PRICES))
    assert 'class="share over"' in over
    assert "width:100.0%" in over
    assert "120 % of limit" in over
