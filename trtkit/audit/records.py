"""Our own records held against physics: what `trtkit bench` injects as its judge.

On a CPU the limit is this machine's measured rate (the record's shares carry it); on a GPU in the catalog it is the
datasheet's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from trtkit.audit.finding import Finding
from trtkit.plan import work
from trtkit.plan.names import Precision
from trtkit.plan.roofline import floors
from trtkit.plan.scenario import Scenario
from trtkit.spec.catalog import gpu_spec
from trtkit.spec.errors import TrtkitError
from trtkit.spec.plan import Parallelism
from trtkit.spec.result import BenchResult, Check, QualityResult, tokens_per_step
from trtkit.spec.speculation import most_tokens_a_step
from trtkit.spec.units import format_gib

PASS, WARN, FAIL, SKIPPED = "pass", "warn", "fail", "skipped"
NOISE = 0.05
"""A measured limit and a measured time both vary by a few percent; above that a share over 1 is an error."""
WEIGHT_TOLERANCE = 0.02


def check_result(result: BenchResult) -> tuple[Check, ...]:
    """Physics and memory checks of one cell; a failed one makes it invalid."""
    if not result.metrics:
        return ()
    return tuple(check for checks in (_limits(result), _datasheet(result), _memory(result)) for check in checks)


def _limits(result: BenchResult) -> Iterator[Check]:
    """No metric beats what this machine was measured to do."""
    if not result.shares:
        yield Check(name="machine_limit", status=SKIPPED, detail="no measured limit of this machine in the record")
    for key, share in sorted(result.shares.items()):
        status = PASS if share.value <= 1 else WARN if share.value <= 1 + NOISE else FAIL
        detail = f"{key}: {share.value:.1%} of this machine's measured limit ({share.note or 'see shares'})"
        yield Check(name=f"machine_limit.{key}", status=status, detail=detail)


def _datasheet(result: BenchResult) -> Iterator[Check]:
    """On a catalogued GPU no time is below, and no rate above, what its datasheet allows."""
    plan, load = result.engine.plan, result.workload
    if not result.environment.device.startswith("cuda") or not load.isl:
        return
    try:
        kept = None if plan.kv.is_full else plan.kv.resolved(load.isl + load.osl).budget
        scenario = Scenario(
            model=plan.model,
            gpu=gpu_spec(plan.gpu),
            precision=Precision(name=plan.quant.precision, quant=plan.quant.held_by(plan.target), family=None),
            isl=load.isl,
            osl=load.osl,
            concurrency=load.concurrency or 1,
            tp=plan.parallel.tp,
            pp=plan.parallel.pp,
            kept_tokens=kept,
            cached_tokens=load.reusable_tokens(plan.limits),
        )
        limits = floors(scenario)
    except TrtkitError as error:
        yield Check(name="datasheet_limit", status=SKIPPED, detail=str(error))
        return
    # With speculation one request may get all its guesses in every step; all requests together got what was counted.
    most_tokens = most_tokens_a_step(plan.speculation)
    per_step = min(tokens_per_step(result.repeats) or most_tokens, most_tokens)
    for key, least in (("ttft_ms", limits.ttft_ms.value), ("tpot_ms", limits.tpot_ms.value / most_tokens)):
        value = _value(result, key)
        if value is not None:
            detail = f"{key} p50 {value:.3f}; {plan.gpu} needs at least {least:.3f} by its datasheet"
            yield Check(name=f"datasheet_limit.{key}", status=FAIL if value < least else PASS, detail=detail)
    tps = _value(result, "tps")
    if tps is not None:
        most = limits.tok_s.value * per_step
        detail = f"tps {tps:,.1f}; {plan.gpu} makes at most {most:,.1f} by its datasheet"
        yield Check(name="datasheet_limit.tps", status=FAIL if tps > most else PASS, detail=detail)


def _value(result: BenchResult, key: str) -> float | None:
    metric = result.metrics.get(key)
    if metric is None:
        return None
    stat = metric.stats.get("p50") or metric.stats.get("value")
    return stat.value if stat else None


def _memory(result: BenchResult) -> Iterator[Check]:
    """Weights are as large as the plan says, and what was seen in use holds them and the cache in use."""
    memory, plan = result.memory, result.engine.plan
    if memory.weight_bytes is None:
        yield Check(name="memory_holds_weights", status=SKIPPED, detail="no memory split in the record")
        return
    counted = _plan_weight_bytes(result)
    off = abs(memory.weight_bytes / counted - 1)
    yield Check(
        name="weights_as_planned",
        status=PASS if off <= WEIGHT_TOLERANCE else WARN,
        detail=f"{format_gib(memory.weight_bytes)} of weights reported, {format_gib(counted)} counted from the "
        f"{plan.quant.precision} plan",
    )
    if memory.peak_bytes is None:
        yield Check(name="memory_holds_weights", status=SKIPPED, detail="peak memory was not sampled")
        return
    needed = memory.weight_bytes + (memory.kv_peak_bytes or 0)
    yield Check(
        name="memory_holds_weights",
        status=PASS if memory.peak_bytes >= needed * (1 - WEIGHT_TOLERANCE) else FAIL,
        detail=f"peak {format_gib(memory.peak_bytes)} ({memory.peak_method}); weights and the cache in use are "
        f"{format_gib(needed)}",
    )


def _plan_weight_bytes(result: BenchResult) -> int:
    """Bytes of all ranks, as the embedded engine merges them; one rank for the others."""
    plan = result.engine.plan
    if plan.target == "embedded":
        return work.weight_bytes(plan.model, plan.quant.held_by(plan.target), Parallelism())
    return work.weight_bytes(plan.model, plan.quant, plan.parallel)


_VERDICTS = {PASS: "possible", WARN: "implausible", SKIPPED: "possible", FAIL: "impossible"}


def audit_record(result: BenchResult) -> tuple[Finding, ...]:
    """The checks stored in a record, then ours, as findings."""
    ours = check_result(result)
    names = {check.name for check in ours}
    checks = [check for check in result.checks if check.name not in names] + list(ours)
    found = []
    for number, check in enumerate(checks, 1):
        verdict = _VERDICTS.get(check.status, "possible")
        key = check.name.rpartition(".")[2]
        share = result.shares.get(key) if check.name.startswith("machine_limit.") else None
        bookkeeping = not check.name.startswith(("machine_limit", "datasheet_limit", "memory"))
        found.append(
            Finding(
                row=number,
                name=f"{result.engine.name} {check.name}",
                metric=key,
                verdict="inconsistent" if verdict == "impossible" and bookkeeping else verdict,
                share_of_limit=share.value if share else None,
                limit=None,
                unit="",
                claimed=None,
                arithmetic=check.detail,
            )
        )
    return tuple(found)


def audit_quality(result: QualityResult) -> tuple[Finding, ...]:
    """The score of a quality record against its scale, and the checks stored in it."""
    spread = "" if result.stderr is None else f" +- {2 * result.stderr:.4g}"
    scale = 100.0 if result.unit in ("%", "points") else 1.0
    bounded = result.better == "higher" and result.unit in ("%", "points", "share", "fraction", "accuracy")
    beyond = bounded and not 0 <= result.score <= scale
    detail = f"{result.score:.4g}{spread} {result.unit} over {len(result.documents)} documents"
    score = Finding(
        row=1,
        name=f"{result.engine.name} {result.task}",
        metric=result.metric,
        verdict="impossible" if beyond else "possible",
        share_of_limit=result.score / scale if bounded else None,
        limit=scale if bounded else None,
        unit=result.unit,
        claimed=result.score,
        arithmetic=detail,
    )
    stored = [
        replace(score, row=number, name=f"{score.name} {check.name}", verdict=verdict, arithmetic=check.detail)
        for number, check in enumerate(result.checks, 2)
        for verdict in ["inconsistent" if check.status == FAIL else _VERDICTS.get(check.status, "possible")]
    ]
    return (score, *stored)
