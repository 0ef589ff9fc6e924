"""Texts from an engine: greedy or sampled, stopped at strings, resumable."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from trtkit.backends.tokenizer import Tokenizer
from trtkit.quality.journal import Journal
from trtkit.quality.scoring import ContinuationScorer
from trtkit.spec.codec import to_plain
from trtkit.spec.engine import Engine, KVStats, Request, Sampling, TokenEvent
from trtkit.spec.errors import MeasurementError
from trtkit.spec.progress import no_progress

_BYTES_PER_CHARACTER = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One text to generate; ends at `max_tokens`, at EOS or a `stop_ids` token, or before the first `stop` string."""

    prompt_ids: tuple[int, ...]
    max_tokens: int
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """A job's text with the stop string cut off, and the tokens it took."""

    text: str
    token_ids: tuple[int, ...]


def generate_texts(
    engine: Engine, decoder: Tokenizer, jobs: Sequence[Job], scoring: ContinuationScorer | None = None
) -> list[Generated]:
    """Run all jobs on the engine at once.

    `scoring` brings the journal that keeps finished texts, the progress, and the counts that are added to.

    Raises:
        MeasurementError: the engine refused a request.
    """
    journal = Journal() if scoring is None else scoring.journal
    progress = no_progress if scoring is None else scoring.progress
    digest = "" if scoring is None else scoring.engine_digest
    keys = [Journal.key({"engine": digest, "job": to_plain(job)}) for job in jobs]
    todo = {key: job for key, job in zip(keys, jobs, strict=True) if journal.get(key) is None}
    total = len(set(keys))
    before = engine.kv_stats()
    progress("generate", total - len(todo), total)
    finished = 0
    for key, ids in _run(engine, decoder, todo):
        text = cut_at(decoder.decode(ids), todo[key].stop)
        journal.put(key, {"text": text, "ids": ids})
        finished += 1
        progress("generate", total - len(todo) + finished, total)
    if finished < len(todo):
        raise MeasurementError(f"the engine left {len(todo) - finished} of {len(todo)} requests unanswered")
    results = [
        Generated(text=value["text"], token_ids=tuple(value["ids"])) for value in (journal.get(key) for key in keys)
    ]
    if scoring is not None:
        scoring.counts.resumed += total - len(todo)
        _count_evictions(scoring, jobs, results, (before, engine.kv_stats()), resumed=len(todo) < total)
    return results


def _count_evictions(
    scoring: ContinuationScorer,
    jobs: Sequence[Job],
    results: Sequence[Generated],
    stats: tuple[KVStats, KVStats],
    *,
    resumed: bool,
) -> None:
    """Add this run's evictions; a text was acted on if it outgrew the budget (kept texts evicted in their own run)."""
    evictions = max(0, (stats[1].evictions or 0) - (stats[0].evictions or 0))
    scoring.counts.evictions += evictions
    scoring.counts.tokens_evicted += max(0, (stats[1].tokens_evicted or 0) - (stats[0].tokens_evicted or 0))
    policy = scoring.info.kv_policy
    if policy.is_full or (evictions == 0 and not resumed):
        return
    for job, result in zip(jobs, results, strict=True):
        budget = scoring.budget_of(len(job.prompt_ids) + job.max_tokens)
        outgrown = len(job.prompt_ids) + len(result.token_ids) > budget + (policy.interval or 0)
        scoring.counts.acted += len(job.prompt_ids) > budget or outgrown


def _run(engine: Engine, decoder: Tokenizer, jobs: dict[str, Job]) -> Iterator[tuple[str, list[int]]]:
    tokens: dict[str, list[int]] = {key: [] for key in jobs}
    requests = (
        Request(
            request_id=key,
            prompt_ids=job.prompt_ids,
            max_tokens=job.max_tokens,
            sampling=job.sampling,
            stop_ids=job.stop_ids,
        )
        for key, job in jobs.items()
    )
    for event in engine.generate(requests):
        ids = tokens[event.request_id]
        _take(event, ids)
        if event.finish is not None:
            yield event.request_id, ids
        elif _stopped(decoder, ids, jobs[event.request_id].stop):
            engine.cancel(event.request_id)


def _take(event: TokenEvent, ids: list[int]) -> None:
    if event.error is not None:
        raise MeasurementError(f"the engine refused a prompt: {event.error}")
    if event.token_id is not None:
        ids.append(event.token_id)


def _stopped(decoder: Tokenizer, ids: list[int], stop: tuple[str, ...]) -> bool:
    """Whether a stop string is in the last tokens; only as many are decoded as can hold one."""
    if not stop:
        return False
    window = _BYTES_PER_CHARACTER * max(map(len, stop)) + _BYTES_PER_CHARACTER
    text = decoder.decode(ids[-window:])
    return any(s in text for s in stop)


def cut_at(text: str, stop: Iterable[str]) -> str:
    """The text before the first stop string."""
    for string in stop:
        if string:
            text = text.split(string)[0]
    return text
