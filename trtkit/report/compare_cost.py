"""The price of each side of a comparison: dollars per million output tokens at full load, with the arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trtkit.plan.cost import COST_UNIT, Load, estimate, rented
from trtkit.plan.prices import PriceBook, load_prices
from trtkit.quality.compare import condition_of
from trtkit.quality.sides import Side
from trtkit.report.compare import Block
from trtkit.spec.codec import digest
from trtkit.spec.measured import Measured
from trtkit.spec.result import BenchResult

_SHOWN_DIGITS = ".3f"


def cost_blocks(sides: Sequence[Side], prices: Path | None) -> list[Block]:
    """One table over the workloads that every side ran; none where there is no such workload."""
    by_side = [{digest(record.workload): record for record in side.bench} for side in sides]
    shared = [key for key in by_side[0] if all(key in records for records in by_side)]
    if not shared:
        return []
    book = load_prices(prices)
    rows = [("condition", *(side.name for side in sides))]
    remarks: list[str] = []
    for key in shared:
        cells = [_cell(records[key], book, side.name, remarks) for records, side in zip(by_side, sides, strict=True)]
        rows.append((condition_of(by_side[0][key].workload), *cells))
    title = f"Cost, {COST_UNIT} of output at full load"
    return [Block(title=title, rows=tuple(rows), remarks=tuple(dict.fromkeys(remarks)))]


def _cell(record: BenchResult, book: PriceBook, name: str, remarks: list[str]) -> str:
    plan = record.engine.plan
    price, metric = book.find(plan.gpu), record.metrics.get("tps")
    stat = None if metric is None else metric.stats.get("value")
    if price is None:
        remarks.append(f"no price for {plan.gpu}; give one with --prices")
        return "n/a"
    if not record.valid or metric is None or stat is None or stat.value <= 0:
        return "n/a (no valid throughput)"
    low = stat.low if stat.low is not None and stat.low > 0 else None
    rate = Measured(value=stat.value, unit=metric.unit, source=metric.source, low=low, high=stat.high)
    line = estimate(rented(price, plan.parallel.world_size), Load(output_tok_s=rate))[0]
    remarks.append(f"{name}: {line.arithmetic} ({line.definition})")
    cost = line.cost
    spread = (
        "" if cost.low is None or cost.high is None else f" [{cost.low:{_SHOWN_DIGITS}}, {cost.high:{_SHOWN_DIGITS}}]"
    )
    return f"{cost.value:{_SHOWN_DIGITS}}{spread} ({cost.source.value})"
