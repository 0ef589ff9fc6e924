"""Building `QualityResult` records: the parts every kind of evaluation shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trtkit.quality.scoring import ScoringCounts
from trtkit.spec.bundle import EngineBundle
from trtkit.spec.codec import digest, write_record
from trtkit.spec.engine import EngineInfo
from trtkit.spec.result import QUALITY_KIND, Check, DocumentOutcome, EngineRef, Environment, QualityResult


@dataclass(frozen=True, kw_only=True, slots=True)
class QualitySource:
    """Which engine is judged, and where."""

    engine: EngineRef
    environment: Environment

    def journal_digest(self, info: EngineInfo) -> str:
        """Names what may reuse this engine's finished work: the engine and the KV policy in force."""
        return f"{self.engine.digest}:{info.kv_policy.label}"


def engine_ref(bundle: EngineBundle, label: str = "") -> EngineRef:
    """How records name an engine."""
    manifest = bundle.manifest
    return EngineRef(
        name=bundle.name, digest=manifest.digest, plan=manifest.plan, fidelity=manifest.fidelity, label=label
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricSpec:
    """What is measured: `better` is "higher", "lower" or "neither"; records pair only when `protocol` is the same."""

    task: str
    metric: str
    unit: str
    protocol: str
    better: str = "higher"
    reference: EngineRef | None = None


def quality_result(
    source: QualitySource,
    spec: MetricSpec,
    documents: Sequence[DocumentOutcome],
    *,
    counts: ScoringCounts,
    checks: Sequence[Check],
    aggregate: tuple[float | None, float | None] = (None, None),
) -> QualityResult:
    """A record; without an `aggregate` (score, standard error) they are the documents', and a failed check voids it."""
    values = [document.score for document in documents]
    score, stderr = aggregate
    return QualityResult(
        engine=source.engine,
        task=spec.task,
        metric=spec.metric,
        unit=spec.unit,
        better=spec.better,
        protocol=spec.protocol,
        score=math.fsum(values) / len(values) if score is None else score,
        stderr=standard_error(values) if stderr is None else stderr,
        documents=tuple(documents),
        evictions=counts.evictions,
        tokens_evicted=counts.tokens_evicted,
        environment=source.environment,
        truncated=counts.truncated,
        valid=all(check.status != "fail" for check in checks),
        checks=tuple(checks),
        reference=spec.reference,
    )


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean, None for a single value."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def eviction_check(info: EngineInfo, counts: ScoringCounts) -> tuple[Check, ...]:
    """An engine that evicts must have evicted before its answers were scored, or the score is the full cache's."""
    truncated = Check(
        name="truncation",
        status="warn" if counts.truncated else "pass",
        detail=f"{counts.truncated} of {counts.contexts} contexts were cut to fit max_seq_len {info.max_seq_len}",
    )
    if info.kv_policy.is_full:
        return (truncated,)
    detail = (
        f"{counts.acted} of {counts.contexts} contexts were scored on an evicted cache "
        f"({counts.evictions} evictions, {counts.tokens_evicted} tokens, policy {info.kv_policy.label})"
    )
    if not counts.acted:
        detail += "; prompts within the budget measure the full cache: use more shots or a smaller budget"
    return truncated, Check(name="eviction acted", status="pass" if counts.acted else "fail", detail=detail)


def write_quality(directory: Path, record: QualityResult) -> Path:
    """Store a record under a name that says what it is; a rerun of the same thing replaces it."""
    key = digest({"digest": record.engine.digest, "label": record.engine.label, "protocol": record.protocol})[:8]
    stem = "-".join((record.engine.name, record.task, record.metric.replace(",", "-"), key))
    path = directory / f"quality-{''.join(c if c.isalnum() or c in '-_.' else '_' for c in stem)}.json"
    write_record(path, QUALITY_KIND, record)
    return path
