"""The rows of the comparison and of the detail tables, from the records of each configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from trtkit.report.cells import (
    NOT_MEASURED,
    Notes,
    against_first,
    condition,
    metric_cell,
    missing,
    restricted,
)
from trtkit.report.columns import Configuration
from trtkit.report.model import OK, Cell, Row, Section
from trtkit.spec.codec import digest
from trtkit.spec.measured import Source
from trtkit.spec.metrics import LOWER, METRICS
from trtkit.spec.result import BenchResult, MemorySplit
from trtkit.spec.workload import Workload

MEMORY_PARTS: tuple[tuple[str, str, Callable[[MemorySplit], int | None]], ...] = (
    ("peak_memory", "peak memory", lambda m: m.peak_bytes),
    ("memory_weights", "of it weights", lambda m: m.weight_bytes),
    ("memory_kv_pool", "of it KV pool reserved", lambda m: m.kv_pool_bytes),
    ("memory_kv_peak", "KV peak used", lambda m: m.kv_peak_bytes),
    ("memory_other", "of it other", lambda m: m.other_bytes),
)
_GROWS_WITH_LOAD = ("peak_memory", "memory_kv_peak", "memory_other")
_STAT_ORDER = ("value", "mean", "p50", "p90", "p95", "p99", "min", "max")


def workloads(found: Sequence[Configuration]) -> tuple[tuple[Workload, str], ...]:
    """Every workload once with its label, short prompts first; equal labels are told apart."""
    unique = {digest(result.workload): result.workload for c in found for result in c.bench}
    ordered = sorted(unique.values(), key=_load_order)
    labels = [condition(workload) for workload in ordered]
    return tuple(
        (workload, label if labels.count(label) == 1 else f"{label} ({_particulars(workload)})")
        for workload, label in zip(ordered, labels, strict=True)
    )


def _load_order(workload: Workload) -> tuple[int, int, float, float, str]:
    rate = workload.request_rate or 0.0
    return workload.isl, workload.osl, rate, workload.concurrency or 0, digest(workload)


def _particulars(workload: Workload) -> str:
    return f"{workload.num_requests} requests, seed {workload.seed}, {digest(workload)[:6]}"


def result_for(configuration: Configuration, workload: Workload) -> BenchResult | None:
    """The configuration's record of this workload."""
    return next((result for result in configuration.bench if result.workload == workload), None)


def metric_row(
    found: Sequence[Configuration], workload: tuple[Workload, str], key: str, stat: str, notes: Notes
) -> Row:
    """One statistic of one metric under one load, for every configuration."""
    definition = METRICS[key]
    row = Row(
        key=f"{key}.{stat}@{digest(workload[0])[:8]}",
        metric=key,
        label=definition.label if stat == "value" else f"{definition.label} {stat}",
        condition=workload[1],
        unit=definition.unit,
        digits=definition.digits,
        better=definition.better,
        cells=tuple(metric_cell(result_for(c, workload[0]), key, stat, notes) for c in found),
    )
    return against_first(row)


def speed_sections(found: Sequence[Configuration], notes: Notes) -> tuple[Section, ...]:
    """TPS at every load, TTFT at every context under the lightest load, TPOT at every load."""
    loads = workloads(found)
    if not loads:
        return ()
    lightest = {(w.isl, w.osl, w.dataset, w.shared_prefix_tokens): (w, label) for w, label in reversed(loads)}
    with_goals = [load for load in loads if load[0].slo != type(load[0].slo)()]
    sections = (
        ("Throughput", [("tps", "value", load) for load in loads]),
        ("Time to first token", [("ttft_ms", "p50", load) for load in reversed(list(lightest.values()))]),
        ("Time per output token", [("tpot_ms", "p50", load) for load in loads]),
        ("Goodput", [("goodput_s", "value", load) for load in with_goals]),
    )
    return tuple(
        Section(title=title, rows=tuple(metric_row(found, load, key, stat, notes) for key, stat, load in rows))
        for title, rows in sections
        if rows
    )


def gap(found: Sequence[Configuration], configuration: Configuration, isl: int | None = None) -> str:
    """Why a best or largest over this configuration's loads is not over the same loads as the others', or ""."""
    wanted = [load for load, _ in workloads(found) if isl is None or load.isl == isl]
    valid = {digest(result.workload) for result in configuration.bench if result.valid}
    lacking = sum(digest(load) not in valid for load in wanted)
    if not lacking:
        return ""
    return f"{configuration.column.engine}: {lacking} of {len(wanted)} loads have no valid record, so not comparable"


def memory_section(found: Sequence[Configuration], notes: Notes) -> Section:
    """Peak memory and its parts, from the valid cell with the highest peak of each configuration."""
    methods = sorted({result.memory.peak_method for c in found if (result := largest(c)) is not None})
    rows = []
    for key, label, part in MEMORY_PARTS:
        cells = []
        for configuration in found:
            cell = _memory_cell(configuration, part, notes)
            reason = gap(found, configuration) if key in _GROWS_WITH_LOAD and cell.status == OK else ""
            cells.append(restricted(cell, reason, notes) if reason else cell)
        row = Row(
            key=key,
            metric=key,
            label=label,
            condition=f"largest over the valid cells, sampled by {' and '.join(methods) or 'nothing'}",
            unit="B",
            digits=2,
            better=LOWER,
            cells=tuple(cells),
        )
        rows.append(against_first(row))
    return Section(title="Memory", rows=tuple(rows))


def largest(configuration: Configuration) -> BenchResult | None:
    """The valid record with the highest memory peak."""
    valid = [result for result in configuration.bench if result.valid]
    return max(valid, key=lambda r: (r.memory.peak_bytes or 0, r.memory.kv_peak_bytes or 0), default=None)


def _memory_cell(configuration: Configuration, part: Callable[[MemorySplit], int | None], notes: Notes) -> Cell:
    result = largest(configuration)
    if result is None:
        if not configuration.bench:
            return missing(NOT_MEASURED)
        return missing(f"{configuration.column.engine}: no valid cell to take the memory from", notes)
    size = part(result.memory)
    if size is None:
        return missing(f"{configuration.column.engine}: memory was not sampled ({result.memory.peak_method})", notes)
    return Cell(value=float(size), unit="B", source=Source.MEASURED)


def detail_sections(found: Sequence[Configuration], notes: Notes) -> tuple[Section, ...]:
    """Every metric and statistic of every cell: one section per load."""
    sections = []
    for load in workloads(found):
        rows = [metric_row(found, load, key, stat, notes) for key, stat in _present(found, load[0])]
        rows += [_memory_row(found, load, key) for key in range(len(MEMORY_PARTS))]
        sections.append(Section(title=load[1][:1].upper() + load[1][1:], rows=tuple(rows)))
    return tuple(sections)


def _present(found: Iterable[Configuration], workload: Workload) -> list[tuple[str, str]]:
    stats: set[tuple[str, str]] = set()
    for configuration in found:
        result = result_for(configuration, workload)
        if result is not None:
            stats |= {(key, stat) for key, metric in result.metrics.items() if key in METRICS for stat in metric.stats}
    keys = list(METRICS)
    return sorted(stats, key=lambda pair: (keys.index(pair[0]), _stat_rank(pair[1])))


def _stat_rank(stat: str) -> tuple[int, str]:
    return (_STAT_ORDER.index(stat) if stat in _STAT_ORDER else len(_STAT_ORDER)), stat


def _memory_row(found: Sequence[Configuration], load: tuple[Workload, str], index: int) -> Row:
    key, label, part = MEMORY_PARTS[index]
    cells = []
    for configuration in found:
        result = result_for(configuration, load[0])
        size = None if result is None or not result.valid else part(result.memory)
        cells.append(
            missing(NOT_MEASURED if result is None or result.valid else "the cell is invalid")
            if size is None
            else Cell(value=float(size), unit="B", source=Source.MEASURED)
        )
    row = Row(
        key=f"{key}@{digest(load[0])[:8]}",
        metric=key,
        label=label,
        condition=load[1],
        unit="B",
        digits=2,
        better=LOWER,
        cells=tuple(cells),
    )
    return against_first(row)
