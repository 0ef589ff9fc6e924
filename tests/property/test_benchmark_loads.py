"""Whatever the load and the engine's speed, the harness's own bookkeeping holds."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_engine import FakeEngine, FakeScript

from trtkit.benchmark.checks import bookkeeping_checks
from trtkit.benchmark.driver import Timing, run_repeat
from trtkit.benchmark.metrics import compute_metrics
from trtkit.spec.engine import Request
from trtkit.spec.kv import KVPolicySpec
from trtkit.spec.result import Repeat
from trtkit.spec.workload import SLO, Workload

SCRIPTS = st.builds(
    FakeScript,
    prefill_ns_per_token=st.integers(0, 100_000),
    step_ns=st.integers(1, 10_000_000),
    max_batch_size=st.integers(1, 9),
)
LOADS = st.builds(
    Workload,
    isl=st.integers(1, 40),
    osl=st.integers(1, 12),
    num_requests=st.integers(1, 25),
    concurrency=st.one_of(st.none(), st.integers(1, 12)),
    request_rate=st.floats(0.5, 5000),
    seed=st.integers(0, 9),
    slo=st.builds(SLO, ttft_ms=st.one_of(st.none(), st.floats(0.1, 100))),
)
CLOSED = LOADS.map(lambda w: Workload(**{**fields(w), "request_rate": None, "concurrency": w.concurrency or 1}))


def fields(workload: Workload) -> dict[str, object]:
    return {name: getattr(workload, name) for name in Workload.__dataclass_fields__}


def drive(script: FakeScript, load: Workload) -> Repeat:
    engine = FakeEngine(script)
    requests = [
        Request(request_id=f"r{i}", prompt_ids=(5,) * load.isl, max_tokens=load.osl) for i in range(load.num_requests)
    ]
    return run_repeat(engine, requests, load, timing=Timing(clock=engine.clock, sleep=engine.clock.sleep))


@settings(deadline=None, max_examples=150, derandomize=True)
@given(script=SCRIPTS, load=st.one_of(LOADS, CLOSED))
def test_every_bookkeeping_check_passes_and_every_metric_is_finite_and_positive(
    script: FakeScript, load: Workload
) -> None:
    repeat = drive(script, load)
    failed = [c for c in bookkeeping_checks([repeat], load, KVPolicySpec()) if c.status == "fail"]
    assert failed == []
    metrics = compute_metrics([repeat], load)
    for key, metric in metrics.items():
        for stat in metric.stats.values():
            assert 0 <= stat.value < float("inf"), key
    assert metrics["tps"].stats["value"].value > 0
    if "goodput_s" in metrics:
        assert metrics["goodput_s"].stats["value"].value <= metrics["requests_s"].stats["value"].value


@settings(deadline=None, max_examples=60, derandomize=True)
@given(script=SCRIPTS, load=CLOSED)
def test_a_closed_loop_stays_full_until_requests_run_out(script: FakeScript, load: Workload) -> None:
    repeat = drive(script, load)
    ends = sorted(s.last_token_ns for s in repeat.samples)
    starts = sorted(s.submit_ns for s in repeat.samples)
    # From the concurrency-th on, each start is the end of an earlier request.
    for number, start in enumerate(starts[load.concurrency :]):
        assert start == ends[number]


@settings(deadline=None, max_examples=40, derandomize=True)
@given(script=SCRIPTS, load=LOADS)
def test_a_run_is_reproducible_from_its_seed(script: FakeScript, load: Workload) -> None:
    assert drive(script, load) == drive(script, load)
