"""The quality rows: each task with its standard error, and the paired difference from the first column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from trtkit.quality.compare import difference_unit, paired_result
from trtkit.quality.sides import QualityPair
from trtkit.report.cells import Notes, against_first, failure_reason, missing
from trtkit.report.columns import Configuration
from trtkit.report.model import INVALID, OK, Cell, Row, Section
from trtkit.spec.errors import MeasurementError
from trtkit.spec.measured import Source
from trtkit.spec.result import QualityResult


def quality_section(found: Sequence[Configuration], notes: Notes) -> Section:
    """Every task once per metric and protocol."""
    tasks = {(q.task, q.metric, q.protocol, q.unit): q for c in found for q in c.quality}
    rows = []
    for (task, metric, protocol, unit), sample in sorted(tasks.items()):
        scores = [_score(c, sample) for c in found]
        row = Row(
            key=f"quality.{task}.{metric}",
            metric=f"{task}.{metric}",
            label=f"{task} {metric}",
            condition=protocol,
            unit=unit,
            digits=3,
            better=sample.better,
            cells=tuple(_cell(score, notes) for score in scores),
        )
        rows.append(_paired(against_first(row), scores))
    return Section(title="Quality", rows=tuple(rows))


def _score(configuration: Configuration, sample: QualityResult) -> QualityResult | None:
    wanted = (sample.task, sample.metric, sample.protocol)
    return next((q for q in configuration.quality if (q.task, q.metric, q.protocol) == wanted), None)


def _cell(score: QualityResult | None, notes: Notes) -> Cell:
    if score is None:
        return missing("not scored")
    if not score.valid:
        reason = f"{score.task}: {failure_reason(score)}"
        return Cell(status=INVALID, reason=reason, note=notes.number(f"{score.engine.name}, {reason}"))
    error = score.stderr
    return Cell(
        value=score.score,
        unit=score.unit,
        low=None if error is None else score.score - error,
        high=None if error is None else score.score + error,
        error=error,
        spread=f"1 standard error, {len(score.documents)} documents" if error is not None else "",
        source=Source.MEASURED,
        samples=len(score.documents),
    )


def _paired(row: Row, scores: Sequence[QualityResult | None]) -> Row:
    """Same documents on both engines tell a small difference that two standard errors would hide."""
    base = scores[0] if scores else None
    if base is None or row.cells[0].status != OK:
        return row
    later = zip(row.cells[1:], scores[1:], strict=True)
    return replace(row, cells=(row.cells[0], *(_against(cell, base, score) for cell, score in later)))


def _against(cell: Cell, base: QualityResult, score: QualityResult | None) -> Cell:
    if cell.status != OK or score is None:
        return cell
    ordered = _in_order_of(base, score)
    if ordered is None:
        return replace(cell, distinct=None, remark="other documents than the first column's, so not paired")
    try:
        paired = paired_result(QualityPair(reference=base, candidate=ordered))
    except MeasurementError:
        return cell
    unit = difference_unit(score.unit)
    text = f"paired {paired.difference:+.2g} [{paired.low:+.2g}, {paired.high:+.2g}] {unit}: {paired.verdict.value}"
    return replace(cell, distinct=paired.low > 0 or paired.high < 0, remark=text)


def _in_order_of(base: QualityResult, score: QualityResult) -> QualityResult | None:
    """The score with its documents in the base's order, None where they are not the same documents."""
    by_name = {document.document: document for document in score.documents}
    names = [document.document for document in base.documents]
    if len(by_name) != len(score.documents) or len(set(names)) != len(names) or set(by_name) != set(names):
        return None
    return replace(score, documents=tuple(by_name[name] for name in names))
