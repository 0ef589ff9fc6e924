"""What `h2o.py` measures with: engines that share one set of weights, requests paced step by step, a replayed scheduler.

Engines live in this process, so that two variants take turns on the same weights within seconds of each other.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trtkit.engine.block_pool import BlockPool
from trtkit.engine.device.eviction import device_piece
from trtkit.engine.device.segments import cut
from trtkit.engine.device.setup import eviction_bytes, runner_factory
from trtkit.engine.eviction_rules import EvictionRules, due
from trtkit.engine.loop import EmbeddedEngine
from trtkit.engine.paged_cache import block_bytes
from trtkit.engine.scheduler import Feed, Scheduler
from trtkit.engine.sequence import Sequence as EngineSequence
from trtkit.engine.weights import ModelWeights
from trtkit.spec.dtype import DType
from trtkit.spec.engine import FinishReason, Request, TokenEvent
from trtkit.spec.errors import EngineError
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Limits

_WORD, _SLOT = 4, 8
SETTLING_STEPS = 3
"""Steps after a pause that are not counted: the one in flight ended long ago, and the host has no lead yet."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One set of weights and where it lies."""

    weights: ModelWeights
    kv_dtype: DType
    device: str

    @property
    def model(self) -> ModelSpec:
        return self.weights.model

    def open(self, kv: str, limits: Limits, blocks: int) -> EmbeddedEngine:
        """An engine on the device path, with a pool of `blocks`."""
        policy = parse_kv_policy(kv)
        return EmbeddedEngine(
            self.weights,
            limits,
            blocks,
            kv_dtype=self.kv_dtype,
            kv_policy=policy,
            runner_factory=runner_factory(policy, limits, self.device),
            device=self.device,
        )

    def block_bytes(self, limits: Limits) -> int:
        return block_bytes(self.model, limits.tokens_per_block, self.kv_dtype)

    def side_bytes(self, kv: str, limits: Limits) -> int:
        """Rings and ledgers of a full batch."""
        return eviction_bytes(self.weights, limits, parse_kv_policy(kv))


def requests_of(model: ModelSpec, count: int, prompt: int, output: int, rng: np.random.Generator) -> list[Request]:
    """Random prompts that share nothing."""
    return [
        Request(
            request_id=str(index),
            prompt_ids=tuple(rng.integers(3, model.vocab_size, prompt).tolist()),
            max_tokens=output,
            ignore_eos=True,
        )
        for index in range(count)
    ]


class Paced:
    """Requests of one engine, advanced by so many decode steps at a time."""

    def __init__(self, engine: EmbeddedEngine, requests: Sequence[Request]) -> None:
        """Feed every prompt; afterwards only decode steps follow."""
        self.engine = engine
        self._events: Iterator[TokenEvent] = engine.generate(requests)
        self._last_ns = 0
        seen: dict[str, int] = {}
        while len(seen) < len(requests) or min(seen.values()) < 2:
            event = self._next()
            seen[event.request_id] = event.index + 1

    def _next(self) -> TokenEvent:
        event = next(self._events, None)
        if event is None or event.finish is FinishReason.LENGTH:
            raise EngineError("a request ended while steps were still to be counted; give it more output tokens")
        if event.error is not None:
            raise EngineError(f"request {event.request_id}: {event.error}")
        self._last_ns = event.time_ns
        return event

    def steps_ms(self, count: int) -> list[float]:
        """Wall time of the next `count` steps, counted after the pace has settled. A step's tokens share one time."""
        stamps = [self._last_ns]
        while len(stamps) <= count + SETTLING_STEPS:
            if self._next().time_ns != stamps[-1]:
                stamps.append(self._last_ns)
        return [(b - a) / 1e6 for a, b in itertools.pairwise(stamps)][SETTLING_STEPS:]

    def close(self) -> None:
        """End what is in flight."""
        self._events.close()  # type: ignore[attr-defined]


class EvictionClock:
    """GPU time between the launches of eviction and their end, step by step, by CUDA events around `end_step`."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        """Wraps the engine's eviction; does nothing where there is no GPU."""
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._observer = engine._runner.observer  # type: ignore[attr-defined]
        if engine.info.device != "cpu" and self._observer is not None:
            self._end_step = self._observer.end_step
            self._observer.end_step = self._timed

    def _timed(self, rows: object) -> None:
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        self._end_step(rows)
        after.record()
        self._pairs.append((before, after))

    def take_ms(self) -> list[float]:
        """Milliseconds of each step since the last call; waits for the device."""
        if not self._pairs:
            return []
        torch.cuda.synchronize()
        pairs, self._pairs = self._pairs, []
        return [before.elapsed_time(after) for before, after in pairs]


def round_bytes(model: ModelSpec, budget: int, interval: int, ring: int, kv_bytes: int = 2) -> int:
    """Bytes one sequence moves from one eviction to the next, counted: scoring in passes of `ring` queries, then a round.

    The round copies positions and mass, divides, ranks, judges the answer, and moves as many tokens as it evicts.
    """
    rows, dim = model.num_layers * model.num_kv_heads, model.head_dim
    lengths = [budget + min(interval, fed) for fed in range(ring, interval + ring, ring)]
    keys = sum(lengths) * rows * dim * kv_bytes
    queries = 2 * interval * model.num_layers * model.num_heads * (2 * dim + _WORD)
    ledger = sum(3 * length * _WORD for length in lengths) * rows
    live = (budget + interval) * _WORD * rows
    copies, means, ranking = 4 * live, 5 * live, 2 * live + budget * _SLOT * rows
    judged, moved = budget * _SLOT * rows, (budget * _SLOT + 2 * interval * (2 * dim * kv_bytes + 2 * _WORD)) * rows
    return keys + queries + ledger + copies + means + ranking + judged + moved


def first_token_ms(engine: EmbeddedEngine, request: Request) -> float:
    """From submission to the first token, alone in the engine."""
    started = time.monotonic_ns()
    (event,) = list(engine.generate([request]))
    if event.error is not None:
        raise EngineError(event.error)
    return (event.time_ns - started) / 1e6


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """How many requests ran in each step while others waited; `complete` if the whole load was run."""

    running: tuple[int, ...]
    preemptions: int
    steps: int
    complete: bool

    @property
    def mean(self) -> float | None:
        """Over steps in which somebody waited."""
        return statistics.fmean(self.running) if self.running else None

    @property
    def most(self) -> int:
        return max(self.running, default=0)


def run_load(engine: EmbeddedEngine, requests: Sequence[Request], deadline_s: float) -> InFlight:
    """Run a load until it is done or the time (`time.monotonic`) is over, looking at the scheduler at every step.

    The engine takes requests while its batch has room and keeps who does not fit the pool waiting.
    """
    scheduler, counted = engine._scheduler, []
    schedule = scheduler.schedule

    def looked_at() -> object:
        step = schedule()
        if step.feeds:
            counted.append((len(scheduler.running), len(scheduler.waiting)))
        return step

    scheduler.schedule = looked_at  # type: ignore[method-assign, assignment]
    events = engine.generate(requests)
    complete = True
    try:
        for event in events:
            if event.error is not None:
                raise EngineError(f"request {event.request_id}: {event.error}")
            if time.monotonic() > deadline_s:
                complete = False
                break
    finally:
        events.close()  # type: ignore[attr-defined]
        del scheduler.schedule
    return _in_flight(counted, engine.kv_stats().preemptions, complete)


def replay_load(
    model: ModelSpec, kv: str, limits: Limits, blocks: int, lengths: Sequence[tuple[int, int]], steps: int | None = None
) -> InFlight:
    """The same load through the scheduler and eviction's rules alone: every count an engine would have, and no tensor."""
    scheduler = Scheduler(limits, BlockPool(blocks))
    policy = parse_kv_policy(kv)
    rules = EvictionRules(policy, model, scheduler, device_piece)
    waiting = [
        EngineSequence(
            request=Request(request_id=str(index), prompt_ids=(0,) * prompt, max_tokens=output),
            arrival=index,
            max_new_tokens=output,
            kv_policy=policy,
        )
        for index, (prompt, output) in enumerate(lengths)
    ]
    counted: list[tuple[int, int]] = []
    while (waiting or scheduler.has_work) and (steps is None or len(counted) < steps):
        while waiting and scheduler.can_take_more:
            sequence = waiting.pop(0)
            rules.admit(sequence)
            sequence.joins_pieces = sequence.evicts
            scheduler.add(sequence)
        step = scheduler.schedule()
        counted.append((len(scheduler.running), len(scheduler.waiting)))
        for feed in step.feeds:
            _replay_feed(feed, scheduler, rules)
    return _in_flight(counted, scheduler.preemptions, not waiting and not scheduler.has_work)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """As much of a row as cutting it needs."""

    sequence: EngineSequence
    count: int
    position: int
    cached: int
    ends_piece: bool
    observed: bool
    table: torch.Tensor


_NO_TABLE = torch.zeros(0, dtype=torch.int32)


def _replay_feed(feed: Feed, scheduler: Scheduler, rules: EvictionRules) -> None:
    sequence, before = feed.sequence, feed.sequence.cache_len
    position = sequence.num_tokens
    sequence.advance(feed.count)
    policy = rules.policy(sequence.kv_policy) if sequence.evicts else None
    if policy is not None and feed.count > 1:
        row = _Row(
            sequence=sequence,
            count=feed.count,
            position=position,
            cached=before,
            ends_piece=feed.ends_piece,
            observed=True,
            table=_NO_TABLE,
        )
        segments = cut(row, policy.budget)
        evicted = [segment.live - segment.left for segment in segments if segment.evict_to is not None]
        if evicted:
            rules.record(sequence, policy.budget, evicted, segments[-1].left)
    elif policy is not None and feed.ends_piece:
        live, budget = sequence.cache_len, policy.budget
        if due(sequence.num_tokens, sequence.prompt_len, live, budget):
            rules.record(sequence, budget, [live - budget.tokens], budget.tokens)
    if feed.samples:
        sequence.output_ids.append(0)
        if len(sequence.output_ids) == sequence.max_new_tokens:
            scheduler.finish(sequence)


def _in_flight(counted: Sequence[tuple[int, int]], preemptions: int, complete: bool) -> InFlight:
    running = tuple(runs for runs, waits in counted if waits)
    return InFlight(running=running, preemptions=preemptions, steps=len(counted), complete=complete)
