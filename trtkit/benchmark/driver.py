"""One pass of a workload over any `Engine`: hand out requests, write down when each token came."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from trtkit.benchmark.load import Clock, LoadGenerator, Sleep, poisson_arrivals_ns
from trtkit.spec.engine import Engine, FinishReason, KVStats, Request, TokenEvent
from trtkit.spec.result import Repeat, RequestSample
from trtkit.spec.workload import Workload

_COUNTERS = (
    "preemptions", "evictions", "tokens_evicted", "blocks_freed", "draft_tokens", "accepted_tokens",
    "prompt_tokens_reused",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """The clock that events are stamped with; tests put a virtual one here."""

    clock: Clock = time.monotonic_ns
    sleep: Sleep = time.sleep


@dataclass(slots=True)
class _Track:
    request: Request
    times_ns: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    error: str | None = None

    def note(self, event: TokenEvent) -> None:
        if event.token_id is not None:
            self.times_ns.append(event.time_ns)
        if event.finish is not None:
            self.finish, self.error = event.finish, event.error

    def sample(self, submit_ns: int | None, origin_ns: int) -> RequestSample:
        times = self.times_ns
        return RequestSample(
            request_id=self.request.request_id,
            prompt_tokens=len(self.request.prompt_ids),
            output_tokens=len(times),
            submit_ns=(submit_ns or origin_ns) - origin_ns,
            first_token_ns=times[0] - origin_ns if times else None,
            last_token_ns=times[-1] - origin_ns if times else None,
            gaps_ns=tuple(after - before for before, after in pairwise(times)),
            finish=self.finish.value if self.finish else None,
            error=self._error(submitted=submit_ns is not None),
        )

    def _error(self, *, submitted: bool) -> str | None:
        if not submitted:
            return "the engine never asked for this request"
        if self.finish is None:
            return "the engine stopped without ending this request"
        if self.finish in (FinishReason.ERROR, FinishReason.CANCELLED):
            return self.error or self.finish.value
        return None


def run_repeat(
    engine: Engine,
    requests: Sequence[Request],
    workload: Workload,
    *,
    index: int = 0,
    timing: Timing | None = None,
    progress: Callable[[int], None] | None = None,
) -> Repeat:
    """Run `requests` under the workload's load.

    Args:
        engine: already open and warm.
        requests: with ids that are unique here.
        workload: concurrency or arrival rate, and the seed of the arrivals.
        index: number of this repeat; it varies the arrivals.
        timing: the engine's clock.
        progress: called with the number of requests that have ended.

    Returns:
        Raw samples in the order of `requests`, times counted from the first submit.
    """
    timing = timing or Timing()
    arrivals = None
    if workload.request_rate is not None:
        arrivals = poisson_arrivals_ns(len(requests), workload.request_rate, (workload.seed, index))
    load = LoadGenerator(
        requests, concurrency=workload.concurrency, arrivals_ns=arrivals, clock=timing.clock, sleep=timing.sleep
    )
    tracks = {request.request_id: _Track(request) for request in requests}
    before = engine.kv_stats()
    ended = 0
    for event in engine.generate(load):
        tracks[event.request_id].note(event)
        if event.finish is not None:
            load.finished(event.request_id)
            ended += 1
            if progress is not None:
                progress(ended)
    origin_ns = min(load.submit_ns.values(), default=timing.clock())
    samples = tuple(track.sample(load.submit_ns.get(name), origin_ns) for name, track in tracks.items())
    return Repeat(
        index=index,
        samples=samples,
        kv=since(before, engine.kv_stats()),
        warmup_requests=0,
        duration_ns=max((s.last_token_ns or 0 for s in samples), default=0),
    )


def since(before: KVStats, after: KVStats) -> KVStats:
    """`after`, with the counters that only grow reduced to what they grew by; unknown ones stay unknown."""
    pairs = {name: (getattr(before, name), getattr(after, name)) for name in _COUNTERS}
    grown: dict[str, Any] = {name: None if None in pair else pair[1] - pair[0] for name, pair in pairs.items()}
    return replace(after, **grown)
