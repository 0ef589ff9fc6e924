"""Is a log-probability the one of the token that was asked for? Checked on the engine itself before any scoring.

Backends differ in whether entry i of their prompt log-probabilities belongs to token i or to token i + 1; reading one
as the other gives plausible numbers that are all wrong. What an engine has just generated greedily must also be what
it scores highest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from trtkit.spec.engine import Engine, Request, Scorer, ScoreRequest
from trtkit.spec.errors import MeasurementError
from trtkit.spec.kv import KVPolicySpec
from trtkit.spec.result import Check

TIE_NATS = 0.05
_TOKENS = 6


def check_alignment(engine: Engine, scorer: Scorer, prompts: Sequence[tuple[int, ...]]) -> Check:
    """Generate a few tokens per prompt greedily and score them, with the whole cache kept.

    Raises:
        MeasurementError: a generated token does not have the highest score (ties within TIE_NATS aside).
    """
    full = KVPolicySpec()
    room = engine.info.max_seq_len - _TOKENS
    requests = [
        Request(request_id=f"selftest-{i}", prompt_ids=p[-room:], max_tokens=_TOKENS, ignore_eos=True, kv=full)
        for i, p in enumerate(prompts)
    ]
    generated: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for event in engine.generate(requests):
        if event.error is not None:
            raise MeasurementError(f"alignment self-test: the engine refused a prompt: {event.error}")
        if event.token_id is not None:
            generated[event.request_id].append(event.token_id)
    scored = [
        ScoreRequest(
            request_id=r.request_id,
            context_ids=r.prompt_ids,
            continuations=(tuple(generated[r.request_id]),),
            top_logprobs=1,
            kv=full,
        )
        for r in requests
        if generated[r.request_id]
    ]
    tokens = worst = 0.0
    for result in scorer.score(scored):
        if result.error is not None:
            raise MeasurementError(f"alignment self-test: the engine refused to score: {result.error}")
        score = result.continuations[0]
        gaps = [top[0][1] - p for p, top in zip(score.logprobs, score.top, strict=True)]
        tokens += len(gaps)
        worst = max([worst, *(gap if math.isfinite(gap) else math.inf for gap in gaps)])
    if not tokens:
        raise MeasurementError("alignment self-test: the engine generated nothing, so nothing can be checked")
    if worst > TIE_NATS:
        raise MeasurementError(
            f"alignment self-test failed: a greedily generated token scores {worst:.3g} nats below the best one; "
            "this engine's log-probabilities do not belong to the tokens they are given for"
        )
    detail = f"{tokens:.0f} greedily generated tokens score highest (worst gap {worst:.1e} nats, {TIE_NATS} allowed)"
    return Check(name="alignment", status="pass", detail=detail)
