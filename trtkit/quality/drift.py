"""How far an engine's next-token distributions are from a reference engine's, on the reference's own continuations.

Both engines read the same prompt and the same continuation (teacher forcing), so one early difference does not make
everything after it incomparable. Far more sensitive than accuracy: it sees every token, not one letter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trtkit.quality.journal import Journal
from trtkit.quality.scoring import ContinuationScorer
from trtkit.spec.engine import ScoreRequest
from trtkit.spec.errors import MeasurementError

TOP_LOGPROBS = 64
_REST_FLOOR = 1e-9
Top = Sequence[tuple[int, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Forced:
    """What one engine thinks at each position of one continuation: best tokens and the given token's log-probability."""

    top: tuple[tuple[tuple[int, float], ...], ...]
    logprobs: tuple[float, ...]


def force(context: ContinuationScorer, pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[Forced]:
    """Score (prompt, continuation) pairs with the best TOP_LOGPROBS tokens at every position.

    The prompt is evicted before its last token is read, so that an evicting engine is judged on what it kept.

    Raises:
        MeasurementError: the engine refused a pair.
    """
    requests: dict[str, ScoreRequest] = {}
    keys = []
    for prompt, continuation in pairs:
        key = Journal.key(
            {"engine": context.engine_digest, "prompt": prompt, "continuation": continuation, "top": TOP_LOGPROBS}
        )
        keys.append(key)
        requests[key] = ScoreRequest(
            request_id=key,
            context_ids=prompt,
            continuations=(continuation,),
            chunk_ends=(len(prompt) - 1,) if len(prompt) > 1 else (),
            top_logprobs=min(TOP_LOGPROBS, context.info.vocab_size),
        )
    _run(context, requests)
    for key, request in requests.items():
        value = context.journal.get(key)
        if value is None:
            raise MeasurementError("the engine left a teacher-forced continuation unanswered")
        context.counts.contexts += 1
        context.count_evictions(request, value)
    return [_forced(context.journal.get(key)) for key in keys]


def _run(context: ContinuationScorer, requests: dict[str, ScoreRequest]) -> None:
    todo = [request for key, request in requests.items() if context.journal.get(key) is None]
    done = len(requests) - len(todo)
    context.counts.resumed += done
    context.progress("drift", done, len(requests))
    for batch in context.batches(todo):
        for result in context.scorer.score(batch):
            if result.error is not None or not result.continuations:
                raise MeasurementError(f"the engine refused a continuation: {result.error or 'empty answer'}")
            score = result.continuations[0]
            value = {
                "top": score.top,
                "logprobs": score.logprobs,
                "evictions": result.evictions,
                "tokens_evicted": result.tokens_evicted,
            }
            context.journal.put(result.request_id, value)
            done += 1
            context.progress("drift", done, len(requests))


def _forced(value: dict[str, list[list[list[float]]]]) -> Forced:
    top = tuple(tuple((int(token), float(p)) for token, p in position) for position in value["top"])
    logprobs: Iterable[float] = value["logprobs"]  # type: ignore[assignment]
    return Forced(top=top, logprobs=tuple(logprobs))


def agreement(reference: Forced, candidate: Forced) -> float:
    """Share of positions where both think the same token is the most probable."""
    pairs = list(zip(reference.top, candidate.top, strict=True))
    return sum(a[0][0] == b[0][0] for a, b in pairs) / len(pairs)


def mean_kl(reference: Forced, candidate: Forced) -> float:
    """Mean over positions of the lower bound on KL(reference || candidate), in nats."""
    pairs = list(zip(reference.top, candidate.top, strict=True))
    return math.fsum(kl_lower_bound(a, b) for a, b in pairs) / len(pairs)


def kl_lower_bound(reference: Top, candidate: Top) -> float:
    """KL divergence over the tokens both lists name, all others lumped into one; exact when they name all.

    Lumping outcomes can only lower a KL divergence, so this never overstates it. Nats, at least 0.
    """
    known = dict(candidate)
    shared = [(p, known[token]) for token, p in reference if token in known]
    mass_p = math.fsum(math.exp(p) for p, _ in shared)
    mass_q = math.fsum(math.exp(q) for _, q in shared)
    kl = math.fsum(math.exp(p) * (p - q) for p, q in shared)
    rest_p, rest_q = 1 - mass_p, 1 - mass_q
    if rest_p > _REST_FLOOR:
        kl += rest_p * math.log(rest_p / max(rest_q, _REST_FLOOR))
    return max(0.0, kl)
