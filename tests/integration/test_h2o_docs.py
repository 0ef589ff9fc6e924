"""The figures of docs/h2o.md are those of the committed records."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.h2o_cost import KIND as COST_KIND
from bench.h2o_cost import CostRecord
from bench.h2o_quality import BUDGETS, KIND, POLICIES, REGIMES, TEXT_BUDGETS, QualityRecord
from trtkit.spec.codec import read_record

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "h2o.md").read_text(encoding="utf-8")
RESULTS = ROOT / "bench" / "results"


@pytest.fixture(scope="module")
def quality():
    return read_record(max(RESULTS.glob("h2o-quality-*.json")), KIND, QualityRecord)


@pytest.mark.parametrize("policy", list(POLICIES))
def test_a_policys_row_is_the_records(quality, policy):
    value = {(c.task, c.budget, c.interval): c.value for c in quality.cells if c.policy == policy}
    figures = [value[f"recall, {regime}", budget, 1] for regime in REGIMES for budget in BUDGETS]
    figures += [value["text", budget, 8] for budget in TEXT_BUDGETS]
    assert f"| {policy} | {' | '.join(f'{figure:.3f}' for figure in figures)} |" in PAGE


def test_the_recorded_margins_are_those_the_policies_must_win_by(quality):
    value = {
        c.policy: c.value for c in quality.cells if (c.task, c.budget, c.interval) == ("recall, after questions", 48, 1)
    }
    assert value["H2O mean"] - value["sinks + window"] >= 0.5
    assert value["H2O mean"] - value["random"] >= 0.4


def test_the_costs_are_the_records():
    record = read_record(max(RESULTS.glob("h2o-cost-*.json")), COST_KIND, CostRecord)
    for step in record.steps:
        assert f"| {step.median_ms:.2f} |" in PAGE
        assert f"{step.kv_bytes / 2**20:.1f} MiB" in PAGE
    assert f"{100 * record.steps[0].eviction_share:.1f} %" in PAGE
    assert f"({record.concurrency_gain:.2f}x)" in PAGE
    for side in record.pressure:
        assert f"{side.useful_tok_s:.0f}" in PAGE
