"""One configuration answered in full: what it holds, what fits, and floor and forecast at each load, with its price."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from trtkit.plan.cost import cost_of
from trtkit.plan.forecast import Forecast, answers
from trtkit.plan.memory import MemoryPlan, Placement, memory_lines, plan_memory, what_would_fit
from trtkit.plan.names import Precision
from trtkit.plan.prices import PriceBook
from trtkit.plan.roofline import Floors
from trtkit.plan.scenario import Scenario
from trtkit.spec.measured import Measured
from trtkit.spec.units import MS_PER_S

_MOST_IN_FLIGHT = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadPoint:
    """One load to answer: lengths in tokens, and requests in flight or arriving per second (neither: maximum load)."""

    isl: int
    osl: int
    concurrency: int | None = None
    request_rate: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadAnswer:
    """Floor and forecast at one load. `usd_per_million` is per output token at full load, None without a price."""

    load: LoadPoint
    floors: Floors
    forecast: Forecast | None
    usd_per_million: Measured | None
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanAnswer:
    """Everything about one configuration; `notes` say what its numbers leave out."""

    name: str
    memory: MemoryPlan
    would_fit: tuple[str, ...]
    loads: tuple[LoadAnswer, ...]
    notes: tuple[str, ...] = ()


def scenario_at(placement: Placement, precision: Precision, load: LoadPoint) -> Scenario:
    """A placement under one load. Eviction holds the cache between its budget and one interval more."""
    kept, slack = None, placement.policy.interval or placement.limits.tokens_per_block
    if not placement.policy.is_full:
        length = load.isl + load.osl
        kept = min(length, (placement.policy.resolved(length).budget or length) + slack // 2)
    return Scenario(
        model=placement.model,
        gpu=placement.gpu,
        precision=precision,
        isl=load.isl,
        osl=load.osl,
        concurrency=load.concurrency,
        tp=placement.parallel.tp,
        pp=placement.parallel.pp,
        kept_tokens=kept,
        evict_interval=slack,
    )


def ask(
    name: str, placement: Placement, precision: Precision, loads: Sequence[LoadPoint], book: PriceBook | None = None
) -> PlanAnswer:
    """Answer one configuration at several loads.

    Raises:
        UnsupportedError: the device has no unit for these operands.
    """
    longest = max(load.isl + load.osl for load in loads)
    memory = plan_memory(placement, sequence_tokens=longest)
    price = book.find(placement.gpu.name) if book else None
    hourly = price.usd_per_gpu_h * placement.parallel.world_size if price else None
    resolved = [_at_rate(placement, precision, load) for load in loads]
    found = answers([scenario_at(placement, precision, load) for load, _ in resolved])
    lines = []
    for asked, (_, problem), answer in zip(loads, resolved, found, strict=True):
        forecast = answer.forecast if memory.fits and not placement.is_embedded_on_gpu else None
        reason = problem or answer.reason or ("" if memory.fits else "does not fit")
        if placement.is_embedded_on_gpu and not reason:
            reason = "no forecast: nothing of the embedded engine was measured on a GPU yet"
        lines.append(
            LoadAnswer(
                load=asked,
                floors=answer.floors,
                forecast=None if problem else forecast,
                usd_per_million=cost_of(forecast.tok_s, hourly) if forecast and hourly and not problem else None,
                reason=reason,
            )
        )
    return PlanAnswer(
        name=name,
        memory=memory,
        would_fit=what_would_fit(placement, sequence_tokens=longest),
        loads=tuple(lines),
        notes=_left_out(placement),
    )


def _left_out(placement: Placement) -> tuple[str, ...]:
    """What makes a configuration faster and depends on the text, so that no floor or forecast here knows it."""
    notes = []
    if placement.speculation is not None:
        most = 1 + placement.speculation.max_draft_tokens
        notes.append(
            f"speculation {placement.speculation.label}: floors and forecasts are those without guesses; a step gives a "
            f"request up to {most} tokens, so TPOT and tok/s may be better than their floors by that factor"
        )
    if placement.limits.enable_block_reuse:
        notes.append("prefix reuse: floors and forecasts are those of prompts that share nothing")
    return tuple(notes)


def _at_rate(placement: Placement, precision: Precision, load: LoadPoint) -> tuple[LoadPoint, str]:
    """An arrival rate as the requests it keeps in flight (Little's law), and why it cannot be if the rate is too high."""
    if load.request_rate is None:
        return load, ""
    low, high = 1, _MOST_IN_FLIGHT
    if not _keeps_up(placement, precision, load, high):
        return replace(load, concurrency=1), f"{load.request_rate:g} requests/s are more than it can serve"
    while low < high:
        middle = (low + high) // 2
        if _keeps_up(placement, precision, load, middle):
            high = middle
        else:
            low = middle + 1
    return replace(load, concurrency=low), ""


def _keeps_up(placement: Placement, precision: Precision, load: LoadPoint, concurrency: int) -> bool:
    point = replace(load, concurrency=concurrency)
    forecast = answers([scenario_at(placement, precision, point)])[0].forecast
    if forecast is None or load.request_rate is None:
        return True
    return concurrency / forecast.e2e_ms.value * MS_PER_S >= load.request_rate


def plan_text(answer: PlanAnswer) -> str:
    """The answer as text: memory, then one line per load with the floor beside the forecast."""
    lines = [answer.name, *(f"  {line}" for line in memory_lines(answer.memory))]
    if answer.would_fit:
        lines.append(f"  would fit with {' or '.join(answer.would_fit)}")
    lines.append(
        f"  {'load':<22} {'TTFT ms: floor, forecast':<34} {'TPOT ms: floor, forecast':<32} "
        f"{'tok/s: ceiling, forecast':<34} USD per 1M output"
    )
    for line in answer.loads:
        limits, forecast = line.floors, line.forecast
        cells = [
            _pair(limits.ttft_ms, forecast.ttft_ms if forecast else None, 34),
            _pair(limits.tpot_ms, forecast.tpot_ms if forecast else None, 32),
            _pair(limits.tok_s, forecast.tok_s if forecast else None, 34),
        ]
        price = f"{line.usd_per_million.value:.3f}" if line.usd_per_million else "-"
        lines.append(f"  {load_title(line.load):<22} {' '.join(cells)} {price} {line.reason}".rstrip())
    lines += [f"  {line}" for line in answer.notes]
    lines.append(
        "  floor: datasheet, nothing beats it; forecast: modeled, [90% of left-out measurements lay in this band]"
    )
    return "\n".join(lines)


def load_title(load: LoadPoint) -> str:
    """`512/256 at 8`, `512/256 at 2/s`, `512/256 at max`."""
    at = f"{load.request_rate:g}/s" if load.request_rate is not None else str(load.concurrency or "max")
    return f"{load.isl}/{load.osl} at {at}"


def _pair(floor: Measured, forecast: Measured | None, width: int) -> str:
    if forecast is None:
        return f"{floor.value:,.4g}, -".ljust(width)
    band = f" [{forecast.low:,.4g}-{forecast.high:,.4g}]" if forecast.low is not None else ""
    return f"{floor.value:,.4g}, {forecast.value:,.4g}{band}".ljust(width)
