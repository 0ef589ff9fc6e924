from __future__ import annotations

import numpy as np
import pytest
from scipy import stats as scipy_stats

from trtkit.benchmark.stats import distribution, over_distributions, over_repeats, t_critical


@pytest.mark.parametrize("degrees", [1, 2, 5, 30, 31, 60, 400])
def test_critical_values_are_students(degrees: int) -> None:
    assert t_critical(degrees) == pytest.approx(scipy_stats.t.ppf(0.975, degrees), rel=1e-4)


def test_two_repeats_have_a_median_and_no_interval() -> None:
    stat = over_repeats([1.0, 3.0])
    assert (stat.value, stat.low, stat.high, stat.repeats) == (2.0, None, None, (1.0, 3.0))


def test_interval_of_three_repeats_is_students_on_the_logarithms() -> None:
    values = [10.0, 11.0, 13.0]
    logs = np.log(values)
    low, high = scipy_stats.t.interval(0.95, 2, loc=logs.mean(), scale=logs.std(ddof=1) / np.sqrt(3))
    stat = over_repeats(values)
    assert stat.value == 11.0
    assert (stat.low, stat.high) == pytest.approx((np.exp(low), np.exp(high)), rel=1e-4)


def test_interval_of_wild_rates_stays_positive() -> None:
    assert over_repeats([58.0, 239.0, 149.0]).low > 0


def test_interval_holds_the_median_even_if_the_mean_is_far_from_it() -> None:
    stat = over_repeats([1.0] * 20 + [1000.0] * 19)
    assert stat.low <= stat.value <= stat.high


def test_values_with_a_zero_still_get_an_interval() -> None:
    stat = over_repeats([0.0, 1.0, 2.0])
    assert stat.low < stat.value < stat.high


def test_percentiles_are_numpys_and_absent_when_samples_are_too_few() -> None:
    assert set(distribution(np.arange(28.0))) == {"mean", "min", "max", "p50"}
    assert set(distribution(np.arange(29.0))) == {"mean", "min", "max", "p50", "p90"}
    assert "p99" not in distribution(np.arange(298.0))
    full = distribution(np.arange(299.0))
    assert full["p99"] == np.percentile(np.arange(299.0), 99)
    assert full["p95"] == np.percentile(np.arange(299.0), 95)


def test_no_samples_have_no_statistics() -> None:
    assert distribution(np.empty(0)) == {}
    assert over_distributions([]) == {}


def test_a_statistic_that_one_repeat_lacks_is_absent() -> None:
    stats = over_distributions([np.arange(40.0), np.arange(10.0)])
    assert "p90" not in stats
    assert stats["p50"].repeats == (19.5, 4.5)
