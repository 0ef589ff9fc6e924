"""Numbers over repeats and percentiles over samples, absent where there are too few to mean anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median, stdev

import numpy as np

from trtkit.spec.metrics import MIN_SAMPLES, PERCENTILES
from trtkit.spec.result import Stat

MIN_REPEATS_FOR_INTERVAL = 3

_T_975 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)
_Z_975 = 1.959964


def t_critical(degrees: int) -> float:
    """Two-sided 95 % point of Student's t: a table up to 30 degrees of freedom, a series in 1/degrees beyond."""
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    z = _Z_975
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def over_repeats(values: Sequence[float]) -> Stat:
    """Median of the repeats with a 95 % t-interval, widened to hold the median; no interval below three.

    Times and rates are positive and err by factors, so the interval is taken of their logarithms: it is positive too.
    Requests of one run share batches, so they are not independent; repeats are, which is why the interval is over
    them.
    """
    centre = float(median(values))
    low = high = None
    if len(values) >= MIN_REPEATS_FOR_INTERVAL:
        positive = min(values) > 0
        scaled = [math.log(value) for value in values] if positive else list(values)
        mean = math.fsum(scaled) / len(scaled)
        half = t_critical(len(values) - 1) * stdev(scaled) / math.sqrt(len(values))
        ends = (mean - half, mean + half)
        below, above = (math.exp(ends[0]), math.exp(ends[1])) if positive else ends
        low, high = min(below, centre), max(above, centre)
    return Stat(value=centre, low=low, high=high, repeats=tuple(float(value) for value in values))


def distribution(samples: np.ndarray) -> dict[str, float]:
    """Mean, minimum, maximum and those percentiles that this many samples can bound; empty for no samples."""
    if samples.size == 0:
        return {}
    stats = {"mean": float(samples.mean()), "min": float(samples.min()), "max": float(samples.max())}
    for name, percent in PERCENTILES.items():
        if samples.size >= MIN_SAMPLES[name]:
            stats[name] = float(np.percentile(samples, percent))
    return stats


def over_distributions(repeats: Sequence[np.ndarray]) -> dict[str, Stat]:
    """Each statistic of each repeat's samples, then over repeats; one that a repeat lacks is absent."""
    each = [distribution(samples) for samples in repeats]
    shared = set.intersection(*(set(stats) for stats in each)) if each else set()
    order = ("mean", *PERCENTILES, "min", "max")
    return {name: over_repeats([stats[name] for stats in each]) for name in order if name in shared}
