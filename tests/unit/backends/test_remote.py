"""`RemoteEngine` over real child processes that open the scripted engine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from support.fake_engine import FakeEngine, FakeScript, fake_bundle

from trtkit.backends import remote as remote_module
from trtkit.backends.remote import RemoteEngine, Timeouts
from trtkit.spec.engine import Engine, FinishReason, Request, Sampling, Scorer, ScoreRequest
from trtkit.spec.errors import CapacityError, EngineError
from trtkit.spec.kv import parse_kv_policy

TESTS = Path(__file__).parents[2]
FAST = {"prefill_ns_per_token": 0, "step_ns": 100_000}


@pytest.fixture(autouse=True)
def _child_finds_the_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))


def remote(tmp_path: Path, *, timeouts: Timeouts | None = None, log_path: Path | None = None, **script: object):
    path = fake_bundle(tmp_path, script=FakeScript(**{**FAST, **script}))
    return RemoteEngine(path, opener="support.fake_engine:open_fake", timeouts=timeouts, log_path=log_path)


def request(name: str, *, prompt: int = 4, tokens: int = 3) -> Request:
    return Request(request_id=name, prompt_ids=tuple(range(prompt)), max_tokens=tokens)


def test_remote_engine_gives_the_tokens_of_the_engine_inside(tmp_path: Path) -> None:
    requests = [request("a"), request("b", prompt=7, tokens=5)]
    with remote(tmp_path) as engine:
        assert isinstance(engine, Engine)
        assert isinstance(engine, Scorer)
        ours = {(e.request_id, e.index): (e.token_id, e.finish) for e in engine.generate(requests)}
    direct = {(e.request_id, e.index): (e.token_id, e.finish) for e in FakeEngine().generate(requests)}
    assert ours == direct


def test_event_times_are_this_process_clock_and_in_order(tmp_path: Path) -> None:
    with remote(tmp_path) as engine:
        before_ns = time.monotonic_ns()
        times = [e.time_ns for e in engine.generate([request("a"), request("b")])]
        after_ns = time.monotonic_ns()
    assert times == sorted(times)
    assert before_ns < times[0]
    assert times[-1] < after_ns


def test_one_process_serves_several_calls_and_peaks_belong_to_the_latest(tmp_path: Path) -> None:
    with remote(tmp_path, together=(8,)) as engine:
        list(engine.generate([request(f"big{i}", prompt=64, tokens=40) for i in range(8)]))
        big = engine.kv_stats()
        list(engine.generate([request("small", tokens=40)]))
        small = engine.kv_stats()
        list(engine.generate([request(f"again{i}") for i in range(3)]))
    assert big.blocks_peak == 8 * 7
    assert big.requests_peak == 8
    assert 1 <= small.blocks_peak <= 3
    assert small.requests_peak == 1


def test_the_iterable_is_polled_so_that_a_request_can_wait_for_another_to_end(tmp_path: Path) -> None:
    finished: list[str] = []

    def one_at_a_time() -> Iterator[Request | None]:
        for name in ("a", "b", "c"):
            yield request(name)
            while name not in finished:
                yield None

    running_at_once = []
    with remote(tmp_path) as engine:
        for event in engine.generate(one_at_a_time()):
            running_at_once.append(event.request_id)
            if event.finish:
                finished.append(event.request_id)
    assert running_at_once == ["a"] * 3 + ["b"] * 3 + ["c"] * 3


def test_more_requests_than_fit_the_window_all_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtkit.backends.feed.PREFETCH_REQUESTS", 3)
    with remote(tmp_path, step_ns=1000) as engine:
        finished = [e.request_id for e in engine.generate(request(f"r{i}", tokens=1) for i in range(50)) if e.finish]
    assert sorted(finished) == sorted(f"r{i}" for i in range(50))


def test_cancel_ends_a_running_request(tmp_path: Path) -> None:
    with remote(tmp_path, step_ns=1_000_000) as engine:
        events = []
        for event in engine.generate([request("long", tokens=100_000), request("short")]):
            events.append(event)
            if event.request_id == "short" and event.finish:
                engine.cancel("long")
    assert events[-1].request_id == "long"
    assert events[-1].finish is FinishReason.CANCELLED


def test_leaving_early_frees_the_engine_for_the_next_call(tmp_path: Path) -> None:
    with remote(tmp_path, step_ns=1_000_000) as engine:
        for event in engine.generate([request("endless", tokens=100_000), request("other", tokens=100_000)]):
            if event.index == 3:
                break
        assert [e.request_id for e in engine.generate([request("next", tokens=2)])] == ["next", "next"]


def test_an_error_of_the_callers_iterable_reaches_the_caller_and_the_engine_survives(tmp_path: Path) -> None:
    def broken() -> Iterator[Request]:
        yield request("a", tokens=1000)
        raise KeyError("the caller's own mistake")

    with remote(tmp_path) as engine:
        with pytest.raises(KeyError, match="own mistake"):
            list(engine.generate(broken()))
        assert len(list(engine.generate([request("b")]))) == 3


def test_two_calls_at_once_are_refused(tmp_path: Path) -> None:
    with remote(tmp_path) as engine:
        first = engine.generate([request("a", tokens=100)])
        next(first)
        with pytest.raises(EngineError, match="already running a call"):
            next(engine.generate([request("b")]))
        first.close()


def test_kv_stats_can_be_read_during_a_call(tmp_path: Path) -> None:
    with remote(tmp_path, step_ns=1_000_000) as engine:
        for event in engine.generate([request("a", prompt=32, tokens=100_000)]):
            if event.index == 5:
                assert engine.kv_stats().requests_running == 1
                engine.cancel("a")
        assert engine.kv_stats().requests_running == 0


def test_error_of_the_opener_keeps_its_class_and_line(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match=r"does not fit by 3\.00 GiB"):
        remote(tmp_path, refuse_at_open=True)


def test_error_inside_generate_keeps_its_class_and_the_process_lives(tmp_path: Path) -> None:
    with remote(tmp_path, raise_at_token=2) as engine:
        with pytest.raises(CapacityError, match="ran out of blocks"):
            list(engine.generate([request("a")]))
        assert engine.kv_stats().blocks_total == 4096


def test_death_of_the_process_is_one_line_with_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    engine = remote(tmp_path, die_at_token=4, log_path=log)
    with pytest.raises(
        EngineError, match=r"ended with exit code 3; its log \(.*engine\.log\) ends: .*something terrible"
    ):
        list(engine.generate([request("a", tokens=10)]))
    with pytest.raises(EngineError, match="exit code 3"):
        engine.kv_stats()
    engine.close()
    assert "something terrible" in log.read_text()


def test_a_killed_process_is_named_by_its_signal(tmp_path: Path) -> None:
    engine = remote(tmp_path)
    stream = engine.generate([request("a", tokens=10_000_000)])
    next(stream)
    os.kill(engine.info.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="SIGKILL"):
        list(stream)
    engine.close()


def test_a_crash_without_message_shows_the_exception(tmp_path: Path) -> None:
    path = fake_bundle(tmp_path)
    (path / "fake.json").write_text("{")
    with pytest.raises(EngineError, match="JSONDecodeError"):
        RemoteEngine(path, opener="support.fake_engine:open_fake")


def test_an_engine_that_never_opens_is_ended(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"has not opened within 0\.5 s and was ended"):
        remote(tmp_path, hang_at_open=True, timeouts=Timeouts(start_s=0.5))


def test_an_engine_that_falls_silent_is_ended(tmp_path: Path) -> None:
    engine = remote(tmp_path, hang_at_token=2, timeouts=Timeouts(stall_s=0.4))
    with pytest.raises(EngineError, match=r"said nothing for 0\.4 s"):
        list(engine.generate([request("a")]))
    assert not psutil.pid_exists(engine.info.pid)
    engine.close()


def test_waiting_for_an_arrival_is_not_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr("trtkit.backends.feed.time", SimpleNamespace(monotonic=lambda: now_s[0]))

    def late() -> Iterator[Request | None]:
        for _ in range(20):
            now_s[0] += 50
            yield None
        yield request("late")

    with remote(tmp_path, timeouts=Timeouts(stall_s=100)) as engine:
        assert len(list(engine.generate(late()))) == 3
    assert now_s[0] == 1000


def test_close_ends_the_process_and_may_be_called_twice(tmp_path: Path) -> None:
    engine = remote(tmp_path)
    log = engine.log_path
    engine.close()
    engine.close()
    assert not psutil.pid_exists(engine.info.pid)
    assert not log.exists()
    with pytest.raises(EngineError, match="closed"):
        list(engine.generate([request("a")]))


def test_a_process_that_will_not_close_is_killed(tmp_path: Path) -> None:
    engine = remote(tmp_path, hang_at_token=1, timeouts=Timeouts(close_s=0.3))
    stream = engine.generate([request("a")])
    engine._send({"op": "generate", "call": 1})
    engine._send({"op": "request", "call": 1, "request": {"id": "x"}})
    engine.close()
    stream.close()
    assert not psutil.pid_exists(engine.info.pid)


def test_what_libraries_print_goes_to_the_log_and_not_into_the_protocol(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    with remote(tmp_path, noisy=True, log_path=log) as engine:
        assert len(list(engine.generate([request("a")]))) == 3
    assert log.read_text().count("a library chats") == 3


def test_scores_travel_both_ways_even_if_every_request_is_taken_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trtkit.backends.feed.PREFETCH_REQUESTS", 2)
    requests = [
        ScoreRequest(
            request_id=f"s{i}",
            context_ids=(1, 2, 3),
            continuations=((1, 2), (i,)),
            chunk_ends=(1, 2),
            top_logprobs=1,
            kv=parse_kv_policy("h2o:8"),
        )
        for i in range(9)
    ]
    with remote(tmp_path) as engine:
        assert list(engine.score(requests)) == list(FakeEngine().score(requests))


def test_sampling_stops_and_policy_of_a_request_arrive(tmp_path: Path) -> None:
    from trtkit.backends import wire

    full = Request(
        request_id="ü",
        prompt_ids=(1, 2),
        max_tokens=4,
        sampling=Sampling(temperature=0.5, top_k=3, top_p=0.9, seed=7),
        stop_ids=(5,),
        ignore_eos=True,
        kv=parse_kv_policy("h2o:50%,sinks=4"),
    )
    import json

    assert wire.unpack_request(json.loads(wire.dump(wire.pack_request(full)))) == full


def test_an_override_that_is_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be sent"):
        RemoteEngine(fake_bundle(tmp_path), {"device": object()}, opener="support.fake_engine:open_fake")


def test_child_dies_when_its_parent_is_killed(tmp_path: Path) -> None:
    path = fake_bundle(tmp_path, script=FakeScript(step_ns=10_000_000))
    code = (
        "import sys; from pathlib import Path; from trtkit.backends.remote import RemoteEngine\n"
        "from trtkit.spec.engine import Request\n"
        f"engine = RemoteEngine(Path({str(path)!r}), opener='support.fake_engine:open_fake')\n"
        "for event in engine.generate([Request(request_id='a', prompt_ids=(1,), max_tokens=100000)]):\n"
        "    print(engine.info.pid, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 60
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_the_line_that_names_the_error_is_told_though_cuda_adds_many_after_it(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_text(
        "loading\nTraceback (most recent call last):\n  File x\ntorch.AcceleratorError: CUDA error: illegal address\n"
        "Search for it in the documentation.\nErrors may be reported later.\n\nPass CUDA_LAUNCH_BLOCKING=1.\nCompile DSA.\n",
        encoding="utf-8",
    )
    told = remote_module._tail(log)
    assert told[0] == "torch.AcceleratorError: CUDA error: illegal address"
    assert len(told) == 3
    log.write_text("one\ntwo\nValueError: three\n", encoding="utf-8")
    assert remote_module._tail(log) == ["one", "two", "ValueError: three"]
    log.write_text("ValueError: one\ntwo\n", encoding="utf-8")
    assert remote_module._tail(log) == ["ValueError: one", "two"]
    log.write_text("one\n", encoding="utf-8")
    assert remote_module._tail(log) == ["one"]
