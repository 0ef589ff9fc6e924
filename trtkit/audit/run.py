"""Audit a file of claims: every row gets a verdict, with the arithmetic in one line."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from trtkit.audit.claims import BASE_UNIT, Claim, claim_from
from trtkit.audit.cross import contradictions
from trtkit.audit.finding import Finding
from trtkit.audit.foreign import foreign_rows
from trtkit.audit.physics import IMPOSSIBLE, INCONSISTENT, UNREADABLE, limit_of, verdict_of
from trtkit.audit.records import audit_quality, audit_record
from trtkit.audit.tables import csv_rows, markdown_rows
from trtkit.plan.calibration import load_calibration
from trtkit.spec.codec import from_plain
from trtkit.spec.errors import InputError
from trtkit.spec.result import BENCH_KIND, QUALITY_KIND, BenchResult, QualityResult

_PACKAGE = Path(__file__).parents[1]
_EXAMPLES = (_PACKAGE / "data" / "docs" / "examples", _PACKAGE.parent / "docs" / "examples")


def shipped_example(path: Path) -> Path:
    """`examples/NAME` is the shipped example of that name, unless such a file exists here; any other path is itself."""
    if path.parent == Path("examples") and not path.exists():
        return next((folder / path.name for folder in _EXAMPLES if (folder / path.name).is_file()), path)
    return path


def audit_file(
    path: Path, *, defaults: Mapping[str, str] | None = None, catalogs: Sequence[Path] = ()
) -> tuple[Finding, ...]:
    """Audit a CSV or Markdown table, a trtkit record, or another tool's JSON. `defaults` fill empty cells.

    Raises:
        InputError: the file cannot be read or holds no claims; a wrong row is a finding, not an error.
    """
    path = shipped_example(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    if path.suffix.lower() == ".json" or text.lstrip().startswith("{"):
        return _audit_json(text, path.name, dict(defaults or {}), catalogs)
    markdown = path.suffix.lower() in (".md", ".markdown") or text.lstrip().startswith("|")
    rows = markdown_rows(text, path.name) if markdown else csv_rows(text, path.name)
    return audit_rows(rows, defaults=defaults, catalogs=catalogs)


def audit_rows(
    rows: Sequence[Mapping[str, str]],
    *,
    defaults: Mapping[str, str] | None = None,
    catalogs: Sequence[Path] = (),
) -> tuple[Finding, ...]:
    """One finding per row, in order: first each claim by itself, then against the others."""
    findings: dict[int, Finding] = {}
    claims: list[Claim] = []
    highest = dict(load_calibration().highest_shares)
    for number, row in enumerate(rows, 1):
        filled = {**row, **{key: value for key, value in (defaults or {}).items() if not row.get(key, "").strip()}}
        try:
            claim = claim_from(filled, number, catalogs=catalogs)
            findings[number] = _finding(claim, highest)
            claims.append(claim)
        except InputError as error:
            findings[number] = _unreadable(number, row, str(error))
    for found in contradictions(claims):
        finding = findings[found.row]
        verdict = IMPOSSIBLE if finding.verdict == IMPOSSIBLE else INCONSISTENT
        findings[found.row] = replace(finding, verdict=verdict, arithmetic=f"{finding.arithmetic}; {found.arithmetic}")
    return tuple(findings[number] for number in sorted(findings))


def _finding(claim: Claim, highest: dict[str, float]) -> Finding:
    limit = limit_of(claim)
    verdict = verdict_of(claim, limit, highest)
    arithmetic = limit.arithmetic
    if verdict == "implausible" and limit.share is not None:
        arithmetic += f" ({limit.share:.0%} of the limit, more than was ever measured)"
    return Finding(
        row=claim.row,
        name=claim.name,
        metric=claim.metric,
        verdict=verdict,
        share_of_limit=limit.share,
        limit=limit.limit,
        unit=BASE_UNIT[claim.kind],
        claimed=claim.value,
        arithmetic=arithmetic,
    )


def _unreadable(number: int, row: Mapping[str, str], why: str) -> Finding:
    return Finding(
        row=number,
        name=(row.get("name") or "").strip() or f"row {number}",
        metric=(row.get("metric") or "").strip(),
        verdict=UNREADABLE,
        share_of_limit=None,
        limit=None,
        unit="",
        claimed=None,
        arithmetic=why,
    )


def _audit_json(text: str, name: str, defaults: Mapping[str, str], catalogs: Sequence[Path]) -> tuple[Finding, ...]:
    try:
        body = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{name}: not JSON: {error}") from None
    if isinstance(body, dict) and body.get("kind") == BENCH_KIND:
        return audit_record(from_plain(BenchResult, body.get("data"), name))
    if isinstance(body, dict) and body.get("kind") == QUALITY_KIND:
        return audit_quality(from_plain(QualityResult, body.get("data"), name))
    if isinstance(body, list):
        if not all(isinstance(row, dict) for row in body):
            raise InputError(f"{name}: a list of claims must hold objects")
        rows = [{key: "" if value is None else str(value) for key, value in row.items()} for row in body]
        return audit_rows(rows, defaults=defaults, catalogs=catalogs)
    if not isinstance(body, dict):
        raise InputError(f"{name}: neither a result nor a list of claims")
    _, rows = foreign_rows(body, name, defaults)
    return audit_rows(rows, defaults=defaults, catalogs=catalogs)


def findings_text(findings: Sequence[Finding]) -> str:
    """One line per row, verdict first, and a count at the end."""
    width = max((len(finding.name) for finding in findings), default=0)
    lines = []
    for finding in findings:
        share = "" if finding.share_of_limit is None else f"{finding.share_of_limit:.2f}"
        lines.append(f"{finding.verdict:<12} {share:>6}  {finding.name:<{width}}  {finding.arithmetic}")
    counts = Counter(finding.verdict for finding in findings)
    total = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    return "\n".join([*lines, f"{len(findings)} rows: {total}" if findings else "no claims"])
