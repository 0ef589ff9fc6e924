"""Draws the report's figures as inline SVG with matplotlib, imported when the first one is drawn.

Text and rules take the page's own colours, so a figure follows light, dark and print. Knows nothing of records.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trtkit.report.model import Curve, Plot
from trtkit.spec.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PALETTE = ("#0072b2", "#d97706", "#009e73", "#c0579a", "#4aa3df", "#b8860b", "#7a5cc7", "#8c8c8c")
"""One colour per column, told apart by readers with any colour vision, on light and on dark ground."""
MARKERS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("X", "✖"), ("h", "⬢"))
"""One marker per column: matplotlib's name and the sign that stands for it in text."""
_INK, _RULE = "#010203", "#040506"
_DASHES = ("-", "--", ":", "-.")
_PART_ALPHA = {"weights": 1.0, "KV pool": 0.6, "other": 0.25}
_STYLE = {
    "svg.fonttype": "none",
    "font.family": ["sans-serif"],
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.edgecolor": _RULE,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.autolayout": True,
}


def colour(column: int) -> str:
    """The column's colour."""
    return PALETTE[column % len(PALETTE)]


def sign(column: int) -> str:
    """The column's marker as a character."""
    return MARKERS[column % len(MARKERS)][1]


def draw(plot: Plot, names: Sequence[str]) -> str:
    """The figure as an `<svg>` element without namespaces, scripts or outside references.

    Args:
        plot: what to show.
        names: a short name per column, for axes that name columns.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("plots need matplotlib: pip install 'trtkit[report]'") from None
    with mpl.rc_context({**_STYLE, "svg.hashsalt": plot.key}):
        figure = Figure(figsize=(6.0, 3.6))
        axes = figure.add_subplot()
        _FILL[plot.style](axes, plot, names)
        axes.set_xlabel(_plain(plot.x_label))
        axes.set_ylabel(_plain(plot.y_label))
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(out.getvalue(), plot.key)


def _groups(plot: Plot) -> list[str]:
    return list(dict.fromkeys(curve.group for curve in plot.curves))


def _bounds(curve: Curve) -> list[list[float]] | None:
    """Distances to the lower and upper bounds, None where a point has none."""
    if any(point.low is None or point.high is None for point in curve.points):
        return None
    below = [max(0.0, p.y - p.low) for p in curve.points if p.low is not None]
    return [below, [max(0.0, p.high - p.y) for p in curve.points if p.high is not None]]


def _lines(axes: Axes, plot: Plot, names: Sequence[str]) -> None:
    groups = _groups(plot)
    for curve in plot.curves:
        axes.errorbar(
            [point.x for point in curve.points],
            [point.y for point in curve.points],
            yerr=None if plot.style == "pareto" else _bounds(curve),
            color=colour(curve.column),
            marker=MARKERS[curve.column % len(MARKERS)][0],
            linestyle=_DASHES[groups.index(curve.group) % len(_DASHES)],
            markersize=5,
            capsize=3,
            linewidth=1.6,
        )
    axes.set_ylim(bottom=0)
    if plot.style == "lines":
        ticks = sorted({point.x for curve in plot.curves for point in curve.points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    else:
        _name_points(axes, plot)
        axes.set_xlim(left=0)
    _group_legend(axes, groups)


def _name_points(axes: Axes, plot: Plot) -> None:
    for curve in plot.curves:
        for point in curve.points:
            at = (point.x, point.y)
            axes.annotate(_plain(point.label), at, xytext=(5, 4), textcoords="offset points", fontsize=8)


def _group_legend(axes: Axes, groups: Sequence[str]) -> None:
    """Which dash is which group, where there is more than one."""
    if len(groups) < 2:
        return
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=_INK, linestyle=_DASHES[i % len(_DASHES)], label=_plain(group))
        for i, group in enumerate(groups)
    ]
    axes.legend(handles=handles, fontsize=9)


def _steps(axes: Axes, plot: Plot, names: Sequence[str]) -> None:
    for curve in plot.curves:
        axes.step(
            [point.x for point in curve.points],
            [point.y for point in curve.points],
            where="post",
            color=colour(curve.column),
            linestyle=_DASHES[curve.column % len(_DASHES)],
            linewidth=1.8,
        )
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=0)


def _bars(axes: Axes, plot: Plot, names: Sequence[str]) -> None:
    groups = _groups(plot)
    width = 0.8 / len(groups)
    for curve in plot.curves:
        place = groups.index(curve.group)
        axes.bar(
            [point.x + (place + 0.5) * width - 0.4 for point in curve.points],
            [point.y for point in curve.points],
            width * 0.94,
            yerr=_bounds(curve),
            color=colour(curve.column),
            alpha=1.0 - 0.45 * (place % 3) / 2,
            ecolor=_INK,
            capsize=3,
        )
    _name_columns(axes, [int(point.x) for curve in plot.curves for point in curve.points], names)
    if len(groups) > 1:
        axes.set_title(_plain("bars of one colour, left to right: " + "; ".join(groups)), fontsize=8, color=_INK)


def _stacks(axes: Axes, plot: Plot, names: Sequence[str]) -> None:
    for stack in plot.stacks:
        bottom = 0.0
        for name, value in stack.parts:
            shade = _PART_ALPHA.get(name, 0.4)
            axes.bar(stack.column, value, 0.7, bottom=bottom, color=colour(stack.column), alpha=shade)
            bottom += value
    _name_columns(axes, [stack.column for stack in plot.stacks], names)
    from matplotlib.patches import Patch

    parts = dict.fromkeys(name for stack in plot.stacks for name, _ in stack.parts)
    handles: list[Any] = [Patch(color=_INK, alpha=_PART_ALPHA.get(name, 0.4), label=name) for name in reversed(parts)]
    axes.legend(handles=handles, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _name_columns(axes: Axes, columns: Sequence[int], names: Sequence[str]) -> None:
    present = sorted(set(columns))
    axes.set_xticks(present, [_plain(names[column]) for column in present], fontsize=9)
    axes.grid(visible=False, axis="x")


_FILL = {"lines": _lines, "pareto": _lines, "steps": _steps, "bars": _bars, "stacks": _stacks}


def _plain(text: str) -> str:
    """Text that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")


def _inline(svg: str, key: str) -> str:
    """Only the `<svg>` element, its ids made the figure's own and its two marker colours made the page's."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", body)
    body = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", body, count=1)
    body = body.replace("xlink:href", "href")
    body = re.sub(r'\bid="', f'id="{key}-', body)
    body = body.replace("url(#", f"url(#{key}-").replace('href="#', f'href="#{key}-')
    return body.replace(_INK, "currentColor").replace(_RULE, "var(--rule)").strip()
