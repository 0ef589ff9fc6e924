"""Bookkeeping checks on raw samples: identities that hold in every honest run, whatever the engine or the machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trtkit.benchmark.metrics import completed, e2e_ms, span_s
from trtkit.spec.kv import KVPolicySpec
from trtkit.spec.result import Check, Repeat, RequestSample
from trtkit.spec.units import MS_PER_S
from trtkit.spec.workload import Workload

PASS, WARN, FAIL, SKIPPED = "pass", "warn", "fail", "skipped"
LITTLE_TOLERANCE = 0.05
MIN_ROUNDS = 3


def bookkeeping_checks(repeats: Sequence[Repeat], workload: Workload, kv: KVPolicySpec) -> tuple[Check, ...]:
    """All checks of one cell; a failed one makes the result invalid. `kv` has its budget and interval in tokens."""
    samples = [sample for repeat in repeats for sample in repeat.samples]
    return (
        _all_finished(samples),
        _time_order(samples),
        _token_counts(samples, workload),
        _littles_law(repeats, workload),
        _enough_rounds(workload),
        _policy_acted(repeats, workload, kv),
        *_counts_possible(repeats),
    )


def engine_checks(notes: Sequence[str]) -> tuple[Check, ...]:
    """What the engine says does not run as it should, such as a kernel that fell back: kept beside every number."""
    return tuple(Check(name="engine_as_built", status=WARN, detail=note) for note in notes)


def _all_finished(samples: Sequence[RequestSample]) -> Check:
    failed = [sample for sample in samples if sample.error is not None]
    detail = f"{len(samples) - len(failed)} of {len(samples)} requests finished"
    if failed:
        detail += f"; first error ({failed[0].request_id}): {failed[0].error}"
    return Check(name="requests_finish", status=FAIL if failed else PASS, detail=detail)


def _time_order(samples: Sequence[RequestSample]) -> Check:
    """E2E = TTFT + sum of gaps, with no step backwards."""
    for sample in completed(samples):
        first, last = sample.first_token_ns or 0, sample.last_token_ns or 0
        if first < sample.submit_ns or min(sample.gaps_ns, default=0) < 0 or first + sum(sample.gaps_ns) != last:
            detail = f"{sample.request_id}: submit {sample.submit_ns}, first {first}, last {last} ns do not add up"
            return Check(name="time_order", status=FAIL, detail=detail)
    return Check(name="time_order", status=PASS, detail="E2E = TTFT + sum of gaps for every request, no negative gap")


def _token_counts(samples: Sequence[RequestSample], workload: Workload) -> Check:
    """With `ignore_eos` every request gives exactly `osl` tokens; a prompt of a fixed length has it."""
    done = completed(samples)
    short = [
        s for s in done if s.output_tokens != workload.osl and (workload.ignore_eos or s.output_tokens > workload.osl)
    ]
    wrong_prompt = [s for s in done if workload.isl and s.prompt_tokens != workload.isl]
    for found, what, wanted in ((short, "output", workload.osl), (wrong_prompt, "prompt", workload.isl)):
        if found:
            count = found[0].output_tokens if what == "output" else found[0].prompt_tokens
            detail = f"{len(found)} requests with other {what} lengths than {wanted}, e.g. {count}"
            return Check(name="token_counts", status=FAIL, detail=detail)
    total = sum(s.output_tokens for s in done)
    return Check(name="token_counts", status=PASS, detail=f"{total} output tokens from {len(done)} requests, as asked")


def _littles_law(repeats: Sequence[Repeat], workload: Workload) -> Check:
    """In-flight requests, integrated over time, equal arrival rate x mean latency and never exceed the concurrency."""
    worst, peak = 0.0, 0
    for repeat in repeats:
        seconds = span_s(repeat)
        done = completed(repeat.samples)
        if seconds is None:
            return Check(name="littles_law", status=SKIPPED, detail="no completed request")
        integrated, highest = _in_flight(done, seconds)
        predicted = len(done) / seconds * sum(e2e_ms(s) or 0.0 for s in done) / len(done) / MS_PER_S
        worst = max(worst, abs(integrated - predicted) / predicted)
        peak = max(peak, highest)
    cap = workload.concurrency
    bad = worst > LITTLE_TOLERANCE or (cap is not None and workload.request_rate is None and peak > cap)
    detail = f"in flight deviates {worst:.2%} from rate x latency; at most {peak} at once (asked: {cap or 'open loop'})"
    return Check(name="littles_law", status=FAIL if bad else PASS, detail=detail)


def _in_flight(done: Sequence[RequestSample], seconds: float) -> tuple[float, int]:
    """Time average and maximum of requests in flight, by walking over starts and ends."""
    changes = sorted(change for s in done for change in ((s.submit_ns, 1), (s.last_token_ns or 0, -1)))
    area = in_flight = peak = 0
    previous_ns = changes[0][0]
    for time_ns, change in changes:
        area += in_flight * (time_ns - previous_ns)
        in_flight += change
        peak = max(peak, in_flight)
        previous_ns = time_ns
    return area / (seconds * 1e9), peak


def _enough_rounds(workload: Workload) -> Check:
    """A closed loop with few requests per place measures filling and draining."""
    if workload.concurrency is None or workload.request_rate is not None:
        return Check(name="enough_requests", status=SKIPPED, detail="open loop")
    rounds = workload.num_requests / workload.concurrency
    detail = f"{workload.num_requests} requests are {rounds:.1f} rounds at concurrency {workload.concurrency}"
    if rounds < MIN_ROUNDS:
        return Check(name="enough_requests", status=WARN, detail=f"{detail}; TPS is mostly ramp and tail")
    return Check(name="enough_requests", status=PASS, detail=detail)


def _policy_acted(repeats: Sequence[Repeat], workload: Workload, kv: KVPolicySpec) -> Check:
    """A run under an eviction policy that never evicted is a run without it, and must not be called otherwise."""
    if kv.is_full:
        return Check(name="kv_policy_acted", status=SKIPPED, detail="the policy keeps everything")
    if any(r.kv.tokens_evicted is None for r in repeats):
        detail = f"{kv.label}: this runtime does not report what it evicted, so whether the policy acted is not known"
        return Check(name="kv_policy_acted", status=WARN, detail=detail)
    rounds, tokens = (sum(getattr(r.kv, name) or 0 for r in repeats) for name in ("evictions", "tokens_evicted"))
    if tokens:
        detail = f"{kv.label}: {tokens} tokens evicted in {rounds} rounds"
        return Check(name="kv_policy_acted", status=PASS, detail=detail)
    context = workload.isl + workload.osl
    most = (kv.budget or 0) + (kv.interval or 0)
    if workload.isl and context <= most:
        detail = f"{kv.label}: never evicted, as {context} tokens are within it; these are the full cache's numbers"
        return Check(name="kv_policy_acted", status=WARN, detail=detail)
    detail = f"{kv.label}: never evicted, though {context} tokens exceed the {most} it may hold"
    return Check(name="kv_policy_acted", status=FAIL, detail=detail)


def _counts_possible(repeats: Sequence[Repeat]) -> Iterator[Check]:
    """What was guessed and reused, where anything was, is part of what was written and asked.

    A warning only: a runtime that tells its counts late may count a repeat's end into the next one.
    """
    if not any(r.kv.prompt_tokens_reused or r.kv.draft_tokens or r.kv.accepted_tokens for r in repeats):
        return
    for number, r in enumerate(repeats):
        prompts = sum(sample.prompt_tokens for sample in r.samples)
        decoded = sum(max(sample.output_tokens - 1, 0) for sample in r.samples)
        guessed, right = r.kv.draft_tokens, r.kv.accepted_tokens or 0
        found = r.kv.prompt_tokens_reused or 0
        for wrong, told in (
            (found > prompts, f"{found} prompt tokens reused of {prompts}"),
            (guessed is not None and right > guessed, f"{right} guesses right of {guessed}"),
            (right > decoded, f"{right} guesses right of {decoded} decoded tokens"),
        ):
            if wrong:
                yield Check(
                    name="counts_possible", status=WARN, detail=f"repeat {number}: {told}; these counts are wrong"
                )
                return
    yield Check(
        name="counts_possible", status=PASS, detail="guessed and reused tokens are among those written and asked"
    )
