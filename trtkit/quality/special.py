"""The three distributions that paired statistics need, in plain Python (scipy is a test dependency only)."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

_TINY = 1e-300
_MAX_ITERATIONS = 300
_BISECTIONS = 200


def normal_quantile(probability: float) -> float:
    """Quantile of the standard normal distribution."""
    return NormalDist().inv_cdf(probability)


def beta_cdf(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function I_x(a, b), by the continued fraction of Abramowitz and Stegun 26.5.8."""
    if x <= 0:
        return 0.0
    if x >= 1:
        return 1.0
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    if x < (a + 1) / (a + b + 2):
        return front * _beta_fraction(a, b, x) / a
    return 1 - front * _beta_fraction(b, a, 1 - x) / b


def _beta_fraction(a: float, b: float, x: float) -> float:
    """Lentz's evaluation of the fraction; converges fast for x below (a + 1) / (a + b + 2)."""
    c, d = 1.0, 1 - (a + b) * x / (a + 1)
    d = 1 / (d if abs(d) > _TINY else _TINY)
    value = d
    for m in range(1, _MAX_ITERATIONS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        change = 1.0
        for numerator in (even, odd):
            d = 1 + numerator * d
            c = 1 + numerator / c
            d = 1 / (d if abs(d) > _TINY else _TINY)
            c = c if abs(c) > _TINY else _TINY
            change = c * d
            value *= change
        if abs(change - 1) < 1e-15:
            break
    return value


def t_cdf(t: float, freedom: float) -> float:
    """Student's t distribution."""
    tail = beta_cdf(freedom / 2, 0.5, freedom / (freedom + t * t)) / 2
    return 1 - tail if t > 0 else tail


def t_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t."""
    if probability == 0.5:
        return 0.0
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    high = 1.0
    while t_cdf(high, freedom) < probability:
        high *= 2
    return bisect(lambda t: t_cdf(t, freedom) - probability, 0.0, high)


def bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """The root of an increasing function between `low` and `high`."""
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if function(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact binomial p-value of `wins` against `losses` at one half; 1.0 with no discordant pair.

    With wins and losses counted over paired right/wrong answers this is McNemar's exact test.
    """
    n = wins + losses
    if n == 0:
        return 1.0
    log_half = -n * math.log(2)
    log_total = math.lgamma(n + 1)
    tail = sum(
        math.exp(log_total - math.lgamma(k + 1) - math.lgamma(n - k + 1) + log_half)
        for k in range(min(wins, losses) + 1)
    )
    return min(1.0, 2 * tail)
