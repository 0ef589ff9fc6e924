from __future__ import annotations

import numpy as np
import pytest
from support.fake_engine import VirtualClock

from trtkit.benchmark.load import LoadGenerator, poisson_arrivals_ns
from trtkit.spec.engine import Request


def requests(count: int) -> list[Request]:
    return [Request(request_id=str(i), prompt_ids=(1,), max_tokens=1) for i in range(count)]


def taken(load: LoadGenerator) -> list[str]:
    names = []
    for request in load:
        if request is None:
            break
        names.append(request.request_id)
    return names


def test_closed_loop_hands_out_the_concurrency_and_then_one_for_each_that_ends() -> None:
    clock = VirtualClock()
    load = LoadGenerator(requests(5), concurrency=2, clock=clock, sleep=clock.sleep)
    assert taken(load) == ["0", "1"]
    assert load.seconds_until_next() is None
    load.finished("1")
    assert load.seconds_until_next() == 0
    assert taken(load) == ["2"]


def test_latency_counts_from_when_the_place_was_free_and_not_from_when_the_engine_asked() -> None:
    clock = VirtualClock()
    load = LoadGenerator(requests(2), concurrency=1, clock=clock, sleep=clock.sleep)
    taken(load)
    clock.pass_ns(70)
    load.finished("0")
    clock.pass_ns(1000)
    taken(load)
    assert load.submit_ns["1"] - load.submit_ns["0"] == 70


def test_open_loop_latency_counts_from_the_scheduled_arrival() -> None:
    clock = VirtualClock()
    start = clock()
    load = LoadGenerator(requests(3), arrivals_ns=[0, 10, 500], clock=clock, sleep=clock.sleep)
    assert taken(load) == ["0"]
    clock.pass_ns(100)
    assert taken(load) == ["1"]
    assert load.submit_ns["1"] - start == 10
    assert load.seconds_until_next() == pytest.approx(400e-9)


def test_open_loop_sleeps_only_while_nothing_is_in_flight() -> None:
    clock = VirtualClock()
    load = LoadGenerator(requests(2), arrivals_ns=[0, 5000], clock=clock, sleep=clock.sleep)
    start = clock()
    assert taken(load) == ["0"]
    assert clock() == start
    load.finished("0")
    assert taken(load) == ["1"]
    assert clock() == start + 5000


def test_open_loop_with_a_cap_waits_for_a_place_and_still_counts_from_the_arrival() -> None:
    clock = VirtualClock()
    start = clock()
    load = LoadGenerator(requests(3), concurrency=1, arrivals_ns=[0, 10, 20], clock=clock, sleep=clock.sleep)
    assert taken(load) == ["0"]
    clock.pass_ns(100)
    assert taken(load) == []
    load.finished("0")
    assert taken(load) == ["1"]
    assert load.submit_ns["1"] == start + 10


def test_ends_of_unknown_or_ended_requests_free_no_place() -> None:
    load = LoadGenerator(requests(4), concurrency=1, clock=VirtualClock())
    taken(load)
    load.finished("9")
    load.finished("0")
    load.finished("0")
    assert taken(load) == ["1"]


def test_poisson_arrivals_have_the_rate_and_come_from_the_seed() -> None:
    arrivals = np.array(poisson_arrivals_ns(4000, 50.0, (1, 0)))
    gaps = np.diff(arrivals) / 1e9
    assert arrivals[0] == 0
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.06)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.1)
    assert poisson_arrivals_ns(9, 50.0, (1, 0)) == list(arrivals[:9])
    assert poisson_arrivals_ns(9, 50.0, (1, 1)) != list(arrivals[:9])
