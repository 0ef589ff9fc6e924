"""Quality records as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from trtkit.quality.sheet import Preference
from trtkit.quality.table import table
from trtkit.spec.result import QualityResult


def records_text(records: Sequence[QualityResult]) -> str:
    """One line per record, then what a reader must know about them."""
    rows = [("engine", "task", "metric", "score", "+- s.e.", "documents", "evictions", "valid")]
    rows += [
        (
            record.engine.label or record.engine.name,
            record.task,
            record.metric,
            f"{record.score:.4f} {record.unit}",
            "n/a" if record.stderr is None else f"{record.stderr:.4f}",
            str(len(record.documents)),
            str(record.evictions),
            "yes" if record.valid else "INVALID",
        )
        for record in records
    ]
    return "\n".join((table(rows), *_subjects(records), *_remarks(records)))


def _subjects(records: Sequence[QualityResult]) -> list[str]:
    """Each subject's score, where a record holds several."""
    lines = []
    for record in records:
        scores: dict[str, list[float]] = {}
        for document in record.documents:
            scores.setdefault(document.group, []).append(document.score)
        if 1 < len(scores) < len(record.documents):
            parts = ", ".join(f"{group} {fmean(values):.3f} ({len(values)})" for group, values in scores.items())
            lines.append(
                f"{record.engine.label or record.engine.name}, {record.task}/{record.metric} by subject: {parts}"
            )
    return lines


def _remarks(records: Iterable[QualityResult]) -> list[str]:
    """Failed and warning checks, each said once."""
    remarks = dict.fromkeys(
        f"{record.engine.name}, {record.task}: {check.name}: {check.detail}"
        for record in records
        for check in record.checks
        if check.status in ("fail", "warn")
    )
    return list(remarks)


def preference_text(preference: Preference) -> str:
    """A person's grades in one sentence."""
    p = preference
    needed = "" if p.needed is None else f"; about {p.needed} graded prompts would decide"
    return (
        f"{p.candidate} against {p.reference}: preferred {p.wins} times, not preferred {p.losses}, no difference {p.ties}, "
        f"not graded {p.ungraded}: {p.verdict.value} (sign test p = {p.p_value:.3g}{needed})"
    )
