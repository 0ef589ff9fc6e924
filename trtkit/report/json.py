"""The report as JSON: a record file that holds every number any other format shows."""

from __future__ import annotations

from trtkit.report.model import REPORT_KIND, Report
from trtkit.spec.codec import SCHEMA_VERSION, canonical_json, dumps_record


def render(report: Report) -> str:
    """The report in a record's envelope."""
    return dumps_record(REPORT_KIND, report)


def compact(report: Report) -> str:
    """The same record on one line."""
    return canonical_json({"kind": REPORT_KIND, "schema_version": SCHEMA_VERSION, "data": report})
