"""Paired statistics: recomputed with scipy and statsmodels, and the verdicts a reader acts on."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from trtkit.quality.paired import Verdict, compare_paired, documents_needed, holm, tango_interval
from trtkit.spec.errors import MeasurementError


def answers(both: int, wins: int, losses: int, neither: int) -> tuple[list[float], list[float]]:
    """Reference and candidate scores with these counts of agreeing and discordant documents."""
    reference = [1.0] * both + [0.0] * wins + [1.0] * losses + [0.0] * neither
    candidate = [1.0] * both + [1.0] * wins + [0.0] * losses + [0.0] * neither
    return reference, candidate


def test_identical_answers_are_no_detectable_change() -> None:
    result = compare_paired(*answers(150, 0, 0, 50), margin=0.02)
    assert (result.difference, result.p_value, result.verdict) == (0.0, 1.0, Verdict.SAME)
    assert result.low == pytest.approx(-result.high)
    assert result.high == pytest.approx(3.8415 / (200 + 3.8415), rel=1e-4), "no discordant pair seen is not none there"


def test_few_identical_answers_do_not_prove_sameness() -> None:
    result = compare_paired(*answers(10, 0, 0, 10), margin=0.01)
    assert result.verdict is Verdict.UNDECIDED
    assert result.needed is not None
    assert result.needed > 20


def test_many_lost_answers_are_worse() -> None:
    result = compare_paired(*answers(100, 3, 25, 50), margin=0.02)
    assert result.verdict is Verdict.WORSE
    assert result.p_value == pytest.approx(stats.binomtest(3, 28).pvalue)
    assert (result.wins, result.losses, result.n) == (3, 25, 178)
    assert result.difference == pytest.approx(-22 / 178)
    assert result.low < result.difference < result.high < 0


def test_more_lost_answers_are_never_better() -> None:
    differences = [compare_paired(*answers(100, 5, k, 50), margin=0.02).difference for k in range(30)]
    assert differences == sorted(differences, reverse=True)


def test_where_lower_is_better_the_sign_turns() -> None:
    reference, candidate = [2.0, 2.1, 2.2, 2.3], [1.5, 1.61, 1.72, 1.8]
    assert compare_paired(reference, candidate, margin=0.1, higher_is_better=False).verdict is Verdict.BETTER
    assert compare_paired(reference, candidate, margin=0.1).verdict is Verdict.WORSE


def test_continuous_scores_use_the_t_test_that_scipy_computes() -> None:
    rng = np.random.default_rng(3)
    reference = rng.normal(2.0, 1.0, 40)
    candidate = reference + rng.normal(0.1, 0.3, 40)
    result = compare_paired(reference.tolist(), candidate.tolist(), margin=0.5)
    expected = stats.ttest_rel(candidate, reference)
    interval = expected.confidence_interval(0.95)
    assert result.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high), rel=1e-6)


def test_equal_continuous_scores_are_the_same_with_no_noise() -> None:
    result = compare_paired([0.1, 0.7, 0.3], [0.1, 0.7, 0.3], margin=0.01)
    assert (result.verdict, result.noise) == (Verdict.SAME, 0.0)


def test_a_constant_shift_is_decided() -> None:
    result = compare_paired([0.1, 0.7, 0.3], [0.35, 0.95, 0.55], margin=0.01)
    assert result.verdict is Verdict.BETTER


@pytest.mark.parametrize(("wins", "losses", "n"), [(1, 0, 44), (9, 2, 50), (0, 3, 30), (120, 90, 1000), (44, 0, 44)])
def test_tangos_bounds_are_where_his_score_is_critical(wins: int, losses: int, n: int) -> None:
    def score(delta: float) -> float:
        # Restricted maximum likelihood by a fine scan, instead of his closed form.
        q = np.linspace(max(0.0, -delta), (1 - delta) / 1 if delta >= 0 else 1.0, 400_001)[1:-1]
        p = q + delta
        keep = (p > 0) & (p + q < 1)
        q, p = q[keep], p[keep]
        log_likelihood = wins * np.log(p) + losses * np.log(q) + (n - wins - losses) * np.log1p(-(p + q))
        best = q[np.argmax(log_likelihood)]
        return (wins - losses - n * delta) / math.sqrt(n * (2 * best + delta * (1 - delta)))

    low, high = tango_interval(wins, losses, n)
    assert score(low) == pytest.approx(1.96, abs=0.02)
    if high < 1:
        assert score(high) == pytest.approx(-1.96, abs=0.02)


def test_tangos_interval_covers_the_truth_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    truth, n, covered = 0.04 - 0.06, 150, 0
    for wins, losses, _ in rng.multinomial(n, [0.04, 0.06, 0.90], size=600):
        low, high = tango_interval(int(wins), int(losses), n)
        covered += low <= truth <= high
    assert 0.92 <= covered / 600 <= 0.98


def test_the_documents_needed_do_decide() -> None:
    rng = np.random.default_rng(1)
    needed = documents_needed(0.05, 0.02)
    found = 0
    for wins, losses, rest in rng.multinomial(needed, [0.015, 0.035, 0.95], size=200):
        result = compare_paired(*answers(int(rest), int(wins), int(losses), 0), margin=0.02)
        found += result.verdict is Verdict.WORSE
    assert 0.70 <= found / 200 <= 0.92


def test_holm_equals_statsmodels() -> None:
    values = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "e": 0.9}
    expected = multipletests(list(values.values()), method="holm")[1]
    assert list(holm(values).values()) != []
    assert [holm(values)[key] for key in values] == pytest.approx(list(expected))


@pytest.mark.parametrize(
    ("reference", "candidate", "message"),
    [
        ([1.0], [1.0], "1 documents cannot be compared"),
        ([1.0, 0.0], [1.0], "cannot pair 2 documents with 1"),
        ([1.0, math.nan], [1.0, 0.0], "not a finite number"),
    ],
)
def test_what_cannot_be_paired_is_refused(reference: list[float], candidate: list[float], message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        compare_paired(reference, candidate, margin=0.01)
