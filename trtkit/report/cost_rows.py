"""The cost rows: dollars per million output tokens at full load, by `trtkit.plan.cost`, with the arithmetic in words."""

from __future__ import annotations

from collections.abc import Sequence

from trtkit.plan.cost import COST_UNIT, Load, estimate, rented
from trtkit.plan.prices import PriceBook
from trtkit.report.cells import (
    NOT_MEASURED,
    Notes,
    against_first,
    condition,
    measured_cell,
    missing,
    restricted,
    stat_cell,
)
from trtkit.report.columns import Configuration
from trtkit.report.model import OK, Cell, Fact, Row, Section
from trtkit.report.rows import gap
from trtkit.spec.measured import Measured
from trtkit.spec.metrics import LOWER
from trtkit.spec.result import BenchResult, MetricResult, Stat

COST_KEY = "cost_full_load"
Context = tuple[int, int, str]
"""ISL, OSL and dataset, or what its prompts share: a cost row compares the same work."""


def cost_section(found: Sequence[Configuration], prices: PriceBook, notes: Notes) -> tuple[Section, tuple[Fact, ...]]:
    """One row per prompt length, each configuration at its fastest valid load; and every price's arithmetic."""
    contexts = sorted({_context(result) for c in found for result in c.bench})
    rows, facts = [], []
    for context in contexts:
        cells = []
        for configuration in found:
            cell, fact = _cost_cell(configuration, context, prices, notes)
            reason = gap(found, configuration, context[0]) if cell.status == OK else ""
            cells.append(restricted(cell, reason, notes) if reason else cell)
            facts += [] if fact is None else [fact]
        row = Row(
            key=f"{COST_KEY}@{'-'.join(str(part) for part in context)}",
            metric=COST_KEY,
            label="cost per 1M output tokens",
            condition=f"full load at the fastest concurrency, {_label(context)}",
            unit=COST_UNIT,
            digits=3,
            better=LOWER,
            cells=tuple(cells),
        )
        rows.append(against_first(row))
    return Section(title="Cost", rows=tuple(rows)), (*_machines(found, prices), *facts)


def _context(result: BenchResult) -> Context:
    load = result.workload
    shared = load.shared_prefix_tokens
    return load.isl, load.osl, f"{shared} tokens shared" if shared else load.dataset


def _label(context: Context) -> str:
    isl, osl, dataset = context
    return f"ISL {isl or 'as given'}, OSL {osl}" + ("" if dataset == "synthetic" else f", {dataset.rsplit('/', 1)[-1]}")


def fastest(configuration: Configuration, context: Context | None = None) -> BenchResult | None:
    """The valid record with the most output tokens per second, of one context if given."""
    valid = [
        result
        for result in configuration.bench
        if result.valid and "tps" in result.metrics and (context is None or _context(result) == context)
    ]
    return max(valid, key=lambda r: r.metrics["tps"].stats["value"].value, default=None)


def _cost_cell(
    configuration: Configuration, context: Context, prices: PriceBook, notes: Notes
) -> tuple[Cell, Fact | None]:
    engine, gpu = configuration.column.engine, configuration.plan.gpu
    if not any(_context(result) == context for result in configuration.bench):
        return missing(NOT_MEASURED), None
    price = prices.find(gpu)
    if price is None:
        return missing(f"no price for {gpu}; give one with --prices FILE", notes), None
    result = fastest(configuration, context)
    rate = None if result is None else _rate(result)
    if result is None or rate is None:
        return missing(f"{engine}: no valid throughput to price", notes), None
    line = estimate(rented(price, configuration.plan.parallel.world_size), Load(output_tok_s=rate))[0]
    load = condition(result.workload)
    fact = Fact(name=f"{configuration.column.title}, {load}", text=f"{line.arithmetic} ({line.definition})")
    return measured_cell(line.cost, spread=stat_cell(*_speed(result)).spread), fact


def _speed(result: BenchResult) -> tuple[Stat, MetricResult]:
    metric = result.metrics["tps"]
    return metric.stats["value"], metric


def _rate(result: BenchResult) -> Measured | None:
    """The throughput with its spread; None where it is nothing that could be priced."""
    cell = stat_cell(*_speed(result))
    if cell.value is None or cell.value <= 0 or cell.source is None:
        return None
    # An interval of few, uneven repeats may reach below zero, where a throughput has no price.
    low = cell.low if cell.low is not None and cell.low > 0 else None
    return Measured(value=cell.value, unit=cell.unit, source=cell.source, low=low, high=cell.high)


def _machines(found: Sequence[Configuration], prices: PriceBook) -> tuple[Fact, ...]:
    """What an hour of each machine costs, and who says so."""
    sizes = dict.fromkeys((c.plan.gpu, c.plan.parallel.world_size) for c in found if c.bench)
    priced = [(gpu, count, prices.find(gpu)) for gpu, count in sizes]
    return tuple(
        Fact(name=f"price of {count} x {gpu}", text=rented(price, count).note)
        for gpu, count, price in priced
        if price is not None
    )
