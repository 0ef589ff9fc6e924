"""Is one engine worse than another on the same documents? Paired statistics with a verdict, never a bare delta.

Differences are candidate minus reference, turned so that positive is better. Right/wrong scores use McNemar's exact
test and Tango's score interval (Statistics in Medicine 17, 1998, p. 891), which stays honest with few or no
discordant pairs; other scores use the paired t test and its interval, with the exact sign test beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from trtkit.quality.special import bisect, normal_quantile, sign_test, t_cdf, t_quantile
from trtkit.spec.errors import MeasurementError

ALPHA = 0.05
POWER = 0.8
MIN_DOCUMENTS = 2


class Verdict(str, Enum):
    """What paired data say about a candidate."""

    BETTER = "better"
    SAME = "no detectable change"
    WORSE = "worse"
    UNDECIDED = "undecided"


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedResult:
    """One paired comparison over `n` documents.

    `difference` (positive is better), `low` and `high` (its 95 % interval) are in the score's unit; `wins` and `losses`
    count the documents on which the candidate scored better or worse. `needed` is the number of documents that would
    decide a difference of `margin` with 80 % power, None when the verdict is already there.
    """

    n: int
    difference: float
    low: float
    high: float
    p_value: float
    wins: int
    losses: int
    test: str
    margin: float
    verdict: Verdict
    needed: int | None = None

    @property
    def noise(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


def compare_paired(
    reference: Sequence[float], candidate: Sequence[float], *, margin: float, higher_is_better: bool = True
) -> PairedResult:
    """Compare two engines' scores of the same documents, in the same order.

    `margin` is the smallest change that matters, in the score's unit: an interval inside it means "no detectable
    change", one that is wider and still holds zero means "undecided".

    Raises:
        MeasurementError: fewer than two documents, different lengths, or a score that is not finite.
    """
    _check(reference, candidate, margin)
    sign = 1 if higher_is_better else -1
    differences = [sign * (b - a) for a, b in zip(reference, candidate, strict=True)]
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    n = len(differences)
    if set(reference) | set(candidate) <= {0.0, 1.0}:
        difference = (wins - losses) / n
        low, high = tango_interval(wins, losses, n)
        p_value, test, variance = sign_test(wins, losses), "McNemar, exact", _discordance_variance(wins, losses, n)
    else:
        difference, low, high, p_value, variance = _t_interval(differences)
        test = "paired t"
    verdict = decide(difference, low, high, p_value, margin)
    needed = None if verdict is not Verdict.UNDECIDED else max(n + 1, documents_needed(variance, margin))
    return PairedResult(
        n=n,
        difference=difference,
        low=low,
        high=high,
        p_value=p_value,
        wins=wins,
        losses=losses,
        test=test,
        margin=margin,
        verdict=verdict,
        needed=needed,
    )


def _check(reference: Sequence[float], candidate: Sequence[float], margin: float) -> None:
    if len(reference) != len(candidate):
        raise MeasurementError(f"cannot pair {len(reference)} documents with {len(candidate)}")
    if len(reference) < MIN_DOCUMENTS:
        raise MeasurementError(f"{len(reference)} documents cannot be compared; at least {MIN_DOCUMENTS} are needed")
    if margin <= 0:
        raise MeasurementError(f"the margin is {margin}; it must be positive")
    if not all(math.isfinite(v) for v in (*reference, *candidate)):
        raise MeasurementError("a document's score is not a finite number, so nothing can be said about the engines")


def decide(difference: float, low: float, high: float, p_value: float, margin: float, alpha: float = ALPHA) -> Verdict:
    """The verdict from a difference, its interval and its p-value."""
    if p_value < alpha:
        return Verdict.BETTER if difference > 0 else Verdict.WORSE
    if -margin <= low and high <= margin:
        return Verdict.SAME
    return Verdict.UNDECIDED


def _t_interval(differences: Sequence[float]) -> tuple[float, float, float, float, float]:
    """Mean, 95 % bounds, two-sided p-value and variance of paired differences."""
    n = len(differences)
    mean = math.fsum(differences) / n
    variance = math.fsum((d - mean) ** 2 for d in differences) / (n - 1)
    error = math.sqrt(variance / n)
    if error <= 1e-12 * abs(mean):
        return mean, mean, mean, 1.0 if mean == 0 else 0.0, variance
    half = t_quantile(1 - ALPHA / 2, n - 1) * error
    return mean, mean - half, mean + half, min(1.0, 2 * t_cdf(-abs(mean / error), n - 1)), variance


def tango_interval(wins: int, losses: int, n: int, alpha: float = ALPHA) -> tuple[float, float]:
    """Score interval of a paired difference of proportions, (wins - losses) / n."""
    z = normal_quantile(1 - alpha / 2)

    def score(delta: float) -> float:
        """Decreasing in `delta`; the interval is where it stays within z."""
        b = -wins - losses + (2 * n - wins + losses) * delta
        c = -losses * delta * (1 - delta)
        q = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
        variance = n * (2 * q + delta * (1 - delta))
        distance = wins - losses - n * delta
        if variance <= 0:
            return math.copysign(math.inf, distance) if distance else 0.0
        return distance / math.sqrt(variance)

    difference = (wins - losses) / n
    low = bisect(lambda d: z - score(d), -1.0, difference)
    high = bisect(lambda d: -z - score(d), difference, 1.0)
    return low, high


def _discordance_variance(wins: int, losses: int, n: int) -> float:
    """Variance of one document's difference; half a pair is added so that none seen does not mean none there."""
    rate = (wins + losses + 0.5) / (n + 1)
    return rate - ((wins - losses) / n) ** 2 if rate > ((wins - losses) / n) ** 2 else rate


def documents_needed(variance: float, margin: float) -> int:
    """Documents from which a true difference of `margin` shows with 80 % power at 5 %."""
    z = normal_quantile(1 - ALPHA / 2) + normal_quantile(POWER)
    return max(MIN_DOCUMENTS, math.ceil(z * z * variance / margin**2))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjusted p-values: with 57 subjects, two or three look worse by luck alone."""
    ordered = sorted(p_values, key=lambda key: p_values[key])
    adjusted: dict[str, float] = {}
    floor = 0.0
    for rank, key in enumerate(ordered):
        floor = max(floor, min(1.0, (len(ordered) - rank) * p_values[key]))
        adjusted[key] = floor
    return adjusted
