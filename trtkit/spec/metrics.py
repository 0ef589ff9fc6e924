"""Every metric, declared once: console, JSON, CSV, HTML, compare and gate all read this table."""

from __future__ import annotations

from dataclasses import dataclass

HIGHER, LOWER = "higher", "lower"


@dataclass(frozen=True, slots=True)
class MetricDef:
    """One metric: stable key, printed label, unit, formula in words, and which direction is better.

    `distribution` says that a run yields a sample per request (percentiles exist), not one number.
    """

    key: str
    label: str
    unit: str
    better: str
    formula: str
    distribution: bool = False
    digits: int = 1


METRICS: dict[str, MetricDef] = {
    m.key: m
    for m in (
        MetricDef("ttft_ms", "TTFT", "ms", LOWER, "first token - submit", distribution=True),
        MetricDef(
            "tpot_ms",
            "TPOT",
            "ms",
            LOWER,
            "(E2E - TTFT) / (output tokens - 1), per request",
            distribution=True,
            digits=2,
        ),
        MetricDef(
            "itl_ms",
            "ITL",
            "ms",
            LOWER,
            "gaps between successive tokens, pooled over requests",
            distribution=True,
            digits=2,
        ),
        MetricDef("e2e_ms", "E2E", "ms", LOWER, "last token - submit", distribution=True),
        MetricDef("tps", "TPS", "tok/s", HIGHER, "output tokens / (last token - first submit), whole run"),
        MetricDef(
            "tps_window",
            "TPS steady",
            "tok/s",
            HIGHER,
            "output tokens / duration while in-flight requests equal the concurrency",
        ),
        MetricDef("tps_user", "TPS/user", "tok/s", HIGHER, "1000 / TPOT, per request", distribution=True),
        MetricDef("total_tps", "total TPS", "tok/s", HIGHER, "(prompt + output tokens) / (last token - first submit)"),
        MetricDef(
            "requests_s", "requests/s", "1/s", HIGHER, "finished requests / (last token - first submit)", digits=3
        ),
        MetricDef(
            "goodput_s",
            "goodput",
            "1/s",
            HIGHER,
            "requests that keep every SLO / (last token - first submit)",
            digits=3,
        ),
        MetricDef(
            "in_flight", "in flight", "requests", HIGHER, "mean requests between submit and last token", digits=2
        ),
    )
}

PERCENTILES: dict[str, float] = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}
"""Stored percentiles, numpy's linear interpolation."""

MIN_SAMPLES: dict[str, int] = {"p50": 1, "p90": 29, "p95": 59, "p99": 299}
"""Fewest samples from which a one-sided 95 % bound on that percentile exists (n >= ln 0.05 / ln p); fewer: absent."""
