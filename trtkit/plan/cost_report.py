"""Answers of `trtkit cost`: the machine from the price book, the load from flags or records, every definition."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trtkit.plan.cost import BreakEven, CostLine, Load, Machine, break_even, estimate, owned, rented
from trtkit.plan.names import gpu_word
from trtkit.plan.prices import KINDS, PriceBook, load_prices
from trtkit.spec.catalog import gpu_spec
from trtkit.spec.codec import read_record
from trtkit.spec.errors import MeasurementError, UsageError
from trtkit.spec.measured import Measured, Source
from trtkit.spec.result import BENCH_KIND, BenchResult

_SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


@dataclass(frozen=True, kw_only=True, slots=True)
class CostQuestion:
    """Which machine at which price, and how busy."""

    gpu: str
    num_gpus: int = 1
    kind: str = "cloud"
    price_name: str | None = None
    usd_per_gpu_h: float | None = None
    utilisation: float | None = None
    tokens_per_month: str | None = None
    prices: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedLoad:
    """A load with where it comes from. A record names its own GPU and how many."""

    name: str
    load: Load
    gpu: str | None = None
    num_gpus: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CostReport:
    """One load's prices."""

    name: str
    machine: Machine
    lines: tuple[CostLine, ...]
    break_even: tuple[BreakEven, ...]


def parse_tokens(text: str) -> float:
    """Read `200M`, `200M/month`, `1.5B`, `30,000,000`: tokens per month (per day with `/day`).

    Raises:
        UsageError: not a count.
    """
    found = re.fullmatch(r"\s*([\d.,]+)\s*([kmbgt]?)\s*(?:tokens)?\s*(?:/\s*(month|mo|day|d))?\s*", text.lower())
    number = found.group(1).replace(",", "") if found else ""
    if found is None or not re.fullmatch(r"\d+(\.\d+)?|\.\d+", number) or float(number) <= 0:
        raise UsageError(f"tokens {text!r}: expected a count above 0 such as 200M/month or 7M/day")
    return float(number) * _SCALES[found.group(2)] * (365 / 12 if found.group(3) in ("day", "d") else 1)


def loads(
    records: Sequence[Path],
    tps: tuple[float | None, float | None, float | None],
    input_tps: float | None,
    slo_tps: float | None,
) -> list[NamedLoad]:
    """Loads from flags, or one per record.

    Raises:
        UsageError: neither or both are given, or a rate is not positive.
        MeasurementError: a record has no valid throughput.
    """
    value, low, high = tps
    if (value is None) == (not records):
        raise UsageError("give benchmark records, or a throughput with --tps")
    if records:
        return [_from_record(path) for path in records]
    for name, number in (("tps", value), ("tps-low", low), ("tps-high", high), ("input-tps", input_tps)):
        if number is not None and number <= 0:
            raise UsageError(f"--{name} is {number:g}, must be above 0")
    assert value is not None
    if (low is not None and low > value) or (high is not None and high < value):
        raise UsageError(f"--tps {value:g} lies outside its interval")
    load = Load(
        output_tok_s=_rate(value, low, high),
        input_tok_s=None if input_tps is None else _rate(input_tps),
        at_slo_tok_s=None if slo_tps is None else _rate(slo_tps),
    )
    return [NamedLoad(name=f"{value:g} tok/s", load=load)]


def _rate(value: float, low: float | None = None, high: float | None = None) -> Measured:
    return Measured(value=value, unit="tok/s", source=Source.ASSUMED, low=low, high=high, note="given by hand")


def _from_record(path: Path) -> NamedLoad:
    result = read_record(path, BENCH_KIND, BenchResult)
    metric = result.metrics.get("tps")
    if metric is None or not result.valid:
        failed = "; ".join(check.detail for check in result.checks if check.status == "fail")
        raise MeasurementError(f"{path}: no valid throughput to price ({failed or 'no tps in it'})")
    stat = metric.stats["value"]
    rate = Measured(value=stat.value, unit="tok/s", source=metric.source, low=stat.low, high=stat.high)
    total = result.metrics.get("total_tps")
    prompt = None
    if total is not None:
        share = Measured(value=total.stats["value"].value - stat.value, unit="tok/s", source=total.source)
        prompt = share if share.value > 0 else None
    load = result.workload
    name = f"{result.engine.name} {load.isl}/{load.osl} at {load.concurrency or load.request_rate}"
    plan = result.engine.plan
    return NamedLoad(
        name=name,
        load=Load(output_tok_s=rate, input_tok_s=prompt),
        gpu=plan.gpu,
        num_gpus=1 if plan.target == "embedded" else plan.parallel.world_size,
    )


def machine_of(question: CostQuestion, book: PriceBook, gpu: str, num_gpus: int) -> Machine:
    """The machine at its price.

    Raises:
        UsageError: no such kind, GPU or price.
    """
    if question.kind not in KINDS:
        raise UsageError(f"--kind {question.kind!r}: allowed are {', '.join(KINDS)}")
    spec = gpu_spec(gpu_word(gpu))
    if question.usd_per_gpu_h is not None:
        if question.usd_per_gpu_h <= 0:
            raise UsageError(f"--usd-per-gpu-h is {question.usd_per_gpu_h:g}, must be above 0")
        note = f"{num_gpus} x {question.usd_per_gpu_h:g} USD/h (given by hand)"
        hourly = question.usd_per_gpu_h * num_gpus
        return Machine(gpu=spec.name, num_gpus=num_gpus, usd_per_hour=hourly, source=Source.ASSUMED, note=note)
    if question.kind == "onprem":
        if spec.tdp_w is None:
            raise UsageError(f"{spec.name} has no power figure on record, so it cannot be priced on-prem")
        return owned(spec.name, num_gpus, book.onprem, spec.tdp_w)
    return rented(book.gpu_price(spec.name, kind=question.kind, name=question.price_name), num_gpus)


def answer_cost(question: CostQuestion, named: Sequence[NamedLoad]) -> list[CostReport]:
    """Price each load."""
    book = load_prices(question.prices)
    tokens = None if question.tokens_per_month is None else parse_tokens(question.tokens_per_month)
    reports = []
    for each in named:
        machine = machine_of(question, book, each.gpu or question.gpu, each.num_gpus or question.num_gpus)
        lines = estimate(machine, each.load, utilisation=question.utilisation, tokens_per_month=tokens)
        apis = [(api.name, api.usd_per_million) for api in book.api]
        against = break_even(machine, each.load.output_tok_s, apis)
        reports.append(CostReport(name=each.name, machine=machine, lines=lines, break_even=against))
    return reports


def cost_text(reports: Sequence[CostReport]) -> str:
    """Prices as text, with their arithmetic."""
    blocks = []
    for report in reports:
        lines = [f"{report.name} on {report.machine.note}"]
        for line in report.lines:
            spread = f" [{line.cost.low:.3f}-{line.cost.high:.3f}]" if line.cost.low and line.cost.high else ""
            lines.append(
                f"  {line.cost.value:10.3f}{spread} USD per 1M {line.tokens} tokens, {line.definition} "
                f"({line.cost.source.value}): {line.arithmetic}"
            )
        lines += [
            f"  against {b.api} at {b.api_usd_per_million:g} USD per 1M: {b.arithmetic}" for b in report.break_even
        ]
        blocks.append("\n".join(lines))
    return "\n".join(blocks)
