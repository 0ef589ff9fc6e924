"""What tokens cost: every formula in one place, each with its arithmetic in words.

A definition is always named, because the same machine has several honest prices per million tokens:

- full load: the hour's price over the tokens of an hour at this throughput;
- measured utilisation: the same, over the share of the hour that does work;
- bought month: the month's price over the tokens really served that month;
- at SLO: full load at the throughput that still keeps the latency limits.

Each charges the whole machine to the tokens it names, so the prices per input and per output token are never added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trtkit.plan.prices import GpuPrice, OnPrem
from trtkit.spec.errors import UsageError
from trtkit.spec.measured import Measured, Source, weakest
from trtkit.spec.units import HOURS_PER_MONTH, MILLION, SECONDS_PER_HOUR

COST_UNIT = "USD/1M tokens"
DEFAULT_BLEND_RATIO = 4.0
"""An output token counted as this many input tokens in the blended price (the GKE recommender's default)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """GPUs and what one hour of all of them costs."""

    gpu: str
    num_gpus: int
    usd_per_hour: float
    source: Source
    note: str

    @property
    def usd_per_month(self) -> float:
        """Price of a month of 730 hours, busy or idle."""
        return self.usd_per_hour * HOURS_PER_MONTH


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """Tokens per second the machine serves. None where unknown; `at_slo` is the output rate that keeps the limits."""

    output_tok_s: Measured
    input_tok_s: Measured | None = None
    at_slo_tok_s: Measured | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CostLine:
    """One price: which definition, which tokens it counts, and how it came about."""

    definition: str
    tokens: str
    cost: Measured
    arithmetic: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BreakEven:
    """Monthly tokens above which this machine is cheaper than an API, None when it never is at this throughput."""

    api: str
    api_usd_per_million: float
    million_tokens_month: float | None
    share_of_capacity: float
    arithmetic: str


def cost_per_million(tok_s: float, usd_per_gpu_hour: float, num_gpus: int = 1, *, utilisation: float = 1.0) -> float:
    """USD per million tokens at `tok_s` tokens per second over all GPUs, busy `utilisation` of the time.

    Raises:
        UsageError: a rate, price or count that is not positive, or a utilisation outside (0, 1].
    """
    if tok_s <= 0 or usd_per_gpu_hour <= 0 or num_gpus < 1:
        raise UsageError(
            f"cost of {tok_s} tok/s at {usd_per_gpu_hour} USD/h x {num_gpus} GPUs: all three must be above 0"
        )
    if not 0 < utilisation <= 1:
        raise UsageError(f"utilisation is {utilisation}, must be above 0 and at most 1")
    return usd_per_gpu_hour * num_gpus / (tok_s * SECONDS_PER_HOUR * utilisation) * MILLION


def cost_of(rate: Measured, usd_per_hour: float, *, utilisation: float = 1.0) -> Measured:
    """The same as `Measured`: the interval of the throughput, turned over, becomes the interval of the cost."""
    low = cost_per_million(rate.high, usd_per_hour, utilisation=utilisation) if rate.high else None
    high = cost_per_million(rate.low, usd_per_hour, utilisation=utilisation) if rate.low else None
    return Measured(
        value=cost_per_million(rate.value, usd_per_hour, utilisation=utilisation),
        unit=COST_UNIT,
        source=rate.source,
        low=low,
        high=high,
    )


def rented(price: GpuPrice, num_gpus: int) -> Machine:
    """A machine paid by the hour."""
    return Machine(
        gpu=price.gpu,
        num_gpus=num_gpus,
        usd_per_hour=price.usd_per_gpu_h * num_gpus,
        source=Source.ASSUMED if price.source.startswith("assumed") else Source.DATASHEET,
        note=f"{num_gpus} x {price.usd_per_gpu_h:g} USD/h ({price.kind}, {price.source}, {price.date})",
    )


def owned(gpu: str, num_gpus: int, onprem: OnPrem, tdp_w: float) -> Machine:
    """A machine one owns: purchase spread over its life, power at the board's limit, upkeep; by the hour."""
    capex_month = onprem.capex_usd / onprem.amortise_months
    power_month = tdp_w / 1000 * onprem.power_overhead * onprem.usd_per_kwh * HOURS_PER_MONTH
    month = capex_month + power_month + onprem.maintenance_usd_month
    note = (
        f"{num_gpus} x ({onprem.capex_usd:,.0f}/{onprem.amortise_months} capex + {tdp_w / 1000:g} kW x "
        f"{onprem.power_overhead:g} x {onprem.usd_per_kwh:g} USD/kWh x {HOURS_PER_MONTH} h + "
        f"{onprem.maintenance_usd_month:g} upkeep) = {month * num_gpus:,.0f} USD/month ({onprem.source}, {onprem.date})"
    )
    return Machine(
        gpu=gpu,
        num_gpus=num_gpus,
        usd_per_hour=month * num_gpus / HOURS_PER_MONTH,
        source=Source.ASSUMED,
        note=note,
    )


def estimate(
    machine: Machine,
    load: Load,
    *,
    utilisation: float | None = None,
    tokens_per_month: float | None = None,
    blend_ratio: float = DEFAULT_BLEND_RATIO,
) -> tuple[CostLine, ...]:
    """Every definition that the given numbers allow, the plain one (per output token at full load) first.

    `tokens_per_month` counts output tokens. An impossible month (more tokens than the machine can make) is refused.
    """
    lines = [_line("full load", "output", machine, load.output_tok_s)]
    if load.input_tok_s is not None:
        lines += _input_lines(machine, load.output_tok_s, load.input_tok_s, blend_ratio)
    if utilisation is not None:
        lines.append(_line("measured utilisation", "output", machine, load.output_tok_s, utilisation))
    if load.at_slo_tok_s is not None:
        lines.append(_line("at SLO", "output", machine, load.at_slo_tok_s))
    if tokens_per_month is not None:
        lines.append(_month_line(machine, load.output_tok_s, tokens_per_month))
    return tuple(lines)


def _line(definition: str, tokens: str, machine: Machine, rate: Measured, utilisation: float = 1.0) -> CostLine:
    cost = cost_of(rate, machine.usd_per_hour, utilisation=utilisation)
    busy = "" if utilisation == 1 else f" x {utilisation:.0%} busy"
    arithmetic = (
        f"{machine.usd_per_hour:.4g} USD/h / ({rate.value:,.4g} {tokens} tok/s x 3600 s{busy}) x 1M = {cost.value:.3f}"
    )
    return CostLine(
        definition=definition,
        tokens=tokens,
        cost=_weaker(cost, machine.source),
        arithmetic=arithmetic,
    )


def _weaker(cost: Measured, source: Source) -> Measured:
    """A price is dated and sourced, so it does not weaken a measured rate unless it was assumed."""
    weaker = weakest(cost.source, source) if source is Source.ASSUMED else cost.source
    return Measured(value=cost.value, unit=cost.unit, source=weaker, low=cost.low, high=cost.high)


def _input_lines(machine: Machine, output: Measured, prompt: Measured, blend_ratio: float) -> list[CostLine]:
    total = _combine(output, prompt, 1.0)
    blended = _combine(output, prompt, blend_ratio)
    return [
        _line("full load", "input", machine, prompt),
        _line("full load", "input+output", machine, total),
        _line(f"blended (input / {blend_ratio:g})", "output-equivalent", machine, blended),
    ]


def _combine(output: Measured, prompt: Measured, ratio: float) -> Measured:
    low = output.low + prompt.low / ratio if output.low is not None and prompt.low is not None else None
    high = output.high + prompt.high / ratio if output.high is not None and prompt.high is not None else None
    return Measured(
        value=output.value + prompt.value / ratio,
        unit=output.unit,
        source=weakest(output.source, prompt.source),
        low=low,
        high=high,
    )


def _month_line(machine: Machine, rate: Measured, tokens_per_month: float) -> CostLine:
    if tokens_per_month <= 0:
        raise UsageError(f"tokens per month is {tokens_per_month:g}, must be above 0")
    busy = tokens_per_month / monthly_capacity(rate.value)
    if busy > 1:
        raise UsageError(
            f"{tokens_per_month / MILLION:,.0f}M tokens a month need {busy:.2f} of these machines at "
            f"{rate.value:,.4g} tok/s; lower the traffic or add GPUs"
        )
    value = machine.usd_per_month / tokens_per_month * MILLION
    arithmetic = (
        f"{machine.usd_per_hour:.4g} USD/h x {HOURS_PER_MONTH} h = {machine.usd_per_month:,.0f} USD / "
        f"{tokens_per_month / MILLION:,.4g}M tokens = {value:.3f} (the machine is busy {busy:.1%} of the month)"
    )
    # The price of a bought month does not depend on the throughput, so it carries no interval.
    cost = Measured(value=value, unit=COST_UNIT, source=machine.source)
    return CostLine(definition="bought month", tokens="output", cost=cost, arithmetic=arithmetic)


def monthly_capacity(tok_s: float) -> float:
    """Tokens of a month of 730 hours at this rate without a pause."""
    return tok_s * SECONDS_PER_HOUR * HOURS_PER_MONTH


def break_even(machine: Machine, rate: Measured, apis: Sequence[tuple[str, float]]) -> tuple[BreakEven, ...]:
    """For each API (name, USD per million): the monthly tokens from which the machine is the cheaper one."""
    capacity = monthly_capacity(rate.value)
    found = []
    for name, usd in apis:
        tokens = machine.usd_per_month / usd * MILLION
        share = tokens / capacity
        text = f"{machine.usd_per_month:,.0f} USD/month / {usd:g} USD per 1M = {tokens / MILLION:,.0f}M tokens a month"
        outcome = f", {share:.0%} of capacity" if share <= 1 else f", {share:.1f}x what the machine can make: never"
        found.append(
            BreakEven(
                api=name,
                api_usd_per_million=usd,
                million_tokens_month=tokens / MILLION if share <= 1 else None,
                share_of_capacity=share,
                arithmetic=text + outcome,
            )
        )
    return tuple(found)
