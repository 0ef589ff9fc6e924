"""Every metric of `spec/metrics.py`, computed from raw samples. What cannot be known is absent, never 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from trtkit.benchmark.stats import over_distributions, over_repeats
from trtkit.spec.measured import Source
from trtkit.spec.metrics import METRICS
from trtkit.spec.result import MetricResult, Repeat, RequestSample
from trtkit.spec.units import MS_PER_S, NS_PER_MS, NS_PER_S
from trtkit.spec.workload import SLO, Workload


def completed(samples: Sequence[RequestSample]) -> list[RequestSample]:
    """Requests that ended as they should and gave at least one token."""
    return [s for s in samples if s.error is None and s.first_token_ns is not None and s.last_token_ns is not None]


def ttft_ms(sample: RequestSample) -> float | None:
    """First token minus submit."""
    return None if sample.first_token_ns is None else (sample.first_token_ns - sample.submit_ns) / NS_PER_MS


def e2e_ms(sample: RequestSample) -> float | None:
    """Last token minus submit."""
    return None if sample.last_token_ns is None else (sample.last_token_ns - sample.submit_ns) / NS_PER_MS


def tpot_ms(sample: RequestSample) -> float | None:
    """Time per output token after the first; a single token has none."""
    if sample.first_token_ns is None or sample.last_token_ns is None or sample.output_tokens < 2:
        return None
    return (sample.last_token_ns - sample.first_token_ns) / NS_PER_MS / (sample.output_tokens - 1)


def tps_user(sample: RequestSample) -> float | None:
    """Tokens per second one user sees once the first has come."""
    tpot = tpot_ms(sample)
    return MS_PER_S / tpot if tpot else None


def span_s(repeat: Repeat) -> float | None:
    """First submit to last token, over completed requests."""
    done = completed(repeat.samples)
    if not done:
        return None
    span_ns = max(s.last_token_ns or 0 for s in done) - min(s.submit_ns for s in done)
    return span_ns / NS_PER_S if span_ns > 0 else None


def keeps(sample: RequestSample, slo: SLO) -> bool:
    """Whether a request keeps every limit; one that has no value for a limited metric does not."""
    for limit, value in ((slo.ttft_ms, ttft_ms(sample)), (slo.tpot_ms, tpot_ms(sample)), (slo.e2e_ms, e2e_ms(sample))):
        if limit is not None and (value is None or value > limit):
            return False
    return True


def token_times_ns(sample: RequestSample) -> np.ndarray:
    """When each token of a completed request came, int64 [output_tokens]."""
    return (sample.first_token_ns or 0) + np.concatenate(([0], np.cumsum(sample.gaps_ns, dtype=np.int64)))


def steady_window_ns(repeat: Repeat, concurrency: int) -> tuple[int, int] | None:
    """From the first to the last moment with `concurrency` requests in flight; None if that never happened."""
    changes = sorted(
        change for s in completed(repeat.samples) for change in ((s.submit_ns, 1), (s.last_token_ns or 0, -1))
    )
    in_flight, start, end = 0, None, None
    for time_ns, change in changes:
        if in_flight == concurrency:
            end = time_ns
        in_flight += change
        if in_flight == concurrency and start is None:
            start = time_ns
    return (start, end) if start is not None and end is not None and end > start else None


def _tps_window(repeat: Repeat, workload: Workload) -> float | None:
    if workload.concurrency is None or workload.request_rate is not None:
        return None
    window = steady_window_ns(repeat, workload.concurrency)
    if window is None:
        return None
    start, end = window
    times = np.concatenate([token_times_ns(s) for s in completed(repeat.samples)])
    return float(((times > start) & (times <= end)).sum()) / ((end - start) / NS_PER_S)


def _rate(amount: Callable[[RequestSample], float]) -> Callable[[Repeat, Workload], float | None]:
    def rate(repeat: Repeat, _workload: Workload) -> float | None:
        seconds = span_s(repeat)
        return None if seconds is None else sum(amount(s) for s in completed(repeat.samples)) / seconds

    return rate


def _goodput(repeat: Repeat, workload: Workload) -> float | None:
    if workload.slo == SLO():
        return None
    return _rate(lambda s: keeps(s, workload.slo))(repeat, workload)


def _in_flight(repeat: Repeat, _workload: Workload) -> float | None:
    """Time average of requests between submit and last token, by adding up what each was there."""
    seconds = span_s(repeat)
    present = sum(e2e_ms(s) or 0.0 for s in completed(repeat.samples))
    return None if seconds is None else present / MS_PER_S / seconds


_PER_REQUEST: dict[str, Callable[[RequestSample], float | None]] = {
    "ttft_ms": ttft_ms,
    "tpot_ms": tpot_ms,
    "e2e_ms": e2e_ms,
    "tps_user": tps_user,
}
_PER_RUN: dict[str, Callable[[Repeat, Workload], float | None]] = {
    "tps": _rate(lambda s: s.output_tokens),
    "tps_window": _tps_window,
    "total_tps": _rate(lambda s: s.prompt_tokens + s.output_tokens),
    "requests_s": _rate(lambda _: 1),
    "goodput_s": _goodput,
    "in_flight": _in_flight,
}


def samples_of(key: str, repeat: Repeat) -> np.ndarray:
    """One repeat's samples of a distribution metric, float64."""
    done = completed(repeat.samples)
    if key == "itl_ms":
        gaps = [np.asarray(s.gaps_ns, dtype=np.float64) / NS_PER_MS for s in done]
        return np.concatenate(gaps) if gaps else np.empty(0)
    return np.array([value for s in done if (value := _PER_REQUEST[key](s)) is not None], dtype=np.float64)


def compute_metrics(repeats: Sequence[Repeat], workload: Workload) -> Mapping[str, MetricResult]:
    """Every metric that these repeats can give, keyed as in `METRICS`."""
    results = {}
    for key, definition in METRICS.items():
        if definition.distribution:
            arrays = [samples_of(key, repeat) for repeat in repeats]
            stats = over_distributions(arrays)
            samples = sum(array.size for array in arrays)
        else:
            values = [_PER_RUN[key](repeat, workload) for repeat in repeats]
            known = [value for value in values if value is not None]
            stats = {"value": over_repeats(known)} if known else {}
            samples = len(known)
        if stats:
            results[key] = MetricResult(unit=definition.unit, source=Source.MEASURED, samples=samples, stats=stats)
    return results
