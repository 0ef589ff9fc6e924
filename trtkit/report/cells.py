"""From a record to one cell: the number, its spread, its share of the limit, or the reason why there is none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from trtkit.report.model import INVALID, MISSING, OK, Cell, Row
from trtkit.spec.measured import Measured
from trtkit.spec.metrics import HIGHER, LOWER, METRICS, MIN_SAMPLES
from trtkit.spec.result import BenchResult, MetricResult, QualityResult, Stat
from trtkit.spec.workload import Workload

NOT_MEASURED = "not measured"


@dataclass(slots=True)
class Notes:
    """Numbered remarks under the tables; the same text gets the same number."""

    texts: list[str] = field(default_factory=list)

    def number(self, text: str) -> int:
        """The note's number, counted from 1."""
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


def missing(reason: str, notes: Notes | None = None) -> Cell:
    """No number, and why."""
    return Cell(status=MISSING, reason=reason, note=None if notes is None else notes.number(reason))


def failure_reason(result: BenchResult | QualityResult) -> str:
    """The failed checks of an invalid record in one line."""
    failed = [f"{check.name}: {check.detail}" for check in result.checks if check.status == "fail"]
    return "; ".join(failed) or "marked invalid by the run that made it, without a reason"


def condition(workload: Workload) -> str:
    """The load as a label: how many requests at once or per second, and how long they are."""
    if workload.request_rate is None:
        load = f"concurrency {workload.concurrency}"
    else:
        cap = "" if workload.concurrency is None else f", at most {workload.concurrency} in flight"
        load = f"{workload.request_rate:g} requests/s{cap}"
    data = "" if workload.dataset == "synthetic" else f", {workload.dataset.rsplit('/', 1)[-1]}"
    return f"{load}, {workload.lengths}{data}"


def metric_cell(result: BenchResult | None, key: str, stat: str, notes: Notes) -> Cell:
    """One statistic of one metric of one record; `stat` is "value" for a metric that is one number."""
    definition = METRICS[key]
    if result is None:
        return missing(NOT_MEASURED)
    if not result.valid:
        return _invalid(result, f"{condition(result.workload)}: {failure_reason(result)}", notes)
    metric = result.metrics.get(key)
    if metric is None or not metric.stats:
        return missing(f"the run recorded no {definition.label}", notes)
    if stat not in metric.stats:
        return missing(_absent(metric, definition.label, stat), notes)
    cell = stat_cell(metric.stats[stat], metric)
    # A share belongs to the median of a distribution, or to the one number.
    return replace(cell, share=result.shares.get(key)) if stat in ("value", "p50") else cell


def _absent(metric: MetricResult, label: str, stat: str) -> str:
    needed = MIN_SAMPLES.get(stat)
    if needed is not None and metric.samples < needed:
        return f"{label} {stat} needs {needed} samples, this run has {metric.samples}"
    return f"the run recorded no {label} {stat}"


def _invalid(result: BenchResult | QualityResult, reason: str, notes: Notes) -> Cell:
    text = f"{result.engine.name}, {reason}"
    return Cell(status=INVALID, reason=reason, note=notes.number(text))


def stat_cell(stat: Stat, metric: MetricResult) -> Cell:
    """A statistic with its interval over repeats, or with the range of too few repeats for an interval."""
    low, high, spread = stat.low, stat.high, f"95 % interval of {len(stat.repeats)} repeats"
    if low is None or high is None:
        low, high, spread = _range(stat.repeats)
    return Cell(
        status=OK,
        value=stat.value,
        unit=metric.unit,
        low=low,
        high=high,
        spread=spread,
        source=metric.source,
        samples=metric.samples,
    )


def _range(repeats: Sequence[float]) -> tuple[float | None, float | None, str]:
    if len(repeats) < 2:
        return None, None, "1 repeat, no spread"
    return min(repeats), max(repeats), f"min-max of {len(repeats)} repeats"


def measured_cell(measured: Measured, *, spread: str = "") -> Cell:
    """A cell from a `Measured`."""
    return Cell(
        status=OK,
        value=measured.value,
        unit=measured.unit,
        low=measured.low,
        high=measured.high,
        spread=spread if measured.low is not None else "",
        source=measured.source,
    )


def against_first(row: Row) -> Row:
    """Fill `ratio` and `distinct` of every column against the first, where both have a number without reservation."""
    base = row.cells[0] if row.cells else None
    if base is None or not _comparable(base) or not base.value:
        return row
    return replace(row, cells=(base, *(_against(cell, base) for cell in row.cells[1:])))


def _comparable(cell: Cell) -> bool:
    """A number that no note restricts."""
    return cell.status == OK and cell.value is not None and cell.note is None


def _against(cell: Cell, base: Cell) -> Cell:
    if not _comparable(cell) or cell.value is None or not base.value:
        return cell
    ratio = cell.value / base.value
    return replace(cell, ratio=ratio if math.isfinite(ratio) else None, distinct=_apart(cell, base))


def _apart(a: Cell, b: Cell) -> bool | None:
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return None
    return a.low > b.high or a.high < b.low


def best_of(row: Row) -> int | None:
    """Index of the column with the best number, None where no two columns have one."""
    found = [(cell.value or 0.0, i) for i, cell in enumerate(row.cells) if _comparable(cell)]
    if len(found) < 2 or row.better not in (HIGHER, LOWER):
        return None
    return (min(found) if row.better == LOWER else max(found))[1]


def restricted(cell: Cell, reason: str, notes: Notes) -> Cell:
    """The same number with a reservation: it is printed, and compared with nothing."""
    return replace(cell, reason=reason, note=notes.number(reason))
