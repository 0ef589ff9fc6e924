from __future__ import annotations

import re
import sys

import pytest

from trtkit.report.model import Curve, Plot, Point, Stack
from trtkit.report.plots import MARKERS, draw
from trtkit.spec.errors import MissingDependencyError


def plot(style: str, *, key: str = "p", count: int = 3, group: str = "g", y: float = 2.0) -> Plot:
    points = (Point(x=1.0, y=y, low=y / 2, high=y * 2, label="1"), Point(x=8.0, y=2 * y, label="8"))
    bars = style == "bars"
    return Plot(
        key=key,
        title="t",
        caption="c",
        x_label="x",
        y_label="USD $ a_b^c $",
        style=style,
        summary="s",
        curves=()
        if style == "stacks"
        else tuple(
            Curve(column=i, group=f"{group}{j}", points=(Point(x=float(i), y=y),) if bars else points)
            for i in range(count)
            for j in range(2)
        ),
        stacks=tuple(Stack(column=i, parts=(("weights", 1.0), ("KV pool", y))) for i in range(count))
        if style == "stacks"
        else (),
    )


STYLES = ("lines", "pareto", "steps", "bars", "stacks")


@pytest.mark.parametrize("style", STYLES)
def test_a_figure_is_one_svg_that_loads_nothing(style: str) -> None:
    svg = draw(plot(style), [f"c{i}" for i in range(3)])
    assert svg.startswith("<svg")
    assert svg.endswith("</svg>")
    assert "http" not in svg
    assert "<script" not in svg
    assert "currentColor" in svg


@pytest.mark.parametrize("style", STYLES)
def test_ids_belong_to_the_figure_and_every_reference_hits_one(style: str) -> None:
    svg = draw(plot(style, key="mine"), ["a", "b", "c"])
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert len(ids) == len(set(ids))
    assert all(name.startswith("mine-") for name in ids)
    references = re.findall(r'(?:url\(#|href="#)([^")]*)', svg)
    assert references
    assert set(references) <= set(ids)


@pytest.mark.parametrize("style", STYLES)
def test_a_figure_of_zeros_and_of_many_columns_is_drawn_without_a_warning(style: str) -> None:
    assert draw(plot(style, y=0.0, count=len(MARKERS) + 1), ["● long name"] * (len(MARKERS) + 1))


def test_markup_and_dollars_in_a_group_are_text() -> None:
    svg = draw(plot("lines", group="<script>$x_1^$"), ["a", "b", "c"])
    assert "<script" not in svg
    assert "&lt;script&gt;$x_1^$0" in svg


def test_the_same_figure_is_drawn_the_same() -> None:
    assert draw(plot("lines"), ["a", "b", "c"]) == draw(plot("lines"), ["a", "b", "c"])


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'trtkit\[report\]'"):
        draw(plot("lines"), ["a", "b", "c"])
