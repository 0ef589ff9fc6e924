from __future__ import annotations

from dataclasses import replace

import pytest
from support.samples import repeat, sample

from trtkit.benchmark.checks import bookkeeping_checks
from trtkit.spec.kv import KVPolicySpec, parse_kv_policy
from trtkit.spec.result import Repeat
from trtkit.spec.workload import Workload

LOAD = Workload(isl=4, osl=4, num_requests=3, concurrency=1)
GOOD = repeat(sample("a"), sample("b", submit_ms=16), sample("c", submit_ms=32))


def status(run: Repeat, name: str, workload: Workload = LOAD, kv: KVPolicySpec | None = None) -> str:
    checks = {check.name: check for check in bookkeeping_checks([run], workload, kv or KVPolicySpec())}
    assert checks[name].detail
    return checks[name].status


def test_an_honest_run_passes_everything() -> None:
    checks = bookkeeping_checks([GOOD], LOAD, KVPolicySpec())
    assert {check.name: check.status for check in checks if check.status != "pass"} == {"kv_policy_acted": "skipped"}


def test_a_failed_request_fails_the_run_and_shows_its_error() -> None:
    run = repeat(*GOOD.samples[:2], sample("c", submit_ms=32, error="out of blocks"))
    checks = {check.name: check for check in bookkeeping_checks([run], LOAD, KVPolicySpec())}
    assert checks["requests_finish"].status == "fail"
    assert "2 of 3" in checks["requests_finish"].detail
    assert "out of blocks" in checks["requests_finish"].detail


@pytest.mark.parametrize(
    "wrong",
    [
        replace(sample("a", submit_ms=5), first_token_ns=4_000_000),
        replace(sample("a"), gaps_ns=(4_000_000, -1_000_000, 3_000_000)),
        replace(sample("a"), last_token_ns=17_000_000),
    ],
    ids=["token before submit", "step backwards", "gaps do not add up"],
)
def test_times_that_cannot_be_are_caught(wrong) -> None:
    assert status(repeat(wrong), "time_order") == "fail"


def test_too_few_tokens_fail_where_eos_is_ignored_and_too_many_always() -> None:
    short, long = repeat(sample(gaps_ms=(2, 2))), repeat(sample(gaps_ms=(2, 2, 2, 2)))
    polite = replace(LOAD, ignore_eos=False)
    assert status(short, "token_counts") == "fail"
    assert status(short, "token_counts", polite) == "pass"
    assert status(long, "token_counts", polite) == "fail"


def test_prompts_of_another_length_fail_unless_a_file_sets_them() -> None:
    run = repeat(sample(prompt=5))
    assert status(run, "token_counts") == "fail"
    assert status(run, "token_counts", replace(LOAD, isl=0)) == "pass"


def test_more_in_flight_than_asked_fails() -> None:
    run = repeat(sample("a"), sample("b", submit_ms=1))
    assert status(run, "littles_law") == "fail"
    assert status(run, "littles_law", replace(LOAD, concurrency=2)) == "pass"
    assert status(run, "littles_law", replace(LOAD, request_rate=9.0)) == "pass"


def test_few_rounds_are_a_warning() -> None:
    assert status(GOOD, "enough_requests", replace(LOAD, concurrency=2)) == "warn"
    assert status(GOOD, "enough_requests", replace(LOAD, concurrency=None, request_rate=1.0)) == "skipped"


def test_a_policy_that_never_evicted_is_not_called_by_its_name() -> None:
    acted = repeat(*GOOD.samples, evictions=3, tokens_evicted=12)
    h2o = parse_kv_policy("h2o:4")
    assert status(acted, "kv_policy_acted", kv=h2o) == "pass"
    assert status(GOOD, "kv_policy_acted", kv=h2o) == "fail"
    assert status(GOOD, "kv_policy_acted", kv=parse_kv_policy("h2o:4,interval=3")) == "fail"
    assert status(GOOD, "kv_policy_acted", kv=parse_kv_policy("h2o:4,interval=4")) == "warn"
    assert status(GOOD, "kv_policy_acted", kv=parse_kv_policy("h2o:8")) == "warn"
    silent = repeat(*GOOD.samples, evictions=None, tokens_evicted=None)
    assert status(silent, "kv_policy_acted", kv=h2o) == "warn", "unknown is neither acted nor not"


def test_nothing_completed_skips_what_needs_requests() -> None:
    assert status(repeat(sample(error="x")), "littles_law") == "skipped"


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"prompt_tokens_reused": 12, "draft_tokens": 9, "accepted_tokens": 9}, "pass"),
        ({"prompt_tokens_reused": 13}, "warn"),
        ({"draft_tokens": 3, "accepted_tokens": 4}, "warn"),
        ({"draft_tokens": 99, "accepted_tokens": 10}, "warn"),
        ({"draft_tokens": None, "accepted_tokens": None, "prompt_tokens_reused": 1}, "pass"),
    ],
)
def test_counts_of_guesses_and_reuse_that_cannot_be_are_named(counts: dict[str, int], expected: str) -> None:
    assert status(repeat(*GOOD.samples, **counts), "counts_possible") == expected
