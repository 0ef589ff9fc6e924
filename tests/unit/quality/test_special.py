"""Our distributions against scipy's."""

from __future__ import annotations

import pytest
from scipy import stats
from scipy.special import betainc

from trtkit.quality.special import beta_cdf, normal_quantile, sign_test, t_cdf, t_quantile


@pytest.mark.parametrize(("a", "b"), [(0.5, 0.5), (1, 3), (20, 0.5), (200.5, 0.5), (7000, 7042)])
def test_beta_equals_scipy(a: float, b: float) -> None:
    for x in (0.0, 1e-6, 0.1, 0.4986, 0.7, 0.999999, 1.0):
        assert beta_cdf(a, b, x) == pytest.approx(betainc(a, b, x), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("freedom", [1, 2, 4, 30, 999])
def test_t_equals_scipy(freedom: int) -> None:
    for t in (-4.0, -0.3, 0.0, 1.5, 30.0):
        assert t_cdf(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), rel=1e-8, abs=1e-14)
    for p in (0.001, 0.3, 0.5, 0.9, 0.975):
        assert t_quantile(p, freedom) == pytest.approx(stats.t.ppf(p, freedom), rel=1e-9, abs=1e-12)


def test_normal_quantile_equals_scipy() -> None:
    assert normal_quantile(0.975) == pytest.approx(stats.norm.ppf(0.975))


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (0, 5), (3, 9), (10, 10), (700, 621), (40, 2)])
def test_sign_test_equals_scipy_and_statsmodels(wins: int, losses: int) -> None:
    from statsmodels.stats.contingency_tables import mcnemar

    p = sign_test(wins, losses)
    if wins + losses:
        assert p == pytest.approx(stats.binomtest(wins, wins + losses).pvalue, rel=1e-9)
    assert p == pytest.approx(float(mcnemar([[5, wins], [losses, 5]], exact=True).pvalue) if wins + losses else 1.0)
