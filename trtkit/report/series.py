"""What the plots show, taken from valid records only. Knows nothing of drawing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from trtkit.report.columns import Configuration
from trtkit.report.model import OK, Curve, Plot, Point, Row, Section, Stack
from trtkit.report.rows import largest, result_for, workloads
from trtkit.report.text import number
from trtkit.spec.result import BenchResult, MetricResult, RequestSample
from trtkit.spec.units import MIB, NS_PER_MS
from trtkit.spec.workload import Workload

MAX_CDF_POINTS = 200
Latency = Callable[[RequestSample], int | None]


def plots(found: Sequence[Configuration], cost: Section) -> tuple[Plot, ...]:
    """Every figure that has something to show."""
    drawn = (
        _throughput(found),
        _first_token(found),
        _memory(found),
        _pareto(found),
        _cdf(found, "ttft_cdf", "Time to first token, all requests", "TTFT (ms)", _ttft),
        _cdf(found, "e2e_cdf", "End-to-end latency, all requests", "E2E (ms)", _e2e),
        _cost(found, cost),
    )
    return tuple(plot for plot in drawn if plot.curves or plot.stacks)


def headline_load(found: Sequence[Configuration]) -> tuple[Workload, str] | None:
    """The load that most configurations have a valid record of; of several the heaviest."""
    loads = workloads(found)

    def rank(load: tuple[Workload, str]) -> tuple[int, float, int]:
        valid = sum(1 for c in found if (r := result_for(c, load[0])) is not None and r.valid)
        return valid, load[0].concurrency or load[0].request_rate or 0, load[0].isl

    return max(loads, key=rank, default=None)


def _valid(configuration: Configuration) -> list[BenchResult]:
    return [result for result in configuration.bench if result.valid]


def _point(x: float, metric: MetricResult, stat: str, label: str = "") -> Point:
    found = metric.stats[stat]
    low, high = found.low, found.high
    if (low is None or high is None) and len(found.repeats) > 1:
        low, high = min(found.repeats), max(found.repeats)
    return Point(x=x, y=found.value, low=low, high=high, label=label)


def _has(result: BenchResult, key: str, stat: str) -> bool:
    return key in result.metrics and stat in result.metrics[key].stats


def _curves(
    found: Sequence[Configuration],
    group: Callable[[Workload], str],
    point: Callable[[BenchResult], Point | None],
) -> tuple[Curve, ...]:
    curves = []
    for index, configuration in enumerate(found):
        grouped: dict[str, list[Point]] = {}
        for result in _valid(configuration):
            place = point(result)
            if place is not None:
                grouped.setdefault(group(result.workload), []).append(place)
        curves += [
            Curve(column=index, group=name, points=tuple(sorted(points, key=lambda p: p.x)))
            for name, points in sorted(grouped.items())
        ]
    return tuple(curves)


def _summary(found: Sequence[Configuration], curves: Sequence[Curve], x: str, unit: str) -> str:
    """The figure in words: where each curve starts and ends."""
    parts = []
    for curve in curves:
        first, last = curve.points[0], curve.points[-1]
        name = f"{found[curve.column].column.title}{', ' + curve.group if curve.group else ''}"
        ends = [f"{number(p.y, unit, 1)} {unit} at {x} {p.x:g}" for p in dict.fromkeys((first, last))]
        parts.append(f"{name}: {' and '.join(ends)}")
    return "; ".join(parts) + "."


def _throughput(found: Sequence[Configuration]) -> Plot:
    def point(result: BenchResult) -> Point | None:
        closed = result.workload.concurrency is not None and result.workload.request_rate is None
        if not closed or not _has(result, "tps", "value"):
            return None
        return _point(float(result.workload.concurrency or 0), result.metrics["tps"], "value")

    curves = _curves(found, lambda w: w.lengths, point)
    return Plot(
        key="throughput",
        title="Throughput by concurrency",
        caption="Output tokens per second of the whole system. Bars are the spread over repeats.",
        x_label="concurrent requests",
        y_label="TPS (tok/s)",
        style="lines",
        summary=_summary(found, curves, "concurrency", "tok/s"),
        curves=curves,
    )


def _first_token(found: Sequence[Configuration]) -> Plot:
    loads = [result.workload for c in found for result in c.bench if result.workload.concurrency is not None]
    lightest = min((w.concurrency or 0 for w in loads), default=0)

    def point(result: BenchResult) -> Point | None:
        workload = result.workload
        alike = workload.shared_prefix_tokens
        if workload.concurrency != lightest or not workload.isl or alike or not _has(result, "ttft_ms", "p50"):
            return None
        return _point(float(workload.isl), result.metrics["ttft_ms"], "p50")

    curves = _curves(found, lambda w: f"OSL {w.osl}", point)
    return Plot(
        key="ttft",
        title="Time to first token by prompt length",
        caption=f"Median over requests at concurrency {lightest}. Bars are the spread over repeats.",
        x_label="prompt length, ISL (tokens)",
        y_label="TTFT p50 (ms)",
        style="lines",
        summary=_summary(found, curves, "ISL", "ms"),
        curves=curves,
    )


def _pareto(found: Sequence[Configuration]) -> Plot:
    def point(result: BenchResult) -> Point | None:
        if not _has(result, "tps", "value") or not _has(result, "tps_user", "p50"):
            return None
        speed = result.metrics["tps_user"].stats["p50"].value
        label = "" if result.workload.concurrency is None else str(result.workload.concurrency)
        return _point(speed, result.metrics["tps"], "value", label)

    by_load = [
        replace(curve, points=tuple(sorted(curve.points, key=lambda p: (len(p.label), p.label))))
        for curve in _curves(found, lambda w: w.lengths, point)
    ]
    curves = tuple(by_load)
    return Plot(
        key="pareto",
        title="Throughput against speed per user",
        caption="Up and to the right is better. The number at a point is the concurrency.",
        x_label="TPS/user, median (tok/s)",
        y_label="TPS (tok/s)",
        style="pareto",
        summary=_summary(found, curves, "TPS/user", "tok/s"),
        curves=curves,
    )


def _memory(found: Sequence[Configuration]) -> Plot:
    stacks, words = [], []
    for index, configuration in enumerate(found):
        result = largest(configuration)
        if result is None:
            continue
        memory = result.memory
        parts = [("weights", memory.weight_bytes), ("KV pool", memory.kv_pool_bytes), ("other", memory.other_bytes)]
        known = tuple((name, size / MIB) for name, size in parts if size is not None and size >= 0)
        stacks.append(Stack(column=index, parts=known))
        words.append(
            f"{configuration.column.title}: " + ", ".join(f"{name} {number(v * MIB, 'B', 2)}" for name, v in known)
        )
    return Plot(
        key="memory",
        title="Peak memory by part",
        caption="From the valid cell with the highest peak. The KV pool is what is reserved, not what is used.",
        x_label="",
        y_label="MiB",
        style="stacks",
        summary="; ".join(words) + ".",
        stacks=tuple(stacks),
    )


def _ttft(sample: RequestSample) -> int | None:
    return None if sample.first_token_ns is None else sample.first_token_ns - sample.submit_ns


def _e2e(sample: RequestSample) -> int | None:
    return None if sample.last_token_ns is None else sample.last_token_ns - sample.submit_ns


def _cdf(found: Sequence[Configuration], key: str, title: str, x_label: str, latency: Latency) -> Plot:
    load = headline_load(found)
    curves = []
    for index, configuration in enumerate(found):
        result = None if load is None else result_for(configuration, load[0])
        if result is not None and result.valid:
            points = _distribution(result, latency)
            curves += [Curve(column=index, group="", points=points)] if points else []
    medians = [
        f"{found[c.column].column.title}: half within {min(p.x for p in c.points if p.y >= 0.5):,.1f} ms, "
        f"all within {c.points[-1].x:,.1f} ms"
        for c in curves
    ]
    return Plot(
        key=key,
        title=title,
        caption=f"Raw samples of all repeats, {load[1] if load else ''}. Left is better.",
        x_label=x_label,
        y_label="share of requests",
        style="steps",
        summary="; ".join(medians) + ".",
        curves=tuple(curves),
    )


def _distribution(result: BenchResult, latency: Latency) -> tuple[Point, ...]:
    found = (latency(sample) for repeat in result.repeats for sample in repeat.samples)
    times = sorted(time for time in found if time is not None)
    step = max(1, -(-len(times) // MAX_CDF_POINTS))
    picked = sorted({*range(0, len(times), step), len(times) - 1}) if times else []
    return tuple(Point(x=times[i] / NS_PER_MS, y=(i + 1) / len(times)) for i in picked)


def _cost(found: Sequence[Configuration], cost: Section) -> Plot:
    curves = tuple(
        Curve(column=index, group=row.condition.partition(", ")[2], points=(_bar(index, row),))
        for row in cost.rows
        for index in range(len(found))
        if row.cells[index].status == OK and row.cells[index].value is not None
    )
    words = [
        f"{found[c.column].column.title}, {c.group}: {number(c.points[0].y, 'USD', 3)} per 1M tokens" for c in curves
    ]
    return Plot(
        key="cost",
        title="Cost per 1M output tokens",
        caption="At full load, at the fastest valid concurrency. Prices and arithmetic are under Assumptions.",
        x_label="",
        y_label="USD per 1M tokens",
        style="bars",
        summary="; ".join(words) + ".",
        curves=curves,
    )


def _bar(index: int, row: Row) -> Point:
    cell = row.cells[index]
    return Point(x=float(index), y=cell.value or 0.0, low=cell.low, high=cell.high)
