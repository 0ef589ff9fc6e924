"""Hand-made request samples and repeats with round numbers."""

from __future__ import annotations

from trtkit.spec.engine import KVStats
from trtkit.spec.result import Repeat, RequestSample

MS = 1_000_000


def sample(
    name: str = "r0",
    *,
    submit_ms: float = 0,
    ttft_ms: float = 10,
    gaps_ms: tuple[float, ...] = (2, 2, 2),
    prompt: int = 4,
    error: str | None = None,
) -> RequestSample:
    """One request that got 1 + len(gaps_ms) tokens."""
    first = round((submit_ms + ttft_ms) * MS)
    gaps = tuple(round(gap * MS) for gap in gaps_ms)
    return RequestSample(
        request_id=name,
        prompt_tokens=prompt,
        output_tokens=1 + len(gaps),
        submit_ns=round(submit_ms * MS),
        first_token_ns=first,
        last_token_ns=first + sum(gaps),
        gaps_ns=gaps,
        finish="error" if error else "length",
        error=error,
    )


def repeat(*samples: RequestSample, index: int = 0, **kv: int) -> Repeat:
    """A repeat of these samples; `kv` sets counters of the pool."""
    stats = {"tokens_per_block": 16, "block_bytes": 64, "blocks_total": 100, "blocks_used": 0, "blocks_peak": 0, **kv}
    return Repeat(
        index=index,
        samples=samples,
        kv=KVStats(**stats),
        warmup_requests=1,
        duration_ns=max((s.last_token_ns or 0 for s in samples), default=0),
    )
