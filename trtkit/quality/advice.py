"""The arithmetic of the written read: what traffic costs now, what each measured or planned lever would save, at what risk.

A lever's cost is that of the machines its own throughput needs for the traffic, at the share of the month they can be
kept busy. Its quality verdict is the paired one; a lever without one is never called ready.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from trtkit.plan.cost import monthly_capacity, rented
from trtkit.plan.prices import PriceBook
from trtkit.quality.compare import QualityComparison, compare_quality, condition_of
from trtkit.quality.paired import Verdict
from trtkit.quality.sides import Side, pair_quality, why_invalid
from trtkit.spec.errors import MeasurementError, UsageError
from trtkit.spec.kv import KVFidelity
from trtkit.spec.measured import Source
from trtkit.spec.plan import BuildPlan
from trtkit.spec.result import BenchResult
from trtkit.spec.units import MILLION, format_count

DEFAULT_BUSY = 0.5
"""Share of a month that serving machines do useful work, where nobody has measured it: assumed."""
DAYS_PER_MONTH = 365 / 12
SMALL_TRAFFIC_TOKENS_DAY = MILLION
SMALL_MODEL_PARAMS = 8.5e9


class Readiness(str, Enum):
    """What to do with a lever."""

    SHIP = "ship behind the gate"
    MEASURE = "measure first"
    REJECT = "do not ship"
    NO_SAVING = "saves nothing"


@dataclass(frozen=True, kw_only=True, slots=True)
class Situation:
    """What a team has: output tokens a month, its bill if known, and how busy it can keep its machines."""

    tokens_month: float
    spend_usd_month: float | None = None
    busy: float = DEFAULT_BUSY

    def __post_init__(self) -> None:
        if self.tokens_month <= 0:
            raise UsageError(f"traffic is {self.tokens_month:g} tokens a month, must be above 0")
        if self.spend_usd_month is not None and self.spend_usd_month <= 0:
            raise UsageError(f"spend is {self.spend_usd_month:g} USD a month, must be above 0")
        if not 0 < self.busy <= 1:
            raise UsageError(f"the busy share is {self.busy:g}, must be above 0 and at most 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """One configuration serving the traffic; `arithmetic` is one line."""

    name: str
    tok_s: float
    source: Source
    machines: int
    usd_month: float
    condition: str
    arithmetic: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Lever:
    """One change against the baseline. `friction` counts what must be touched, `steps` say it."""

    running: Running
    changes: tuple[str, ...]
    friction: int
    saving_usd_month: float
    quality: tuple[QualityComparison, ...]
    readiness: Readiness
    reason: str

    @property
    def friction_word(self) -> str:
        """Low, medium or high."""
        return "low" if self.friction <= 2 else "medium" if self.friction <= 4 else "high"


@dataclass(frozen=True, kw_only=True, slots=True)
class Advice:
    """The whole read: levers ranked, warnings that say when not to."""

    situation: Situation
    baseline: Running
    levers: tuple[Lever, ...]
    cautions: tuple[str, ...]
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedLever:
    """A configuration nobody has measured: a forecast throughput on `num_gpus` of `gpu`. `friction` is 1 to 6."""

    name: str
    gpu: str
    num_gpus: int
    tok_s: float
    change: str
    friction: int = 3

    def __post_init__(self) -> None:
        if self.num_gpus < 1 or self.tok_s <= 0 or not 1 <= self.friction <= 6:
            raise UsageError(f"planned lever {self.name!r}: num_gpus and tok_s must be positive, friction from 1 to 6")


def advise(
    situation: Situation, sides: Sequence[Side], prices: PriceBook, planned: Sequence[PlannedLever] = ()
) -> Advice:
    """Rank every further side and every planned lever against the first side, which is what runs today.

    Raises:
        UsageError: nothing to compare with what runs today.
        MeasurementError: the baseline has no valid throughput or no price.
    """
    if not sides or len(sides) + len(planned) < 2:
        raise UsageError("the read needs what runs today and at least one other configuration")
    baseline = _running(sides[0], situation, prices)
    levers, missing = [], []
    for side in sides[1:]:
        try:
            levers.append(_lever(sides[0], side, baseline, situation, prices))
        except MeasurementError as error:
            missing.append(str(error))
    for lever in planned:
        try:
            levers.append(_planned(lever, baseline, situation, prices))
        except MeasurementError as error:
            missing.append(str(error))
    order = list(Readiness)
    levers.sort(key=lambda v: (order.index(v.readiness), -v.saving_usd_month / v.friction))
    cautions = _cautions(situation, sides[0].engine.plan, baseline, levers)
    return Advice(
        situation=situation, baseline=baseline, levers=tuple(levers), cautions=tuple(cautions), missing=tuple(missing)
    )


def _running(side: Side, situation: Situation, prices: PriceBook) -> Running:
    record = _fastest(side)
    metric = record.metrics["tps"]
    rate = (metric.stats["value"].value, metric.source)
    plan = record.engine.plan
    where = (plan.gpu, plan.parallel.world_size)
    return _priced(side.name, rate, where, condition_of(record.workload), (situation, prices))


def _priced(
    name: str, rate: tuple[float, Source], where: tuple[str, int], condition: str, given: tuple[Situation, PriceBook]
) -> Running:
    """The machines that a throughput needs for the traffic, and what they cost."""
    (tok_s, source), (gpu, num_gpus), (situation, prices) = rate, where, given
    price = prices.find(gpu)
    if price is None:
        raise MeasurementError(f"{name}: no price for {gpu}; give one with --prices")
    machine = rented(price, num_gpus)
    served = monthly_capacity(tok_s) * situation.busy
    count = max(1, math.ceil(situation.tokens_month / served))
    usd = count * machine.usd_per_month
    arithmetic = (
        f"{tok_s:,.4g} tok/s x a month x {situation.busy:.0%} busy = {served / MILLION:,.4g}M tokens per machine; "
        f"{count} needed x {machine.usd_per_month:,.0f} USD = {usd:,.0f} USD/month ({machine.note})"
    )
    return Running(
        name=name,
        tok_s=tok_s,
        source=source,
        machines=count,
        usd_month=usd,
        condition=condition,
        arithmetic=arithmetic,
    )


def _planned(lever: PlannedLever, baseline: Running, situation: Situation, prices: PriceBook) -> Lever:
    rate, where = (lever.tok_s, Source.MODELED), (lever.gpu, lever.num_gpus)
    running = _priced(lever.name, rate, where, "planned", (situation, prices))
    saving = baseline.usd_month - running.usd_month
    return Lever(
        running=running,
        changes=(lever.change,),
        friction=lever.friction,
        saving_usd_month=saving,
        quality=(),
        readiness=Readiness.MEASURE if saving > 0 else Readiness.NO_SAVING,
        reason="planned only: neither speed nor quality was measured",
    )


def _fastest(side: Side) -> BenchResult:
    """The valid benchmark with the highest throughput."""
    valid = [r for r in side.bench if r.valid and "tps" in r.metrics and "value" in r.metrics["tps"].stats]
    if not valid:
        reasons = "; ".join(why_invalid(r) for r in side.bench if not r.valid) or "run `trtkit bench`"
        raise MeasurementError(f"{side.name}: no valid throughput was measured ({reasons})")
    return max(valid, key=lambda record: record.metrics["tps"].stats["value"].value)


def _lever(base: Side, side: Side, baseline: Running, situation: Situation, prices: PriceBook) -> Lever:
    running = _running(side, situation, prices)
    changes, friction = _changes(base.engine.plan, side.engine.plan, side.engine.fidelity)
    quality = tuple(compare_quality(p) for p in pair_quality(base, side) if p.candidate.better != "neither")
    saving = baseline.usd_month - running.usd_month
    readiness, reason = _readiness(saving, quality)
    return Lever(
        running=running,
        changes=changes,
        friction=friction,
        saving_usd_month=saving,
        quality=quality,
        readiness=readiness,
        reason=reason,
    )


def _changes(a: BuildPlan, b: BuildPlan, fidelity: KVFidelity) -> tuple[tuple[str, ...], int]:
    """What a team must touch, and how much work each is: 1 a setting, 2 a rebuilt engine, 3 other hardware."""
    found: list[tuple[str, int]] = []
    if a.quant != b.quant:
        found.append(
            (f"precision {a.quant.precision} -> {b.quant.precision}: new engine, your own eval before shipping", 2)
        )
    if a.kv != b.kv:
        extra = 0 if fidelity is KVFidelity.EXACT else 2
        note = "" if extra == 0 else f", carried out as {fidelity.value}"
        found.append((f"KV cache {a.kv.label} -> {b.kv.label}{note}: long prompts need their own eval", 2 + extra))
    if (a.gpu, a.parallel) != (b.gpu, b.parallel):
        ours, theirs = (f"{p.parallel.world_size} x {p.gpu}" for p in (a, b))
        found.append((f"hardware {ours} -> {theirs}: procurement and capacity", 3))
    if a.limits != b.limits:
        found.append(("batching limits: settings of the same engine", 1))
    if a.target != b.target:
        found.append((f"runtime {a.target} -> {b.target}: new serving stack", 3))
    if not found:
        return ("nothing in the plan; the same configuration measured again",), 1
    return tuple(text for text, _ in found), sum(points for _, points in found)


def _readiness(saving: float, quality: Sequence[QualityComparison]) -> tuple[Readiness, str]:
    """A lever is ready when quality was measured and none of it got worse or stayed open."""
    verdicts = [(q, Verdict.UNDECIDED if q.paired is None else q.paired.verdict) for q in quality]
    worse = [
        q for q, v in verdicts if v is Verdict.WORSE and q.paired is not None and -q.paired.difference > q.paired.margin
    ]
    if worse:
        return Readiness.REJECT, f"{worse[0].task}/{worse[0].metric} is worse by more than its margin"
    if saving <= 0:
        return Readiness.NO_SAVING, "needs as many machines for this traffic"
    if not verdicts:
        return Readiness.MEASURE, "no quality was measured on both; run `trtkit eval`"
    still = [q for q, v in verdicts if v is Verdict.UNDECIDED]
    if still:
        needed = (
            max((q.paired.needed or 0) for q in still if q.paired is not None) if any(q.paired for q in still) else 0
        )
        more = f"; about {needed} documents would decide" if needed else ""
        return Readiness.MEASURE, f"{still[0].task}/{still[0].metric} is undecided{more}"
    return Readiness.SHIP, f"none of {len(verdicts)} paired metrics is worse by more than its margin"


def _cautions(situation: Situation, plan: BuildPlan, baseline: Running, levers: Sequence[Lever]) -> list[str]:
    """When not to, from what is known."""
    cautions = []
    per_day = situation.tokens_month / DAYS_PER_MONTH
    if per_day < SMALL_TRAFFIC_TOKENS_DAY:
        cautions.append(
            f"traffic is {per_day / MILLION:.2f}M tokens a day; below 1M an API or one small GPU is cheaper to own"
        )
    if plan.model.num_params < SMALL_MODEL_PARAMS:
        cautions.append(
            f"{plan.model.name} has {format_count(plan.model.num_params)} parameters; up to about 8B, tune batching before "
            "touching weights or cache"
        )
    if baseline.machines == 1 and all(lever.running.machines == 1 for lever in levers):
        cautions.append("one machine carries the traffic already; speed saves money only if a cheaper machine will do")
    if situation.spend_usd_month is not None and situation.spend_usd_month > 1.5 * baseline.usd_month:
        cautions.append(
            f"the bill ({situation.spend_usd_month:,.0f} USD) is {situation.spend_usd_month / baseline.usd_month:.1f} times "
            f"what this traffic needs ({baseline.usd_month:,.0f} USD): switch idle machines off first"
        )
    if any(lever.readiness is Readiness.REJECT for lever in levers):
        cautions.append("work where every answer counts: a measured loss is a reason to stop, not a price to pay")
    cautions.append("if the model is swapped every few weeks, each swap repeats the build and the eval")
    return cautions
