"""`EmbeddedEngine`: schedule, run, postprocess, until nobody is left."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from trtkit.engine.batch import RowInput
from trtkit.engine.block_pool import BlockPool
from trtkit.engine.paged_cache import PagedCache, block_bytes
from trtkit.engine.runner import ModelRunner, ObserverFactory, Runner, RunnerFactory
from trtkit.engine.sampler import NOT_A_NUMBER, fresh_seed
from trtkit.engine.scheduler import Feed, Scheduler, Step
from trtkit.engine.scoring import ScoringRun
from trtkit.engine.sequence import PENDING, Sequence, SequenceState
from trtkit.engine.speculation import Proposer, Speculator
from trtkit.engine.stats import engine_info, kv_stats
from trtkit.engine.step import Awaited, Draw, StepInput
from trtkit.engine.weights import ModelWeights
from trtkit.spec.admission import check_request
from trtkit.spec.dtype import DType
from trtkit.spec.engine import EngineInfo, FinishReason, KVStats, Request, ScoreRequest, ScoreResult, TokenEvent
from trtkit.spec.errors import EngineError, TrtkitError, UnsupportedError, UsageError
from trtkit.spec.kv import KVPolicySpec
from trtkit.spec.plan import Limits, check_block_reuse, check_speculation
from trtkit.spec.speculation import SpeculationSpec

_IDLE_SLEEP_S = 0.0005


@dataclass(frozen=True, kw_only=True, slots=True)
class _Flight:
    """A launched step and whose tokens it will bring."""

    launched: Any
    awaited: list[Awaited]


class EmbeddedEngine:
    """`Engine` and `Scorer` in this process, on one device. One `generate` or `score` at a time."""

    def __init__(  # noqa: PLR0913 - the one place where an engine's parts meet
        self,
        weights: ModelWeights,
        limits: Limits,
        num_blocks: int,
        *,
        kv_dtype: DType,
        kv_policy: KVPolicySpec | None = None,
        observer_factory: ObserverFactory | None = None,
        runner_factory: RunnerFactory | None = None,
        speculation: SpeculationSpec | None = None,
        proposer: Proposer | None = None,
        device: str = "cpu",
    ) -> None:
        """Reserve a pool of `num_blocks`; `limits` are taken as they are (see `open.effective_limits`).

        Without a `runner_factory` the CPU engine's runner works, with `observer_factory`'s eviction. A `proposer`
        guesses in place of the one `speculation` names.

        Raises:
            UsageError: speculation and eviction together.
        """
        model = weights.model
        self._limits = limits
        self._policy = kv_policy or KVPolicySpec()
        check_block_reuse(limits, self._policy)
        self._pool = BlockPool(num_blocks)
        self._scheduler = Scheduler(limits, self._pool)
        cache = PagedCache(model, num_blocks, limits.tokens_per_block, kv_dtype, device)
        if runner_factory is not None:
            self._runner: Runner = runner_factory(weights, cache, self._scheduler)
        else:
            self._runner = self._plain_runner(weights, cache, observer_factory)
        self._speculation = speculation
        self._speculator: Speculator | None = None
        self._max_in_flight = self._runner.max_in_flight
        if speculation is not None:
            check_speculation(speculation, self._policy)
            self._speculator = Speculator(speculation, self._scheduler, self._runner.most_rows, proposer)
            # The next guess needs the tokens of this step, so they are awaited before it is launched.
            self._max_in_flight = 0
        self._block_bytes = block_bytes(model, limits.tokens_per_block, kv_dtype)
        self._vocab_size = model.vocab_size
        self._eos_ids = frozenset(model.eos_ids)
        self._info = engine_info(weights, limits, cache, self._policy, speculation, self._runner, device)
        self._active: dict[str, Sequence] = {}
        self._seeds: dict[str, int] = {}
        self._cancelled: set[str] = set()
        self._arrivals = 0
        self._busy = self._closed = False

    def _plain_runner(
        self, weights: ModelWeights, cache: PagedCache, observer_factory: ObserverFactory | None
    ) -> ModelRunner:
        observer = observer_factory(cache, self._scheduler) if observer_factory else None
        if observer is None and not self._policy.is_full:
            raise UnsupportedError(f"KV policy {self._policy.label!r}: this engine was opened without eviction")
        return ModelRunner(weights, cache, self._limits.max_seq_len, observer)

    @property
    def info(self) -> EngineInfo:
        """Sizes and limits as they took effect."""
        return self._info

    def generate(self, requests: Iterable[Request | None]) -> Iterator[TokenEvent]:
        """Run `requests`; see `trtkit.spec.engine.Engine`. Leaving the iterator early ends what is in flight.

        Raises:
            EngineError: the engine is closed, or another `generate` or `score` is running.
        """
        with self._exclusive():
            source = iter(requests)
            flights: deque[_Flight] = deque()
            more = True
            while more or flights or self._scheduler.has_work:
                more = yield from self._pull(source, more)
                yield from self._drop_cancelled()
                while flights and self._scheduler.reads_prompt:
                    # Its launch takes so long that a token which is here already would be told late.
                    yield from self._land(flights.popleft())
                step = self._scheduler.schedule()
                if step.feeds:
                    flights.append(self._launch(step))
                elif more and not flights:
                    time.sleep(_IDLE_SLEEP_S)
                while len(flights) > (self._max_in_flight if step.feeds else 0):
                    yield from self._land(flights.popleft())

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        """Log-probabilities of continuations; see `trtkit.spec.engine.Scorer`.

        Raises:
            EngineError: the engine is closed, or another `generate` or `score` is running.
        """
        with self._exclusive():
            yield from ScoringRun(self._runner, self._scheduler, self._policy).run(requests)

    def cancel(self, request_id: str) -> None:
        """End a request at the next step, from any thread. Without a running `generate` there is nothing to end."""
        if self._busy:
            self._cancelled.add(request_id)

    def kv_stats(self) -> KVStats:
        """The block pool at this moment."""
        return kv_stats(self._scheduler, self._runner.counters, self._speculator, self._block_bytes)

    def check(self) -> None:
        """Prove the pool's books (tests)."""
        self._scheduler.check()

    def close(self) -> None:
        """Release weights and cache. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._runner.close()

    def __enter__(self) -> EmbeddedEngine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        if self._closed:
            raise EngineError("the engine is closed; open it again")
        if self._busy:
            raise EngineError("the engine is busy with another generate or score; finish or close that one first")
        self._busy = True
        try:
            yield
        finally:
            for sequence in list(self._active.values()):
                self._retire(sequence)
            self._scheduler.abandon()
            self._cancelled.clear()
            self._busy = False

    def _pull(self, source: Iterator[Request | None], more: bool) -> Generator[TokenEvent, None, bool]:
        """Take requests while the batch has room; returns whether the source may have more."""
        while more and self._scheduler.can_take_more:
            try:
                request = next(source)
            except StopIteration:
                return False
            if request is None:
                return True
            try:
                self._admit(request)
            except TrtkitError as error:
                yield _event(request.request_id, 0, FinishReason.ERROR, str(error))
        return more

    def _admit(self, request: Request) -> None:
        """Queue a request, or raise the line it is refused with."""
        if request.request_id in self._active:
            raise UsageError(f"request id {request.request_id!r} is in flight already; give each request its own")
        check_speculation(self._speculation, request.kv or self._policy)
        new_tokens = check_request(request, self._vocab_size, self._limits.max_seq_len)
        sequence = Sequence(request=request, arrival=self._arrivals, max_new_tokens=new_tokens)
        self._arrivals += 1
        self._runner.admit(sequence, self._policy)
        try:
            self._scheduler.add(sequence)
        except TrtkitError:
            self._runner.forget(sequence)
            raise
        self._active[request.request_id] = sequence
        seed = request.sampling.seed
        self._seeds[request.request_id] = fresh_seed() if seed is None else seed

    def _drop_cancelled(self) -> Iterator[TokenEvent]:
        while self._cancelled:
            sequence = self._active.get(self._cancelled.pop())
            if sequence is not None:
                yield self._end(sequence, FinishReason.CANCELLED, None)

    def _launch(self, step: Step) -> _Flight:
        """Start the step. Who reaches its length with it leaves now: its blocks serve the next step already."""
        for sequence in step.preempted:
            self._runner.forget(sequence)
        guesses = [()] * len(step.feeds) if self._speculator is None else self._speculator.guess(step)
        launched = self._runner.launch(
            StepInput(
                rows=[_row(feed, drafts) for feed, drafts in zip(step.feeds, guesses, strict=True)],
                draws=[self._draw(feed.sequence) if feed.samples else None for feed in step.feeds],
                new_blocks=step.new_blocks,
            )
        )
        self._scheduler.launched()
        awaited = []
        for feed, drafts in zip(step.feeds, guesses, strict=True):
            if not feed.samples:
                continue
            sequence = feed.sequence
            awaited.append(Awaited(sequence=sequence, index=len(sequence.output_ids), drafts=drafts))
            sequence.output_ids.append(PENDING)
            if len(sequence.output_ids) == sequence.max_new_tokens:
                self._leave(sequence)
        return _Flight(launched=launched, awaited=awaited)

    def _draw(self, sequence: Sequence) -> Draw:
        return Draw(
            how=sequence.request.sampling, seed=self._seeds[sequence.request_id], index=len(sequence.output_ids)
        )

    def _land(self, flight: _Flight) -> Iterator[TokenEvent]:
        """Note the tokens, end what is done. All of a step's tokens existed at the same moment.

        A sequence that ended while its next token was in flight is no longer active: that token is dropped.
        """
        tokens = iter(self._runner.collect(flight.launched))
        now_ns = time.monotonic_ns()
        events: list[TokenEvent] = []
        for awaited in flight.awaited:
            drawn = list(islice(tokens, 1 + len(awaited.drafts)))
            if self._active.get(awaited.sequence.request_id) is awaited.sequence:
                events += self._take(awaited, drawn, now_ns)
        events += [self._end(s, FinishReason.ERROR, line) for s, line in self._runner.failures]
        yield from events

    def _take(self, awaited: Awaited, drawn: list[int], now_ns: int) -> list[TokenEvent]:
        """The first token drawn, and what was drawn after each draft as long as the drafts were right."""
        sequence, drafts = awaited.sequence, awaited.drafts
        if drafts and NOT_A_NUMBER in drawn:
            # A guess may have spoilt its neighbours: attention multiplies what it masks by zero. Ask again without.
            del sequence.output_ids[awaited.index :]
            self._settle(sequence, len(drafts), 0, spoilt=True)
            return []
        events: list[TokenEvent] = []
        for place, token in enumerate(drawn):
            events.append(self._append(sequence, awaited.index + place, token, now_ns))
            if events[-1].finish is not None or drafts[place : place + 1] != (token,):
                break
        if drafts:
            self._settle(sequence, len(drafts), len(events) - 1)
        return events

    def _settle(self, sequence: Sequence, drafted: int, accepted: int, *, spoilt: bool = False) -> None:
        """Count guesses, and give up what was fed after the last right one; after a `spoilt` step the known token, too."""
        assert self._speculator is not None, "only speculation guesses"
        self._speculator.settle(sequence, drafted, accepted, spoilt=spoilt)
        if sequence.state is not SequenceState.RUNNING:
            return
        wrong = sequence.num_tokens + 1 - sequence.known_len - int(spoilt)
        if wrong:
            self._runner.take_back(sequence, wrong)
            sequence.take_back(wrong)
            self._scheduler.trim(sequence)
        if spoilt:
            # It is fed into its slot again. Nobody has found its block yet: a single token's is published once it went well.
            sequence.take_back(1)

    def _append(self, sequence: Sequence, index: int, token: int, now_ns: int) -> TokenEvent:
        if token == NOT_A_NUMBER:
            return self._end(sequence, FinishReason.ERROR, "the model's output is not a number; try a wider type")
        sequence.output_ids[index : index + 1] = [token]
        request = sequence.request
        finish = None
        if token in request.stop_ids or (token in self._eos_ids and not request.ignore_eos):
            finish = FinishReason.STOP
        elif index + 1 == sequence.max_new_tokens:
            finish = FinishReason.LENGTH
        if finish is not None:
            self._retire(sequence)
        return TokenEvent(request_id=request.request_id, index=index, token_id=token, time_ns=now_ns, finish=finish)

    def _end(self, sequence: Sequence, finish: FinishReason, error: str | None) -> TokenEvent:
        """End a request without a token."""
        self._retire(sequence)
        return _event(sequence.request_id, sequence.num_emitted, finish, error)

    def _retire(self, sequence: Sequence) -> None:
        """Nothing more will be said about a request."""
        if sequence.state is not SequenceState.FINISHED:
            self._leave(sequence)
        del self._active[sequence.request_id], self._seeds[sequence.request_id]

    def _leave(self, sequence: Sequence) -> None:
        """Take a sequence out of the batch; tokens of it may still be in flight."""
        self._scheduler.finish(sequence)
        self._runner.forget(sequence)
        if self._speculator is not None:
            self._speculator.forget(sequence)


def _row(feed: Feed, drafts: tuple[int, ...]) -> RowInput:
    """What a feed and the guesses after it give the runner."""
    known = feed.sequence.token_slice(feed.count)
    ids = [*known, *drafts] if drafts else known
    return RowInput(sequence=feed.sequence, token_ids=ids, ends_piece=feed.ends_piece, drafts=len(drafts))


def _event(request_id: str, index: int, finish: FinishReason, error: str | None) -> TokenEvent:
    """The last event of a request that ends without a token."""
    return TokenEvent(
        request_id=request_id, index=index, token_id=None, time_ns=time.monotonic_ns(), finish=finish, error=error
    )
