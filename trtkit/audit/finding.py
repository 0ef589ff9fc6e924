"""What an audit says about one row."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Verdict on one row. `limit` is in `unit`; `share_of_limit` above 1 is impossible; None where there is none."""

    row: int
    name: str
    metric: str
    verdict: str
    share_of_limit: float | None
    limit: float | None
    unit: str
    claimed: float | None
    arithmetic: str
