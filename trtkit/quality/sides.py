"""The two or more configurations that are compared: their records, and how they pair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from trtkit.spec.codec import digest
from trtkit.spec.errors import MeasurementError
from trtkit.spec.result import BenchResult, EngineRef, QualityResult

_PER_TOKEN_UNITS = ("nats/token", "ppl", "bits/byte")


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One engine's records."""

    engine: EngineRef
    bench: tuple[BenchResult, ...] = ()
    quality: tuple[QualityResult, ...] = ()

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.engine.label or self.engine.name


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityPair:
    """One task's metric on both engines, documents in the same order."""

    reference: QualityResult
    candidate: QualityResult

    @property
    def key(self) -> str:
        """Task and metric."""
        return f"{self.candidate.task}/{self.candidate.metric}"

    @property
    def invalid(self) -> str:
        """Why nothing can be concluded, empty when both are valid."""
        return "; ".join(why_invalid(record) for record in (self.reference, self.candidate) if not record.valid)


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchPair:
    """One workload on both engines."""

    reference: BenchResult
    candidate: BenchResult

    @property
    def invalid(self) -> str:
        """Why nothing can be concluded, empty when both are valid."""
        return "; ".join(why_invalid(record) for record in (self.reference, self.candidate) if not record.valid)


def why_invalid(record: BenchResult | QualityResult) -> str:
    """The failed checks of a record in one line."""
    reasons = [f"{check.name}: {check.detail}" for check in record.checks if check.status == "fail"]
    return f"{record.engine.label or record.engine.name} is invalid ({'; '.join(reasons) or 'marked so'})"


def pair_quality(reference: Side, candidate: Side) -> list[QualityPair]:
    """Every task and metric both were judged on, with their documents brought into the same order.

    Where a task was run by several protocols, the latest that both share counts.

    Raises:
        MeasurementError: a task was run with different protocols or documents, or in different vocabularies.
    """
    theirs = {key: r for key, r in _by_task(reference.quality).items() if not _against(r, candidate)}
    ours = {key: r for key, r in _by_task(candidate.quality).items() if not _against(r, reference)}
    shared: dict[tuple[str, str], QualityPair] = {}
    for key, record in ours.items():
        if key in theirs:
            shared[key[:2]] = QualityPair(reference=_matched(theirs[key], record), candidate=record)
    other = {key[:2]: record for key, record in theirs.items()}
    for key, record in ours.items():
        if key[:2] not in shared and key[:2] in other:
            _matched(other[key[:2]], record)
    return [shared[key] for key in sorted(shared)]


def _against(record: QualityResult, side: Side) -> bool:
    """Whether a drift record was taken against `side` itself, whose own drift is zero by definition."""
    return record.reference is not None and record.reference.digest == side.engine.digest


def _by_task(records: Sequence[QualityResult]) -> dict[tuple[str, str, str], QualityResult]:
    """The latest record of each task, metric and protocol, oldest first."""
    ordered = sorted(records, key=lambda record: record.environment.started_utc)
    found: dict[tuple[str, str, str], QualityResult] = {}
    for record in ordered:
        key = (record.task, record.metric, record.protocol)
        found.pop(key, None)
        found[key] = record
    return found


def _matched(reference: QualityResult, candidate: QualityResult) -> QualityResult:
    """The reference's record with its documents in the candidate's order."""
    what = f"{candidate.task}/{candidate.metric}"
    names = f"{reference.engine.name} and {candidate.engine.name}"
    if reference.protocol != candidate.protocol:
        raise MeasurementError(
            f"{what}: {names} were judged by different protocols ({reference.protocol!r} and {candidate.protocol!r}); "
            "run `trtkit eval` on both with the same options"
        )
    sizes = [record.engine.plan.model.vocab_size for record in (reference, candidate)]
    if candidate.unit in _PER_TOKEN_UNITS and sizes[0] != sizes[1]:
        raise MeasurementError(
            f"{what}: {names} have vocabularies of {sizes[0]} and {sizes[1]} tokens, so a number per token does not compare"
        )
    by_id = {document.document: document for document in reference.documents}
    ids = [document.document for document in candidate.documents]
    different = set(by_id) ^ set(ids)
    if different or len(by_id) != len(reference.documents) or len(set(ids)) != len(ids):
        example = f", for example {sorted(different)[0]!r}" if different else ""
        raise MeasurementError(
            f"{what}: {names} were judged on different documents ({len(by_id)} and {len(ids)}, "
            f"{len(different)} of them on one side only{example}); run both on the same tasks and --limit"
        )
    return replace(reference, documents=tuple(by_id[i] for i in ids))


def pair_bench(reference: Side, candidate: Side) -> list[BenchPair]:
    """Every workload both ran."""
    theirs = _by_workload(reference.bench)
    return [
        BenchPair(reference=theirs[key], candidate=record)
        for key, record in _by_workload(candidate.bench).items()
        if key in theirs
    ]


def _by_workload(records: Sequence[BenchResult]) -> Mapping[str, BenchResult]:
    ordered = sorted(records, key=lambda r: (r.workload.isl, r.workload.concurrency or 0, r.environment.started_utc))
    return {digest(record.workload): record for record in ordered}


def drift_of(candidate: Side, reference: Side) -> Iterator[QualityResult]:
    """The candidate's drift records that were taken against this very reference."""
    for record in _by_task(candidate.quality).values():
        if record.reference is not None and record.reference.digest == reference.engine.digest:
            yield record
