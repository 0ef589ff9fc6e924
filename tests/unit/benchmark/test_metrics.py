from __future__ import annotations

from dataclasses import replace

import pytest
from support.samples import repeat, sample

from trtkit.benchmark.metrics import compute_metrics, keeps, steady_window_ns
from trtkit.spec.metrics import METRICS
from trtkit.spec.workload import SLO, Workload

LOAD = Workload(isl=4, osl=4, num_requests=2, concurrency=1)


def value(metrics, key: str, stat: str = "value") -> float:
    return metrics[key].stats[stat].value


def test_every_metric_of_two_hand_made_requests() -> None:
    # 0..16 ms and 20..40 ms, four tokens each.
    run = repeat(sample("a"), sample("b", submit_ms=20, ttft_ms=8, gaps_ms=(2, 4, 6)))
    metrics = compute_metrics([run], replace(LOAD, slo=SLO(ttft_ms=9)))
    assert value(metrics, "ttft_ms", "mean") == 9
    assert value(metrics, "tpot_ms", "max") == 4
    assert value(metrics, "itl_ms", "max") == 6
    assert metrics["itl_ms"].samples == 6
    assert value(metrics, "e2e_ms", "min") == 16
    assert value(metrics, "tps_user", "max") == 500
    assert value(metrics, "tps") == pytest.approx(8 / 0.040)
    assert value(metrics, "total_tps") == pytest.approx(16 / 0.040)
    assert value(metrics, "requests_s") == pytest.approx(2 / 0.040)
    assert value(metrics, "goodput_s") == pytest.approx(1 / 0.040)
    assert value(metrics, "in_flight") == pytest.approx(36 / 40)
    assert set(metrics) == set(METRICS)


def test_units_come_from_the_table_and_everything_is_measured() -> None:
    for key, metric in compute_metrics([repeat(sample())], LOAD).items():
        assert metric.unit == METRICS[key].unit
        assert metric.source.value == "measured"


def test_a_single_output_token_has_no_time_per_token() -> None:
    metrics = compute_metrics([repeat(sample(gaps_ms=()))], replace(LOAD, osl=1))
    assert not {"tpot_ms", "itl_ms", "tps_user"} & set(metrics)
    assert value(metrics, "ttft_ms", "p50") == 10


def test_failed_requests_are_in_no_metric() -> None:
    metrics = compute_metrics([repeat(sample("a"), sample("b", ttft_ms=999, error="refused"))], LOAD)
    assert value(metrics, "ttft_ms", "max") == 10
    assert value(metrics, "tps") == pytest.approx(4 / 0.016)


def test_nothing_completed_gives_nothing_and_no_zero() -> None:
    assert compute_metrics([repeat(sample(error="refused"))], LOAD) == {}
    assert compute_metrics([repeat()], LOAD) == {}


def test_goodput_is_absent_without_limits() -> None:
    assert "goodput_s" not in compute_metrics([repeat(sample())], LOAD)


@pytest.mark.parametrize(
    ("slo", "kept"),
    [
        (SLO(ttft_ms=10), True),
        (SLO(ttft_ms=9.9), False),
        (SLO(tpot_ms=2), True),
        (SLO(tpot_ms=1.9), False),
        (SLO(e2e_ms=16), True),
        (SLO(ttft_ms=10, e2e_ms=15), False),
    ],
)
def test_a_request_is_good_if_it_keeps_every_limit(slo: SLO, kept: bool) -> None:
    assert keeps(sample(), slo) is kept


def test_a_limit_on_what_a_request_has_not_is_not_kept() -> None:
    assert not keeps(sample(gaps_ms=()), SLO(tpot_ms=1000))


def test_repeats_are_kept_and_their_median_leads() -> None:
    runs = [repeat(sample(ttft_ms=t), index=i) for i, t in enumerate((5, 9, 6))]
    stat = compute_metrics(runs, LOAD)["ttft_ms"].stats["p50"]
    assert stat.value == 6
    assert stat.repeats == (5, 9, 6)
    assert stat.low < 6 < stat.high


def test_steady_window_is_from_first_to_last_moment_at_full_concurrency() -> None:
    # a 0..16, b 10..26, c 16..32: two at once from 10 to 26 ms.
    run = repeat(sample("a"), sample("b", submit_ms=10), sample("c", submit_ms=16))
    assert steady_window_ns(run, 2) == (10_000_000, 26_000_000)
    assert steady_window_ns(run, 3) is None
    # Tokens in (10, 26]: a 12 14 16 (its first, at 10, is outside), b 20 22 24 26, c 26.
    metrics = compute_metrics([run], replace(LOAD, concurrency=2))
    assert value(metrics, "tps_window") == pytest.approx(8 / 0.016)


def test_steady_window_is_absent_in_an_open_loop() -> None:
    assert "tps_window" not in compute_metrics([repeat(sample())], replace(LOAD, request_rate=5.0))
