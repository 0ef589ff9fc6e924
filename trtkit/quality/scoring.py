"""Log-probabilities of continuations so that KV eviction acts on them.

A multiple-choice letter is scored at the last position of its prompt. Fed in one piece, that position attends to the
whole cache and no eviction policy can change it. So the context is fed in two pieces with an eviction between:

* `shots` (query-agnostic): the worked examples, eviction, then the question, then the score;
* `question` (query-aware): everything but the last token, eviction, then that token, then the score.

The same pieces are used for every engine, evicting or not, so that results pair.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from trtkit.quality.journal import Journal
from trtkit.spec.engine import EngineInfo, Scorer, ScoreRequest, ScoreResult
from trtkit.spec.errors import MeasurementError, UsageError
from trtkit.spec.progress import Progress, no_progress
from trtkit.spec.units import MIB

EVICT_AFTER = ("shots", "question")
_LOGIT_BYTES = 4
_MAX_BATCH = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringRules:
    """How scoring is done: it is part of a record's protocol.

    `max_truncated` is the largest share of contexts that may be cut to fit the engine; `logits_budget_bytes` bounds
    tokens x vocabulary of one batch.
    """

    evict_after: str = "shots"
    max_truncated: float = 0.0
    logits_budget_bytes: int = 256 * MIB

    def __post_init__(self) -> None:
        if self.evict_after not in EVICT_AFTER:
            raise UsageError(f"unknown eviction point {self.evict_after!r}: allowed are {', '.join(EVICT_AFTER)}")
        if not 0 <= self.max_truncated <= 1:
            raise UsageError(f"the share of truncated contexts is {self.max_truncated}, must be between 0 and 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One continuation to score; the first `shots_end` tokens of the context are worked examples (0: none)."""

    context_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]
    shots_end: int = 0


@dataclass(slots=True)
class ScoringCounts:
    """What happened while scoring: `acted` contexts were scored on a cache that had been evicted before."""

    contexts: int = 0
    acted: int = 0
    truncated: int = 0
    without_shots: int = 0
    evictions: int = 0
    tokens_evicted: int = 0
    resumed: int = 0


@dataclass(slots=True)
class ContinuationScorer:
    """Scores items on a `Scorer`: groups them by context, bounds batches, resumes from a journal, counts evictions."""

    scorer: Scorer
    info: EngineInfo
    rules: ScoringRules = field(default_factory=ScoringRules)
    journal: Journal = field(default_factory=Journal)
    engine_digest: str = ""
    progress: Progress = no_progress
    counts: ScoringCounts = field(default_factory=ScoringCounts)

    def budget_of(self, context_tokens: int) -> int:
        """Tokens the engine's policy keeps of one request's longest context, of which a share is taken. 0 without one."""
        policy = self.info.kv_policy
        return 0 if policy.is_full else policy.resolved(context_tokens).budget or 0

    def score(self, items: Sequence[Item], phase: str = "score") -> list[tuple[float, bool]]:
        """Sum of natural-log probabilities and "every token is the greedy one", per item in order.

        Raises:
            UsageError: more contexts than allowed must be truncated.
            MeasurementError: the engine refused a request or returned something that is no log-probability.
        """
        groups = self._groups(items)
        requests = {key: request for key, (request, _) in groups.items()}
        results = self._run(requests, phase)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(items)
        for key, (_, members) in groups.items():
            for index, continuation in members:
                answers[index] = results[key][continuation]
        return answers

    def _groups(self, items: Sequence[Item]) -> dict[str, tuple[ScoreRequest, list[tuple[int, int]]]]:
        """Journal key -> request and (item, continuation) pairs; equal contexts share one request."""
        by_context: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for index, item in enumerate(items):
            if not item.continuation_ids:
                raise MeasurementError("a continuation has no tokens, so it has no probability")
            by_context.setdefault((item.context_ids, item.shots_end), []).append(index)
        truncated = 0
        groups: dict[str, tuple[ScoreRequest, list[tuple[int, int]]]] = {}
        for (context, shots_end), indices in by_context.items():
            continuations = tuple(dict.fromkeys(items[i].continuation_ids for i in indices))
            cut, fitted_shots = self._fit(context, shots_end, max(map(len, continuations)))
            truncated += len(cut) < len(context)
            ends = self._chunk_ends(cut, fitted_shots)
            key = Journal.key(
                {"engine": self.engine_digest, "context": cut, "continuations": continuations, "chunk_ends": ends}
            )
            request = ScoreRequest(request_id=key, context_ids=cut, continuations=continuations, chunk_ends=ends)
            groups[key] = (request, [(i, continuations.index(items[i].continuation_ids)) for i in indices])
        self.count_truncated(truncated, len(by_context))
        return groups

    def _fit(self, context: tuple[int, ...], shots_end: int, longest: int) -> tuple[tuple[int, ...], int]:
        """Drop tokens from the left of a context that does not fit with its longest continuation."""
        room = self.info.max_seq_len - longest
        if room < 1:
            raise UsageError(
                f"a continuation of {longest} tokens does not fit an engine of max_seq_len {self.info.max_seq_len}; "
                "build one with a larger max_seq_len"
            )
        excess = max(0, len(context) - room)
        return context[excess:], max(0, shots_end - excess)

    def count_truncated(self, truncated: int, contexts: int) -> None:
        """Count contexts cut to fit the engine, and refuse when there are more than allowed."""
        self.counts.truncated += truncated
        self.counts.contexts += contexts
        if contexts and truncated / contexts > self.rules.max_truncated:
            raise UsageError(
                f"{truncated} of {contexts} contexts are longer than the engine's max_seq_len {self.info.max_seq_len} "
                f"and would be truncated (allowed: {self.rules.max_truncated:.1%}); build with a larger max_seq_len, "
                "use fewer shots, or allow it with --max-truncated"
            )

    def _chunk_ends(self, context: tuple[int, ...], shots_end: int) -> tuple[int, ...]:
        if self.rules.evict_after == "shots" and 0 < shots_end < len(context):
            return (shots_end,)
        self.counts.without_shots += self.rules.evict_after == "shots"
        return (len(context) - 1,) if len(context) > 1 else ()

    def _run(self, requests: dict[str, ScoreRequest], phase: str) -> dict[str, list[tuple[float, bool]]]:
        done = {key: value for key in requests if (value := self.journal.get(key)) is not None}
        self.counts.resumed += len(done)
        todo = [request for key, request in requests.items() if key not in done]
        # Long contexts first: the batch that could fail does so at once, and the ETA errs on the safe side.
        todo.sort(key=lambda r: (-len(r.context_ids), r.request_id))
        self.progress(phase, len(done), len(requests))
        for batch in self.batches(todo):
            for result in self.scorer.score(batch):
                done[result.request_id] = self._checked(requests[result.request_id], result)
                self.journal.put(result.request_id, done[result.request_id])
                self.progress(phase, len(done), len(requests))
        missing = [key for key in requests if key not in done]
        if missing:
            raise MeasurementError(f"the engine left {len(missing)} of {len(requests)} scoring requests unanswered")
        for key, request in requests.items():
            self.count_evictions(request, done[key])
        return {key: [(float(p), bool(g)) for p, g in done[key]["scores"]] for key in requests}

    def batches(self, requests: Sequence[ScoreRequest]) -> Iterator[list[ScoreRequest]]:
        """Slices whose logit rows times the vocabulary stay within the budget."""
        rows_allowed = max(1, self.rules.logits_budget_bytes // (self.info.vocab_size * _LOGIT_BYTES))
        batch: list[ScoreRequest] = []
        rows = 0
        for request in requests:
            needed = max(1, sum(map(len, request.continuations)))
            if batch and (rows + needed > rows_allowed or len(batch) >= _MAX_BATCH):
                yield batch
                batch, rows = [], 0
            batch.append(request)
            rows += needed
        if batch:
            yield batch

    @staticmethod
    def _checked(request: ScoreRequest, result: ScoreResult) -> dict[str, object]:
        """A result as the journal stores it, refused when it cannot be one."""
        if result.error is not None:
            raise MeasurementError(f"the engine refused to score a context: {result.error}")
        lengths = [len(score.logprobs) for score in result.continuations]
        if lengths != [len(c) for c in request.continuations]:
            raise MeasurementError(
                f"the engine scored {lengths} tokens of continuations of {[len(c) for c in request.continuations]}"
            )
        scores = [(math.fsum(s.logprobs), all(s.is_greedy)) for s in result.continuations]
        if not all(math.isfinite(value) and value <= 1e-3 for value, _ in scores):
            raise MeasurementError(f"the engine returned {scores[0][0]} as a log-probability; its logits are broken")
        return {"scores": scores, "evictions": result.evictions, "tokens_evicted": result.tokens_evicted}

    def count_evictions(self, request: ScoreRequest, value: dict[str, int]) -> None:
        """Add one stored result's evictions; it "acted" if a piece was longer than the budget before the score."""
        self.counts.evictions += value["evictions"]
        self.counts.tokens_evicted += value["tokens_evicted"]
        # A piece within the budget is never evicted before what follows is read.
        budget = self.budget_of(len(request.context_ids) + 1)
        self.counts.acted += value["evictions"] > 0 and any(end > budget for end in request.chunk_ends)
