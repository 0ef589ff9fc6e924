"""Which configurations a report compares, what each is called, and in which order they stand.

The order is the published comparison's: 16-bit with a full cache, quantised, evicting, both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from trtkit.report.model import Column
from trtkit.spec.codec import digest
from trtkit.spec.kv import KVFidelity, KVPolicySpec
from trtkit.spec.plan import BuildPlan
from trtkit.spec.quant import QuantSpec
from trtkit.spec.result import BenchResult, EngineRef, Environment, QualityResult

BASELINE, QUANTISED, EVICTING, OPTIMISED = "baseline", "quantised", "kv-pruned", "optimised"
ROLES = (BASELINE, QUANTISED, EVICTING, OPTIMISED)
Result = TypeVar("Result", BenchResult, QualityResult)
_POLICY_NAMES = {"h2o": "H2O", "window": "sinks + window", "snapkv": "SnapKV", "random": "random eviction"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Configuration:
    """One column and the records that belong to it."""

    column: Column
    plan: BuildPlan
    bench: tuple[BenchResult, ...]
    quality: tuple[QualityResult, ...]

    @property
    def records(self) -> tuple[BenchResult | QualityResult, ...]:
        """All of them."""
        return (*self.bench, *self.quality)


def configurations(
    bench: Sequence[BenchResult], quality: Sequence[QualityResult]
) -> tuple[tuple[Configuration, ...], tuple[str, ...]]:
    """Group records by engine and machine; of two records of one cell the newer counts, and a note says so."""
    kept, notes = _newest(bench)
    scored, quality_notes = _newest(quality)
    groups: dict[str, list[BenchResult]] = {}
    for result in kept:
        groups.setdefault(_bench_key(result), []).append(result)
    found = [_from_bench(results, scored) for results in groups.values()]
    benched = {_engine_key(result.engine) for result in kept}
    alone: dict[str, list[QualityResult]] = {}
    for score in scored:
        if _engine_key(score.engine) not in benched:
            alone.setdefault(_engine_key(score.engine), []).append(score)
    found += [_configuration(scores[0].engine, scores[0].environment, (), scores) for scores in alone.values()]
    return _told_apart(sorted(found, key=_rank)), (*notes, *quality_notes)


def _engine_key(engine: EngineRef) -> str:
    return digest({"digest": engine.digest, "plan": engine.plan, "fidelity": engine.fidelity})


def _bench_key(result: BenchResult) -> str:
    environment = result.environment
    return digest([_engine_key(result.engine), result.engine.label, environment.device, environment.hostname_hash])


def _newest(results: Iterable[Result]) -> tuple[list[Result], list[str]]:
    newest: dict[str, Result] = {}
    notes = []
    for result in sorted(results, key=lambda r: r.environment.started_utc):
        key = _cell_key(result)
        if key in newest:
            notes.append(
                f"{result.engine.name}: of two records of the same cell the newer counts "
                f"({result.environment.started_utc}, not {newest[key].environment.started_utc})"
            )
        newest[key] = result
    return list(newest.values()), notes


def _cell_key(result: BenchResult | QualityResult) -> str:
    if isinstance(result, BenchResult):
        return digest([_bench_key(result), result.workload, result.protocol])
    return digest([_engine_key(result.engine), result.task, result.metric, result.protocol])


def _from_bench(results: Sequence[BenchResult], scored: Sequence[QualityResult]) -> Configuration:
    first = results[0]
    key = _engine_key(first.engine)
    mine = [score for score in scored if _engine_key(score.engine) == key]
    return _configuration(first.engine, first.environment, results, mine)


def _configuration(
    engine: EngineRef, environment: Environment, bench: Sequence[BenchResult], quality: Sequence[QualityResult]
) -> Configuration:
    plan = engine.plan
    devices = plan.parallel.world_size
    column = Column(
        title=_title(engine),
        role=role_of(plan),
        engine=engine.name,
        digest=engine.digest,
        precision=_precision_title(plan.quant),
        kv=_kv_title(plan.kv, engine.fidelity) + (", prefixes reused" if plan.limits.enable_block_reuse else ""),
        fidelity=engine.fidelity.value,
        batching=f"batch {plan.limits.max_batch_size}, {plan.limits.max_num_tokens} tokens a step",
        target=plan.target,
        device=environment.device,
        gpus=f"{devices} x {plan.gpu}" + (f" (TP {plan.parallel.tp}, PP {plan.parallel.pp})" if devices > 1 else ""),
        label=engine.label,
    )
    return Configuration(column=column, plan=plan, bench=tuple(bench), quality=tuple(quality))


def role_of(plan: BuildPlan) -> str:
    """Which of the published table's four configurations a plan is."""
    quantised = plan.quant.algo is not None
    if plan.kv.is_full:
        return QUANTISED if quantised else BASELINE
    return OPTIMISED if quantised else EVICTING


def _title(engine: EngineRef) -> str:
    guesses = engine.plan.speculation
    return (
        _role_title(engine)
        + (" + prefix reuse" if engine.plan.limits.enable_block_reuse else "")
        + ("" if guesses is None else f" + n-gram {guesses.max_draft_tokens}")
    )


def _role_title(engine: EngineRef) -> str:
    precision, kv = _precision_title(engine.plan.quant), _kv_title(engine.plan.kv, engine.fidelity)
    role = role_of(engine.plan)
    if role == BASELINE:
        return f"Baseline ({precision})"
    if role == QUANTISED:
        return precision
    if role == EVICTING:
        return f"KV-pruned ({kv})"
    return f"Optimised ({precision} + {kv})"


def _precision_title(quant: QuantSpec) -> str:
    """The scheme, and the cache's type where that is narrower than what is computed in."""
    narrow = quant.kv.bits < quant.compute.bits
    return quant.precision.upper() + (f", {quant.kv.value.upper()} KV" if narrow else "")


def _kv_title(policy: KVPolicySpec, fidelity: KVFidelity) -> str:
    """The policy by the name it has earned: what only keeps sinks and a window is never called by a cleverer name."""
    if policy.is_full:
        return "full"
    share = policy.budget_fraction
    amount = f"{share * 100:g} %" if share is not None else f"{policy.budget} tokens"
    name = _POLICY_NAMES.get(policy.kind, policy.kind)
    if fidelity is KVFidelity.WINDOW_ONLY and policy.kind != "window":
        return f"sinks + window {amount}, in place of {name}"
    if fidelity is KVFidelity.PREFILL_ONLY:
        return f"{name} {amount}, prefill only"
    if fidelity is KVFidelity.GENERATED_ONLY:
        return f"{name} {amount} of generated tokens, prompt kept"
    return f"{name} {amount}"


def _rank(configuration: Configuration) -> tuple[int, str, str, str, str]:
    column = configuration.column
    return (
        ROLES.index(column.role),
        column.precision,
        column.kv,
        column.gpus,
        f"{column.engine} {column.label} {column.device}",
    )


def _told_apart(found: Sequence[Configuration]) -> tuple[Configuration, ...]:
    """Give columns of the same title what tells them apart: label, machine or engine name."""
    titles = [c.column.title for c in found]
    named: list[Configuration] = []
    for configuration in found:
        column = configuration.column
        title = column.title
        if column.role == OPTIMISED and _tuned(configuration, found[0]):
            title = f"{title[:-1]} + tuned batching)"
        if column.label:
            title = f"{title}, {column.label}"
        if titles.count(column.title) > 1:
            title = f"{title} [{_difference(configuration, found)}]"
        twins = sum(c.column.title.startswith(title) for c in named)
        title = f"{title} #{twins + 1}" if twins else title
        named.append(replace(configuration, column=replace(column, title=title)))
    return tuple(named)


def _tuned(configuration: Configuration, baseline: Configuration) -> bool:
    return baseline.column.role == BASELINE and configuration.plan.limits != baseline.plan.limits


def _difference(configuration: Configuration, found: Sequence[Configuration]) -> str:
    same = [c.column for c in found if c.column.title == configuration.column.title]
    column = configuration.column
    if len({c.engine for c in same}) == len(same):
        return column.engine
    if len({c.device for c in same}) == len(same):
        return column.device
    return f"{column.engine} {column.digest[:6]} on {column.device}"
