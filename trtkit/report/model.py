"""What a report says, before anybody decides how it looks. Renderers read this and do no arithmetic on results."""

from __future__ import annotations

from dataclasses import dataclass

from trtkit.spec.measured import Measured, Source

OK, INVALID, MISSING = "ok", "invalid", "missing"
REPORT_KIND = "report"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One number of one configuration, or why there is none.

    `low` and `high` bound the value as `spread` says ("95 % interval of 3 repeats", "min-max of 2 repeats", ...);
    `error` is the standard error where that is what is known.
    `share` is the part of the machine's own limit that was reached, 1.0 being the limit. `ratio` is the value over
    the first column's, and `distinct` whether the two spreads are apart (None where a spread is unknown). `note` is
    the number of the report's note with the full reason of an invalid or missing value. `remark` is small print of
    this cell alone, such as a paired difference.
    """

    status: str = OK
    value: float | None = None
    unit: str = ""
    low: float | None = None
    high: float | None = None
    error: float | None = None
    spread: str = ""
    source: Source | None = None
    share: Measured | None = None
    ratio: float | None = None
    distinct: bool | None = None
    samples: int | None = None
    reason: str = ""
    note: int | None = None
    remark: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of a table: the same quantity for every configuration, in the order of the columns."""

    key: str
    metric: str
    label: str
    condition: str
    unit: str
    digits: int
    better: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Rows under one heading."""

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One configuration: an engine on a machine. `fidelity` says how closely the KV policy was carried out."""

    title: str
    role: str
    engine: str
    digest: str
    precision: str
    kv: str
    fidelity: str
    batching: str
    target: str
    device: str
    gpus: str
    label: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One statement of the verdict strip."""

    title: str
    value: str
    detail: str
    good: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckLine:
    """One plausibility check of one record."""

    column: str
    condition: str
    name: str
    status: str
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Definition:
    """What a printed quantity means."""

    key: str
    label: str
    unit: str
    better: str
    formula: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """A named line of text: the environment, an assumption."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A point of a plot with the bounds of its y value."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    label: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """Points of one configuration (`column` is its index); `group` tells several curves of one column apart."""

    column: int
    group: str
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """One bar in parts: (name, value) from the bottom up."""

    column: int
    parts: tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """One figure: either curves or stacks. `style` is lines, steps, pareto or bars; `summary` is its alternative text."""

    key: str
    title: str
    caption: str
    x_label: str
    y_label: str
    style: str
    summary: str
    curves: tuple[Curve, ...] = ()
    stacks: tuple[Stack, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything a page says. `comparison` is the main table, `details` every metric of every cell."""

    title: str
    subtitle: str
    columns: tuple[Column, ...]
    tiles: tuple[Tile, ...]
    comparison: tuple[Section, ...]
    details: tuple[Section, ...]
    notes: tuple[str, ...]
    assumptions: tuple[Fact, ...]
    definitions: tuple[Definition, ...]
    checks: tuple[CheckLine, ...]
    environment: tuple[Fact, ...]
    plots: tuple[Plot, ...]
    problems: tuple[str, ...] = ()
