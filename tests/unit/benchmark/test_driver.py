from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
from support.fake_engine import FakeEngine, FakeScript

from trtkit.benchmark.driver import Timing, run_repeat, since
from trtkit.benchmark.metrics import compute_metrics
from trtkit.spec.engine import KVStats, Request, TokenEvent
from trtkit.spec.workload import Workload

STEP_MS, PREFILL_MS = 1.0, 0.1


def requests(count: int, *, prompt: int = 100, tokens: int = 5) -> list[Request]:
    return [Request(request_id=f"r{i}", prompt_ids=tuple(range(prompt)), max_tokens=tokens) for i in range(count)]


def drive(engine: FakeEngine, workload: Workload, batch: list[Request] | None = None):
    timing = Timing(clock=engine.clock, sleep=engine.clock.sleep)
    return run_repeat(engine, batch or requests(workload.num_requests), workload, timing=timing)


def load(**changes: object) -> Workload:
    return Workload(**{"isl": 100, "osl": 5, "num_requests": 3, "concurrency": 1, **changes})


def test_times_of_one_request_after_another_are_exact() -> None:
    repeat = drive(FakeEngine(), load())
    for number, sample in enumerate(repeat.samples):
        start = number * 5_100_000
        assert sample.submit_ns == start
        assert sample.first_token_ns == start + 1_100_000
        assert sample.gaps_ns == (1_000_000,) * 4
        assert sample.last_token_ns == start + 5_100_000
        assert (sample.prompt_tokens, sample.output_tokens, sample.finish, sample.error) == (100, 5, "length", None)
    assert repeat.duration_ns == 3 * 5_100_000


def test_throughput_of_a_full_batch_is_exact() -> None:
    # Four prompts of 100 us each, then five steps of 1 ms for all four.
    repeat = drive(FakeEngine(), load(num_requests=4, concurrency=4))
    metrics = compute_metrics([repeat], load(num_requests=4, concurrency=4))
    assert metrics["tps"].stats["value"].value == pytest.approx(20 / 5.4e-3)
    assert metrics["tpot_ms"].stats["p50"].value == 1.0
    assert metrics["in_flight"].stats["value"].value == 4.0


def test_waiting_for_the_engines_batch_counts_as_latency() -> None:
    repeat = drive(FakeEngine(FakeScript(max_batch_size=1)), load(num_requests=2, concurrency=2))
    assert [s.submit_ns for s in repeat.samples] == [0, 0]
    assert repeat.samples[1].first_token_ns == 5_100_000 + 1_100_000


def test_open_loop_counts_from_the_arrival() -> None:
    repeat = drive(FakeEngine(FakeScript(max_batch_size=1)), load(concurrency=None, request_rate=1e6))
    assert repeat.samples[2].first_token_ns == 2 * 5_100_000 + 1_100_000
    assert repeat.samples[2].submit_ns < 100_000


def test_refused_requests_are_recorded_with_their_reason_and_free_their_place() -> None:
    repeat = drive(FakeEngine(FakeScript(failing_ids=("r0",))), load())
    assert [s.error for s in repeat.samples] == ["refused by the script", None, None]
    assert repeat.samples[0].first_token_ns is None


def test_counters_of_the_pool_cover_the_repeat_alone() -> None:
    engine = FakeEngine(FakeScript(kv="h2o"))
    first, second = drive(engine, load()), drive(engine, load())
    assert first.kv.evictions == second.kv.evictions > 0
    assert first.kv.tokens_evicted == second.kv.tokens_evicted > 0
    assert engine.kv_stats().tokens_evicted == 2 * first.kv.tokens_evicted


def test_a_counter_the_runtime_does_not_tell_stays_unknown() -> None:
    pool = {"tokens_per_block": 4, "block_bytes": 1, "blocks_total": 9, "blocks_used": 0, "blocks_peak": 0}
    before = KVStats(**pool, evictions=None, preemptions=1)
    grown = since(before, KVStats(**pool, evictions=5, preemptions=3))
    assert (grown.evictions, grown.preemptions) == (None, 2)


def test_reused_tokens_are_those_of_the_repeat_and_cached_blocks_those_at_its_end() -> None:
    pool = {"tokens_per_block": 4, "block_bytes": 1, "blocks_total": 9, "blocks_used": 0, "blocks_peak": 0}
    before = KVStats(**pool, prompt_tokens_reused=40, blocks_cached=3)
    grown = since(before, KVStats(**pool, prompt_tokens_reused=100, blocks_cached=7))
    assert (grown.prompt_tokens_reused, grown.blocks_cached) == (60, 7)


def test_progress_counts_ended_requests() -> None:
    engine = FakeEngine()
    seen: list[int] = []
    timing = Timing(clock=engine.clock, sleep=engine.clock.sleep)
    run_repeat(engine, requests(3), load(), timing=timing, progress=seen.append)
    assert seen == [1, 2, 3]


class Quitter(FakeEngine):
    """Stops in the middle without a word."""

    def generate(self, requests: Iterable[Request | None]) -> Iterator[TokenEvent]:
        for count, event in enumerate(super().generate(requests)):
            if count == 7:
                return
            yield event


def test_requests_that_an_engine_forgets_are_errors() -> None:
    repeat = drive(Quitter(), load())
    assert repeat.samples[0].error is None
    assert repeat.samples[1].error == "the engine stopped without ending this request"
    assert repeat.samples[2].error == "the engine never asked for this request"
