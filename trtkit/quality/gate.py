"""Ship it or not: rules held against measurements, never more tightly than the measurements' own noise.

A number within its limit passes. Beyond the limit it fails only where the measurement can tell: its 95 % interval lies
beyond the limit too. Between the two the limit is widened to the noise, up to MAX_NOISE (speeds) or MAX_NOISE_POINTS
(accuracies); a noisier measurement is invalid for that rule, and so is a missing one.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from trtkit.quality.compare import (
    compare_bench,
    condition_of,
    difference_unit,
    margin_of,
    mean_drift,
    paired_result,
    same_numerics,
)
from trtkit.quality.paired import ALPHA, Verdict, documents_needed, holm
from trtkit.quality.rules import Rule, label_of
from trtkit.quality.sides import BenchPair, QualityPair, Side, drift_of, pair_bench, pair_quality, why_invalid
from trtkit.spec.dtype import DType
from trtkit.spec.errors import EXIT_GATE_FAILED, EXIT_OK, MeasurementError
from trtkit.spec.metrics import MIN_SAMPLES
from trtkit.spec.result import BenchResult, QualityResult
from trtkit.spec.units import format_gib

MAX_NOISE = 0.2
MAX_NOISE_POINTS = 2.0
SAME_LOGPROB_NATS = {DType.FP32: 0.001}
SAME_LOGPROB_DEFAULT_NATS = 0.01
SAME_KL_NATS = 5e-5
"""What batching and rounding explain between two builds of one plan: mean change of choices' log-probabilities (by compute
type), and KL divergence."""


class Status(str, Enum):
    """A rule's outcome."""

    PASS = "pass"  # noqa: S105 - not a password
    FAIL = "fail"
    INVALID = "invalid"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One rule on one measurement, with the reason in one line."""

    rule: str
    status: Status
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GateResult:
    """All outcomes. One failed rule fails the gate; otherwise one invalid measurement makes it invalid."""

    reference: str
    candidate: str
    outcomes: tuple[Outcome, ...]

    @property
    def status(self) -> Status:
        """The gate's outcome."""
        found = {outcome.status for outcome in self.outcomes}
        return next((s for s in (Status.FAIL, Status.INVALID) if s in found), Status.PASS)

    @property
    def exit_code(self) -> int:
        """What the command ends with."""
        codes = {Status.PASS: EXIT_OK, Status.FAIL: EXIT_GATE_FAILED, Status.INVALID: MeasurementError.exit_code}
        return codes[self.status]


def run_gate(reference: Side, candidate: Side, rules: Sequence[Rule]) -> GateResult:
    """Hold `candidate` against `rules`; two built-in rules are always on.

    Built in: no task may be detectably worse by more than its margin (unless a rule of yours limits that task), and two
    builds of one plan must compute the same numbers. Without any rule these two decide, and then a loss beyond its
    margin that too few documents can confirm makes the gate invalid instead of passing.

    Raises:
        MeasurementError: an engine's weights are random, so nothing about it may be shipped.
    """
    for side in (reference, candidate):
        if side.engine.plan.load_format == "dummy":
            raise MeasurementError(
                f"{side.name}: its weights are random (load format dummy); gate an engine built from a model"
            )
    try:
        quality = pair_quality(reference, candidate)
    except MeasurementError as error:
        outcome = Outcome(rule="paired documents", status=Status.INVALID, reason=str(error))
        return GateResult(reference=reference.name, candidate=candidate.name, outcomes=(outcome,))
    bench = pair_bench(reference, candidate)
    outcomes: list[Outcome] = []
    for rule in rules:
        outcomes += _apply(rule, reference, candidate, bench, quality)
    unlimited = [p for p in quality if not any(_limits(r, p) for r in rules)]
    outcomes += _no_task_worse(unlimited, strict=not rules)
    if same_numerics(reference, candidate):
        outcomes += _same_numbers(quality, tuple(drift_of(candidate, reference)))
    if not outcomes:
        reason = f"{reference.name} and {candidate.name} share no task and no rule is given, so nothing was judged"
        outcomes.append(Outcome(rule="something to judge", status=Status.INVALID, reason=reason))
    return GateResult(reference=reference.name, candidate=candidate.name, outcomes=tuple(outcomes))


def _apply(
    rule: Rule, reference: Side, candidate: Side, bench: Sequence[BenchPair], quality: Sequence[QualityPair]
) -> list[Outcome]:
    if rule.kind == "drop":
        found = [judge_drop(rule, pair) for pair in quality if _limits(rule, pair)]
        return found or [_missing(rule, f"no task like {rule.subject!r} was run on both engines; run `trtkit eval`")]
    if rule.kind in ("kl", "agreement"):
        records = [record for record in drift_of(candidate, reference) if record.metric == rule.kind]
        return [_judge_drift(rule, record) for record in records] or [
            _missing(
                rule, f"no {rule.kind} of {candidate.name} against {reference.name}; run `trtkit eval --reference`"
            )
        ]
    if rule.kind == "gain":
        gains = [_judge_gain(rule, pair) for pair in bench]
        return gains or [_missing(rule, "no workload was run on both engines; run `trtkit bench` with one protocol")]
    judge = _judge_memory if rule.kind == "memory" else judge_limit
    return [judge(rule, record) for record in candidate.bench] or [
        _missing(rule, f"no benchmark record of {candidate.name}; run `trtkit bench`")
    ]


def _missing(rule: Rule, reason: str) -> Outcome:
    return Outcome(rule=rule.text, status=Status.INVALID, reason=reason)


def _limits(rule: Rule, pair: QualityPair) -> bool:
    """Whether a drop rule is about this task; a rule on a task means its accuracy, unless it names the metric."""
    if rule.kind != "drop":
        return False
    if "/" in rule.subject:
        return pair.key == rule.subject
    return fnmatch.fnmatch(pair.candidate.task, rule.subject) and pair.candidate.unit == "fraction"


def judge_drop(rule: Rule, pair: QualityPair) -> Outcome:
    """A task's paired loss against its limit; accuracies in points, other metrics in their unit."""
    name = f"{rule.text} [{pair.key}]"
    if pair.invalid:
        return Outcome(rule=name, status=Status.INVALID, reason=pair.invalid)
    scale, unit = (
        (100.0, "points") if pair.candidate.unit == "fraction" else (1.0, difference_unit(pair.candidate.unit))
    )
    paired = paired_result(pair)
    drop, low, high = (-scale * v for v in (paired.difference, paired.high, paired.low))
    shown = f"drop {drop:+.2f} {unit} [{low:+.2f}, {high:+.2f}] over {paired.n} documents, p = {paired.p_value:.2g}"
    noise, resolution = scale * paired.noise, max(rule.limit, MAX_NOISE_POINTS * scale / 100)
    if drop <= rule.limit:
        status, why = Status.PASS, f"within {rule.limit:g}"
        if high > rule.limit:
            why += f"; up to {high:.2f} is not excluded"
    elif paired.p_value < ALPHA:
        status, why = Status.FAIL, f"limit {rule.limit:g}"
    elif noise <= resolution:
        status, why = Status.PASS, f"limit {rule.limit:g} widened to the noise of {noise:.2f}"
    else:
        needed = documents_needed(_variance(paired.noise, paired.n), max(rule.limit, 0.01 * scale) / scale)
        status, why = Status.INVALID, f"noise {noise:.2f} cannot decide a limit of {rule.limit:g}"
        why += f"; about {max(needed, paired.n + 1)} documents would"
    return Outcome(rule=name, status=status, reason=f"{shown}: {why}")


def _variance(noise: float, n: int) -> float:
    """One document's variance, from the half width of the mean's 95 % interval."""
    return n * (noise / 1.96) ** 2


def judge_limit(rule: Rule, record: BenchResult) -> Outcome:
    """A number of the candidate's own against an absolute limit."""
    name = f"{rule.text} [{condition_of(record.workload)}]"
    if not record.valid:
        return Outcome(rule=name, status=Status.INVALID, reason=why_invalid(record))
    metric = record.metrics.get(rule.subject)
    stat = None if metric is None else metric.stats.get(rule.stat)
    if metric is None or stat is None:
        samples = 0 if metric is None else metric.samples
        reason = f"{label_of(rule)} {rule.stat} was not measured: {samples} samples"
        if rule.stat in MIN_SAMPLES and samples:
            reason += f", {MIN_SAMPLES[rule.stat]} are needed in every repeat"
        return Outcome(rule=name, status=Status.INVALID, reason=reason)
    shown = f"{label_of(rule)} {rule.stat if rule.stat != 'value' else ''} {stat.value:.4g} {metric.unit}".replace(
        "  ", " "
    )
    near = stat.low if rule.kind == "max" else stat.high
    excess = stat.value / rule.limit if rule.kind == "max" else rule.limit / stat.value if stat.value > 0 else None
    within = None if near is None else (near <= rule.limit if rule.kind == "max" else near >= rule.limit)
    noise = None if near is None or stat.value == 0 else abs(stat.value - near) / abs(stat.value)
    return _beyond(name, shown, rule.limit, _Excess(excess=excess, within=within, noise=noise))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Excess:
    """How far a value is beyond its limit (1.0: at it), whether its interval still reaches the limit, and its noise."""

    excess: float | None
    within: bool | None
    noise: float | None


def _beyond(rule: str, shown: str, limit: float, found: _Excess) -> Outcome:
    if found.excess is not None and found.excess <= 1:
        return Outcome(rule=rule, status=Status.PASS, reason=f"{shown}: within {limit:g}")
    if found.within is None or found.noise is None:
        if found.excess is None or found.excess > 1 + MAX_NOISE:
            reason = f"{shown}: limit {limit:g} (too few repeats to know the noise)"
            return Outcome(rule=rule, status=Status.FAIL, reason=reason)
        reason = f"{shown}: limit {limit:g} missed narrowly with too few repeats to know the noise; run 3 or more"
        return Outcome(rule=rule, status=Status.INVALID, reason=reason)
    if not found.within:
        return Outcome(rule=rule, status=Status.FAIL, reason=f"{shown}: limit {limit:g}, noise {found.noise:.1%}")
    if found.noise <= MAX_NOISE:
        reason = f"{shown}: limit {limit:g} widened to the noise of {found.noise:.1%}"
        return Outcome(rule=rule, status=Status.PASS, reason=reason)
    reason = f"{shown}: noise {found.noise:.1%} cannot decide a limit of {limit:g}; run more repeats on a quiet machine"
    return Outcome(rule=rule, status=Status.INVALID, reason=reason)


def _judge_gain(rule: Rule, pair: BenchPair) -> Outcome:
    name = f"{rule.text} [{condition_of(pair.candidate.workload)}]"
    if pair.invalid:
        return Outcome(rule=name, status=Status.INVALID, reason=pair.invalid)
    found = [r for r in compare_bench(pair) if r.metric == rule.subject and r.stat == rule.stat]
    if not found or not found[0].ratio:
        reason = f"{label_of(rule)} was not measured on both engines"
        return Outcome(rule=name, status=Status.INVALID, reason=reason)
    ratio = found[0]
    assert ratio.ratio is not None
    lower_is_better = rule.subject.endswith("_ms")
    gain = 1 / ratio.ratio if lower_is_better else ratio.ratio
    best = None
    if ratio.low is not None and ratio.high is not None:
        best = 1 / ratio.low if lower_is_better else ratio.high
    interval = "" if ratio.low is None or ratio.high is None else f" [{ratio.low:.3f}, {ratio.high:.3f}]"
    shown = (
        f"{label_of(rule)} {ratio.reference:.4g} -> {ratio.candidate:.4g} {ratio.unit}, "
        f"ratio {ratio.ratio:.3f}{interval}"
    )
    excess = rule.limit / gain
    within = None if best is None else best >= rule.limit
    noise = None if best is None else best / gain - 1
    return _beyond(name, shown, rule.limit, _Excess(excess=excess, within=within, noise=noise))


def _judge_memory(rule: Rule, record: BenchResult) -> Outcome:
    name = f"{rule.text} [{condition_of(record.workload)}]"
    if not record.valid:
        return Outcome(rule=name, status=Status.INVALID, reason=why_invalid(record))
    peak = record.memory.peak_bytes
    if peak is None:
        return Outcome(rule=name, status=Status.INVALID, reason="peak memory was not measured")
    status = Status.PASS if peak <= rule.limit else Status.FAIL
    reason = f"peak {format_gib(peak)} ({record.memory.peak_method}), limit {format_gib(rule.limit)}"
    return Outcome(rule=name, status=status, reason=reason)


def _judge_drift(rule: Rule, record: QualityResult) -> Outcome:
    name = f"{rule.text} [{record.task}]"
    if not record.valid:
        return Outcome(rule=name, status=Status.INVALID, reason=why_invalid(record))
    spread = "" if record.stderr is None else f" +- {record.stderr:.2g}"
    shown = f"{record.metric} {record.score:.4g}{spread} {record.unit} over {len(record.documents)} prompts"
    beyond = record.score - rule.limit if rule.kind == "kl" else rule.limit - record.score
    noise = 2 * (record.stderr or 0.0)
    if beyond <= 0:
        return Outcome(rule=name, status=Status.PASS, reason=f"{shown}: within {rule.limit:g}")
    if beyond <= noise:
        return Outcome(rule=name, status=Status.PASS, reason=f"{shown}: limit {rule.limit:g} widened to the noise")
    return Outcome(rule=name, status=Status.FAIL, reason=f"{shown}: limit {rule.limit:g}")


def _no_task_worse(pairs: Iterable[QualityPair], *, strict: bool) -> list[Outcome]:
    """Built in: with Holm's correction over all tasks, none is worse by more than its margin.

    `strict`: nothing else decides, so a loss beyond the margin that the documents are too few to confirm is invalid.
    """
    judged = [pair for pair in pairs if pair.candidate.better != "neither"]
    outcomes = [
        Outcome(rule=f"no task worse [{pair.key}]", status=Status.INVALID, reason=pair.invalid)
        for pair in judged
        if pair.invalid
    ]
    results = {pair.key: (pair, paired_result(pair)) for pair in judged if not pair.invalid}
    adjusted = holm({key: paired.p_value for key, (_, paired) in results.items()})
    for key, (pair, paired) in results.items():
        margin = margin_of(pair.reference)
        status = Status.PASS
        if paired.difference < -margin:
            status = Status.FAIL if adjusted[key] < ALPHA else Status.INVALID if strict else Status.PASS
        reason = (
            f"{paired.difference:+.4g} {difference_unit(pair.candidate.unit)} [{paired.low:+.4g}, {paired.high:+.4g}] over {paired.n} "
            f"documents, Holm p = {adjusted[key]:.2g}, margin {margin:.4g}: {paired.verdict.value}"
        )
        if paired.verdict is Verdict.UNDECIDED and paired.needed is not None:
            reason += f"; about {paired.needed} documents would decide"
        outcomes.append(Outcome(rule=f"no task worse [{key}]", status=status, reason=reason))
    return outcomes


def _same_numbers(pairs: Sequence[QualityPair], drift: Sequence[QualityResult]) -> list[Outcome]:
    """Built in: two builds of one plan agree to within rounding, document by document."""
    why = "both engines have the same model, precision and KV policy, so they must compute the same numbers"
    outcomes = []
    for pair in pairs:
        moved = mean_drift(pair)
        if moved is None or pair.invalid:
            continue
        allowed = SAME_LOGPROB_NATS.get(pair.candidate.engine.plan.quant.compute, SAME_LOGPROB_DEFAULT_NATS)
        status = Status.PASS if moved <= allowed else Status.FAIL
        reason = f"choices' log-probabilities differ by {moved:.2g} nats on average, {allowed:g} allowed: {why}"
        outcomes.append(Outcome(rule=f"same plan, same numbers [{pair.key}]", status=status, reason=reason))
    for record in drift:
        if record.metric == "kl" and record.valid:
            status = Status.PASS if record.score <= SAME_KL_NATS else Status.FAIL
            reason = f"KL {record.score:.2g} nats, {SAME_KL_NATS:g} allowed: {why}"
            outcomes.append(Outcome(rule=f"same plan, same numbers [{record.task}]", status=status, reason=reason))
    return outcomes
