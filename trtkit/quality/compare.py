"""Two or more configurations side by side: performance with its noise floor, memory, cost, quality; each with a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, stdev

from trtkit.quality.paired import ALPHA, PairedResult, Verdict, compare_paired, decide, holm
from trtkit.quality.sides import BenchPair, QualityPair, Side, drift_of, pair_bench, pair_quality
from trtkit.quality.special import t_cdf, t_quantile
from trtkit.spec.errors import MeasurementError, UsageError
from trtkit.spec.measured import Source
from trtkit.spec.metrics import HIGHER, METRICS
from trtkit.spec.result import MetricResult, QualityResult
from trtkit.spec.workload import Workload

PERFORMANCE_MARGIN = 0.05
"""Smallest relative change of a speed that matters."""
QUALITY_MARGINS: Mapping[str, float] = {
    "fraction": 0.02,
    "nats": 0.02,
    "nats/token": 0.02,
    "bits/byte": 0.02,
    "ppl": 0.02,
}
"""Smallest change of a document's score that matters, by unit (documents of a perplexity are nats); other units use
RELATIVE_MARGIN of the reference's score."""
RELATIVE_MARGIN = 0.05
KL_MARGIN, KL_FLOOR_NATS = 0.5, 1e-4
SHOWN_STATS = ("value", "p50", "p99", "mean")


@dataclass(frozen=True, kw_only=True, slots=True)
class RatioResult:
    """Candidate over reference for one number: its 95 % interval (None below two repeats each) and the verdict.

    `noise` is the larger coefficient of variation of the two, over repeats; None when it could not be measured.
    """

    metric: str
    stat: str
    condition: str
    unit: str
    source: Source
    reference: float
    candidate: float
    ratio: float | None
    low: float | None
    high: float | None
    noise: float | None
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupResult:
    """One subject of a task; `adjusted_p` is Holm's over the task's subjects."""

    group: str
    n: int
    difference: float
    adjusted_p: float
    verdict: Verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityComparison:
    """One task's metric: both scores, the paired result, and its subjects. `invalid` says why there is no verdict.

    Where `better` is "neither" (the length of answers), the result's "better" means more of it.
    """

    task: str
    metric: str
    unit: str
    better: str
    reference: float
    candidate: float
    paired: PairedResult | None
    groups: tuple[GroupResult, ...] = ()
    invalid: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One candidate against the reference."""

    reference: str
    candidate: str
    ratios: tuple[RatioResult, ...]
    quality: tuple[QualityComparison, ...]
    drift: tuple[QualityResult, ...] = ()
    remarks: tuple[str, ...] = ()


def compare_sides(sides: Sequence[Side]) -> tuple[Comparison, ...]:
    """Compare every further side with the first.

    Raises:
        UsageError: fewer than two sides, or two of them are the same record set.
        MeasurementError: the sides share no workload and no task, or their documents do not pair.
    """
    if len(sides) < 2:
        raise UsageError("compare needs at least two configurations")
    return tuple(_compare(sides[0], side) for side in sides[1:])


def _compare(reference: Side, candidate: Side) -> Comparison:
    bench, quality = pair_bench(reference, candidate), pair_quality(reference, candidate)
    drift = tuple(drift_of(candidate, reference))
    if not bench and not quality and not drift:
        raise MeasurementError(
            f"{reference.name} and {candidate.name} share no workload and no task; run `trtkit bench` and `trtkit eval` "
            "on both with the same options"
        )
    ratios = [ratio for pair in bench for ratio in compare_bench(pair)]
    return Comparison(
        reference=reference.name,
        candidate=candidate.name,
        ratios=tuple(ratios),
        quality=tuple(compare_quality(pair) for pair in quality),
        drift=drift,
        remarks=tuple(_remarks(reference, candidate, bench, quality)),
    )


def _remarks(reference: Side, candidate: Side, bench: Sequence[BenchPair], quality: Sequence[QualityPair]) -> list[str]:
    remarks = []
    for kind, paired, have in (
        ("workloads", len(bench), (len(reference.bench), len(candidate.bench))),
        ("task metrics", len(quality), (len(reference.quality), len(candidate.quality))),
    ):
        if paired < max(have):
            remarks.append(
                f"{paired} {kind} are on both sides ({have[0]} and {have[1]} recorded); the rest is left out"
            )
    machines = {r.environment.hostname_hash for r in (*reference.bench, *candidate.bench)}
    if len(machines) > 1:
        remarks.append("the benchmarks were run on different machines, which no interval here accounts for")
    return remarks


def condition_of(workload: Workload) -> str:
    """A workload in a few words."""
    load = f"concurrency {workload.concurrency}" if workload.concurrency is not None else ""
    rate = f"{workload.request_rate:g} requests/s" if workload.request_rate is not None else ""
    return f"{workload.lengths}, {', '.join(filter(None, (rate, load)))}"


def compare_bench(pair: BenchPair) -> list[RatioResult]:
    """Every metric both have, and the peak memory."""
    found = []
    for key, definition in METRICS.items():
        ours, theirs = pair.candidate.metrics.get(key), pair.reference.metrics.get(key)
        if ours is None or theirs is None:
            continue
        for stat in SHOWN_STATS:
            if stat in ours.stats and stat in theirs.stats:
                found.append(_ratio(pair, key, stat, (theirs, ours), definition.better == HIGHER))
    memory = _memory_ratio(pair)
    return [*found, memory] if memory is not None else found


def _ratio(
    pair: BenchPair, key: str, stat: str, metrics: tuple[MetricResult, MetricResult], higher_is_better: bool
) -> RatioResult:
    a, b = metrics[0].stats[stat], metrics[1].stats[stat]
    ratio, low, high, p_value = ratio_interval(a.repeats or (a.value,), b.repeats or (b.value,))
    noise = noise_floor(a.repeats, b.repeats)
    verdict, reason = Verdict.UNDECIDED, pair.invalid
    if reason:
        pass
    elif ratio is None or low is None or high is None or p_value is None:
        reason = "fewer than two repeats on a side: the noise is not known"
    else:
        sign = 1 if higher_is_better else -1
        change = (sign * (math.log(v)) for v in (ratio, low, high))
        centre, *ends = change
        verdict = decide(centre, min(ends), max(ends), p_value, math.log1p(PERFORMANCE_MARGIN))
        if verdict in (Verdict.BETTER, Verdict.WORSE) and noise is not None and abs(ratio - 1) < noise:
            verdict, reason = Verdict.SAME, f"within the noise floor of {noise:.1%}"
    return RatioResult(
        metric=key,
        stat=stat,
        condition=condition_of(pair.candidate.workload),
        unit=metrics[1].unit,
        source=metrics[1].source,
        reference=a.value,
        candidate=b.value,
        ratio=ratio,
        low=low,
        high=high,
        noise=noise,
        verdict=verdict,
        reason=reason,
    )


def ratio_interval(
    reference: Sequence[float], candidate: Sequence[float]
) -> tuple[float | None, float | None, float | None, float | None]:
    """Ratio of medians, Welch's 95 % interval on logarithms of the repeats, and its two-sided p-value.

    The ratio is None where a value is not positive, the interval below two repeats on a side.
    """
    if min((*reference, *candidate)) <= 0:
        return None, None, None, None
    ratio = median(candidate) / median(reference)
    if min(len(reference), len(candidate)) < 2:
        return ratio, None, None, None
    logs = [[math.log(v) for v in side] for side in (reference, candidate)]
    parts = [stdev(side) ** 2 / len(side) for side in logs]
    error = math.sqrt(sum(parts))
    centre = sum(logs[1]) / len(logs[1]) - sum(logs[0]) / len(logs[0])
    if error <= 1e-12:
        return ratio, ratio, ratio, 1.0 if abs(centre) <= 1e-12 else 0.0
    freedom = error**4 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, logs, strict=True))
    half = t_quantile(1 - ALPHA / 2, freedom) * error
    low, high = math.exp(centre - half), math.exp(centre + half)
    return ratio, min(low, ratio), max(high, ratio), 2 * t_cdf(-abs(centre / error), freedom)


def noise_floor(*sides: Sequence[float]) -> float | None:
    """The largest coefficient of variation over repeats, None where a side has fewer than two."""
    if not sides or any(len(side) < 2 or sum(side) == 0 for side in sides):
        return None
    return max(stdev(side) / abs(sum(side) / len(side)) for side in sides)


def _memory_ratio(pair: BenchPair) -> RatioResult | None:
    a, b = pair.reference.memory.peak_bytes, pair.candidate.memory.peak_bytes
    if not a or not b or pair.reference.memory.peak_method != pair.candidate.memory.peak_method:
        return None
    return RatioResult(
        metric="peak_memory",
        stat=pair.candidate.memory.peak_method,
        condition=condition_of(pair.candidate.workload),
        unit="bytes",
        source=Source.MEASURED,
        reference=float(a),
        candidate=float(b),
        ratio=b / a,
        low=None,
        high=None,
        noise=None,
        verdict=Verdict.UNDECIDED if pair.invalid else _memory_verdict(b / a),
        reason=pair.invalid,
    )


def _memory_verdict(ratio: float) -> Verdict:
    if abs(ratio - 1) <= PERFORMANCE_MARGIN:
        return Verdict.SAME
    return Verdict.BETTER if ratio < 1 else Verdict.WORSE


def margin_of(record: QualityResult) -> float:
    """The smallest change of this record's score that matters, in its unit.

    A KL divergence from a third engine is judged against the reference's own: honest rounding has some, damage more.
    """
    if record.metric == "kl":
        return max(KL_FLOOR_NATS, KL_MARGIN * abs(record.score))
    return QUALITY_MARGINS.get(record.unit) or max(1e-9, RELATIVE_MARGIN * abs(record.score))


def compare_quality(pair: QualityPair) -> QualityComparison:
    """The paired result over all documents, and over each subject with Holm's correction."""
    paired = None if pair.invalid else paired_result(pair)
    return QualityComparison(
        task=pair.candidate.task,
        metric=pair.candidate.metric,
        unit=pair.candidate.unit,
        better=pair.candidate.better,
        reference=pair.reference.score,
        candidate=pair.candidate.score,
        paired=paired,
        groups=() if pair.invalid else _groups(pair),
        invalid=pair.invalid,
    )


def paired_result(pair: QualityPair) -> PairedResult:
    """Paired statistics over all documents; where no direction is better, a shorter answer counts as lower."""
    return compare_paired(
        [document.score for document in pair.reference.documents],
        [document.score for document in pair.candidate.documents],
        margin=margin_of(pair.reference),
        higher_is_better=pair.candidate.better != "lower",
    )


def difference_unit(unit: str) -> str:
    """The unit of a paired difference: a perplexity's documents are in nats."""
    return "nats" if unit == "ppl" else unit


def _groups(pair: QualityPair) -> tuple[GroupResult, ...]:
    members: dict[str, list[tuple[float, float]]] = {}
    for a, b in zip(pair.reference.documents, pair.candidate.documents, strict=True):
        members.setdefault(b.group, []).append((a.score, b.score))
    if len(members) < 2:
        return ()
    margin, higher = margin_of(pair.reference), pair.candidate.better != "lower"
    results = {
        group: compare_paired([a for a, _ in scores], [b for _, b in scores], margin=margin, higher_is_better=higher)
        for group, scores in members.items()
        if len(scores) > 1
    }
    adjusted = holm({group: result.p_value for group, result in results.items()})
    return tuple(
        GroupResult(
            group=group,
            n=result.n,
            difference=result.difference,
            adjusted_p=adjusted[group],
            verdict=decide(result.difference, result.low, result.high, adjusted[group], margin),
        )
        for group, result in results.items()
    )


def mean_drift(pair: QualityPair) -> float | None:
    """Mean absolute change of the choices' log-probabilities over all documents, None where the records keep none."""
    gaps = [
        abs(x - y)
        for a, b in zip(pair.reference.documents, pair.candidate.documents, strict=True)
        for x, y in zip(a.values, b.values, strict=False)
    ]
    return math.fsum(gaps) / len(gaps) if gaps else None


def same_numerics(reference: Side, candidate: Side) -> bool:
    """Whether two engines should compute the same numbers: same model, precision, KV policy and target."""
    a, b = reference.engine.plan, candidate.engine.plan
    return (a.model, a.quant, a.kv, a.target) == (b.model, b.quant, b.kv, b.target)
