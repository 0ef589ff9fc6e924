"""Scoring: log-probabilities of continuations, several requests per step, memory bounded.

A request's context is fed piece by piece and stays in the cache while its continuations are fed one after the
other and rolled back; a one-token continuation costs nothing but a look at the context's last logits. Every
request admitted has all its blocks reserved, so nothing is ever preempted here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from trtkit.engine.batch import RowInput
from trtkit.engine.runner import Runner
from trtkit.engine.scheduler import Scheduler
from trtkit.engine.sequence import Sequence, blocks_for
from trtkit.spec.admission import check_score_request
from trtkit.spec.engine import ContinuationScore, Request, ScoreRequest, ScoreResult
from trtkit.spec.errors import CapacityError, TrtkitError
from trtkit.spec.kv import KVPolicySpec

_LOGIT_ROWS = 64
"""Rows of the vocabulary matrix's output alive at once."""


@dataclass(kw_only=True, slots=True)
class _Scores:
    """Grows into a `ContinuationScore`, one token at a time."""

    logprobs: list[float] = field(default_factory=list)
    is_greedy: list[bool] = field(default_factory=list)
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)

    def done(self) -> ContinuationScore:
        return ContinuationScore(logprobs=tuple(self.logprobs), is_greedy=tuple(self.is_greedy), top=tuple(self.top))


@dataclass(kw_only=True, slots=True, eq=False)
class _Job:
    """One request in progress. `queue` holds the continuations still to be fed; `fed` counts tokens of its head."""

    request: ScoreRequest
    sequence: Sequence
    reserved: int
    scores: list[_Scores]
    queue: deque[int]
    fed: int = 0
    context_slots: int = 0

    @property
    def in_context(self) -> bool:
        return self.sequence.num_tokens < len(self.request.context_ids)

    @property
    def done(self) -> bool:
        return not self.in_context and not self.queue

    def next_input(self, budget: int) -> RowInput:
        """At most `budget` tokens, never across the end of a piece."""
        if self.in_context:
            count = min(self.sequence.piece_end() - self.sequence.num_tokens, budget)
            ends = self.sequence.num_tokens + count == self.sequence.piece_end()
            return RowInput(sequence=self.sequence, token_ids=self.sequence.token_slice(count), ends_piece=ends)
        continuation = self.request.continuations[self.queue[0]]
        tokens = continuation[self.fed : min(self.fed + budget, len(continuation) - 1)]
        return RowInput(sequence=self.sequence, token_ids=tokens, ends_piece=False, observed=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reading:
    """Which token of the step predicts what: `targets` are (scores to extend, the token that came)."""

    token: int
    targets: list[tuple[_Scores, int]]
    top: int


class ScoringRun:
    """One call of `score`."""

    def __init__(self, runner: Runner, scheduler: Scheduler, policy: KVPolicySpec) -> None:
        """Uses the scheduler's pool and limits only; its queues are empty meanwhile."""
        self._runner, self._scheduler, self._policy = runner, scheduler, policy
        self._limits, self._pool = scheduler.limits, scheduler.pool
        self._jobs: list[_Job] = []
        self._waiting: _Job | None = None
        self._arrivals = 0

    def run(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        """Results as they are finished."""
        source = iter(requests)
        try:
            while True:
                yield from self._fill(source)
                if not self._jobs:
                    return
                self._step()
                for sequence, line in self._runner.failures:
                    yield self._finish(next(job for job in self._jobs if job.sequence is sequence), error=line)
                for job in [job for job in self._jobs if job.done]:
                    yield self._finish(job)
        finally:
            for job in self._jobs:
                self._release(job)

    def _fill(self, source: Iterator[ScoreRequest]) -> Iterator[ScoreResult]:
        """Admit requests in order while their whole peak fits beside the others'."""
        while len(self._jobs) < self._limits.max_batch_size:
            if self._waiting is None:
                request = next(source, None)
                if request is None:
                    return
                try:
                    self._waiting = self._admit(request)
                except TrtkitError as error:
                    yield ScoreResult(request_id=request.request_id, error=str(error))
                    continue
            if sum(job.reserved for job in self._jobs) + self._waiting.reserved > self._pool.num_blocks:
                return
            self._jobs.append(self._waiting)
            self._waiting = None

    def _admit(self, request: ScoreRequest) -> _Job:
        vocab = self._runner.weights.model.vocab_size
        check_score_request(request, vocab, self._limits.max_seq_len)
        self._arrivals += 1
        # The pool names owners by id; the arrival keeps two requests of one name apart.
        inner = Request(
            request_id=f"{self._arrivals}:{request.request_id}",
            prompt_ids=request.context_ids,
            max_tokens=1,
            kv=request.kv,
        )
        sequence = Sequence(request=inner, arrival=self._arrivals, max_new_tokens=1, chunk_ends=request.chunk_ends)
        self._runner.admit(sequence, self._policy)
        # Pieces are the caller's here, so the policy's own quantum gives way and its cap grows by a whole piece.
        sequence.prefill_quantum = None
        if sequence.kv_cap_tokens is not None:
            sequence.kv_cap_tokens = min(len(request.context_ids), sequence.kv_cap_tokens + _longest_piece(request))
        reserved = blocks_for(_peak_slots(request, sequence), self._limits.tokens_per_block)
        if reserved > self._pool.num_blocks:
            self._runner.forget(sequence)
            raise CapacityError(
                f"needs {reserved} KV blocks, the pool has {self._pool.num_blocks}; give the engine more KV memory"
            )
        return _Job(
            request=request,
            sequence=sequence,
            reserved=reserved,
            scores=[_Scores() for _ in request.continuations],
            queue=deque(i for i, tokens in enumerate(request.continuations) if len(tokens) > 1),
        )

    @torch.inference_mode()
    def _step(self) -> None:
        """Feed as many requests as the token limit allows, then read what their tokens predict."""
        inputs: list[RowInput] = []
        fed: list[_Job] = []
        new_blocks: list[int] = []
        budget = self._limits.max_num_tokens
        for job in self._jobs:
            if budget == 0:
                break
            item = job.next_input(budget)
            new_blocks += self._grow(job.sequence, len(item.token_ids))
            budget -= len(item.token_ids)
            inputs.append(item)
            fed.append(job)
        were_in_context = [job.in_context for job in fed]
        batch, hidden_TE = self._runner.run(inputs, new_blocks)
        readings: list[_Reading] = []
        for job, item, last, context in zip(fed, inputs, batch.last_tokens, were_in_context, strict=True):
            if context:
                readings += _context_reading(job, last)
            else:
                readings += self._continuation_readings(job, len(item.token_ids), last)
        self._read(hidden_TE, readings)

    def _grow(self, sequence: Sequence, count: int) -> list[int]:
        needed = blocks_for(sequence.cache_len + count, self._limits.tokens_per_block) - len(sequence.block_table)
        blocks = self._pool.allocate(max(0, needed), sequence.request_id)
        sequence.block_table += blocks
        return blocks

    def _continuation_readings(self, job: _Job, count: int, last: int) -> list[_Reading]:
        """The tokens just fed predict their successors; at the end of a continuation the cache is rolled back."""
        index = job.queue[0]
        tokens = job.request.continuations[index]
        first = last - count + 1
        readings = [
            _Reading(
                token=first + i,
                targets=[(job.scores[index], tokens[job.fed + i + 1])],
                top=job.request.top_logprobs,
            )
            for i in range(count)
        ]
        job.fed += count
        if job.fed == len(tokens) - 1:
            job.queue.popleft()
            sequence = job.sequence
            sequence.num_tokens -= job.fed
            sequence.cache_len -= job.fed
            self._scheduler.trim(sequence)
            job.fed = 0
        return readings

    def _read(self, hidden_TE: Tensor, readings: list[_Reading]) -> None:
        for start in range(0, len(readings), _LOGIT_ROWS):
            part = readings[start : start + _LOGIT_ROWS]
            logprobs_RV = self._runner.logits(hidden_TE, [r.token for r in part]).log_softmax(dim=-1)
            for row_V, greedy, reading in zip(logprobs_RV, logprobs_RV.argmax(dim=-1).tolist(), part, strict=True):
                _record(row_V, greedy, reading)

    def _finish(self, job: _Job, error: str | None = None) -> ScoreResult:
        self._jobs.remove(job)
        self._release(job)
        return ScoreResult(
            request_id=job.request.request_id,
            continuations=tuple(scores.done() for scores in job.scores) if error is None else (),
            evictions=job.sequence.evictions,
            tokens_evicted=job.sequence.tokens_evicted,
            error=error,
        )

    def _release(self, job: _Job) -> None:
        self._pool.free(job.sequence.block_table, job.sequence.request_id)
        job.sequence.block_table.clear()
        self._runner.forget(job.sequence)


def _peak_slots(request: ScoreRequest, sequence: Sequence) -> int:
    """Most live slots at once: the context (or what eviction bounds it to) and one continuation."""
    context = sequence.capped(len(request.context_ids))
    return context + max((len(tokens) - 1 for tokens in request.continuations if tokens), default=0)


def _longest_piece(request: ScoreRequest) -> int:
    bounds = (0, *request.chunk_ends, len(request.context_ids))
    return max(b - a for a, b in pairwise(bounds))


def _context_reading(job: _Job, last: int) -> list[_Reading]:
    """The context's last token predicts the first token of every continuation."""
    targets = [
        (scores, tokens[0]) for scores, tokens in zip(job.scores, job.request.continuations, strict=True) if tokens
    ]
    if job.in_context or not targets:
        return []
    return [_Reading(token=last, targets=targets, top=job.request.top_logprobs)]


def _record(row_V: Tensor, greedy: int, reading: _Reading) -> None:
    values = row_V[[target for _, target in reading.targets]].tolist()
    best: tuple[tuple[int, float], ...] = ()
    if reading.top:
        top = row_V.topk(min(reading.top, row_V.numel()))
        best = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    for (scores, target), value in zip(reading.targets, values, strict=True):
        scores.logprobs.append(value)
        scores.is_greedy.append(greedy == target)
        if reading.top:
            scores.top.append(best)
