"""What every backend can do: `Engine` generates, `Scorer` gives log-probabilities. Token ids only.

Times are `time.monotonic_ns()` of the machine, which all processes of one host share, so one piece of code
computes every latency whatever the backend.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol, runtime_checkable

from trtkit.spec.codec import LATER
from trtkit.spec.kv import KVPolicySpec
from trtkit.spec.speculation import SpeculationSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen; the default is greedy. `top_k` 0 and `top_p` 1 switch those filters off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One generation. Stops after `max_tokens`, or after a token in `stop_ids`, or at EOS unless `ignore_eos`.

    The stopping token is emitted. `kv` overrides the engine's policy for this request.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    kv: KVPolicySpec | None = None


class FinishReason(str, Enum):
    """Why a request ended."""

    LENGTH = "length"
    STOP = "stop"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenEvent:
    """One token of one request, when it existed.

    `index` counts a request's output tokens from 0. The last event of a request has `finish` set; a refused or
    cancelled request ends with an event whose `token_id` is None, and `error` says why in one line.
    """

    request_id: str
    index: int
    token_id: int | None
    time_ns: int
    finish: FinishReason | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class KVStats:
    """The block pool, now and at its peak. `block_bytes` covers keys and values of all layers.

    `prompt_tokens_reused` were found in blocks of earlier requests and not computed again; `blocks_cached` are free
    blocks that still hold such tokens. None where the runtime does not tell.

    `evictions` counts rounds over all requests, `tokens_evicted` and `blocks_freed` what they released (tokens
    are per sequence: every KV head drops as many), each None where the runtime does not tell; `side_bytes` is what a
    policy stores besides keys and values. `draft_tokens` were guessed and checked by speculation, `accepted_tokens` of
    them right and written: each saved its request a step; None where the runtime does not tell.
    """

    tokens_per_block: int
    block_bytes: int
    blocks_total: int
    blocks_used: int
    blocks_peak: int
    requests_running: int = 0
    requests_waiting: int = 0
    requests_peak: int = 0
    preemptions: int = 0
    evictions: int | None = 0
    tokens_evicted: int | None = 0
    blocks_freed: int | None = 0
    side_bytes: int = 0
    prompt_tokens_reused: int | None = field(default=0, metadata=LATER)
    blocks_cached: int | None = field(default=0, metadata=LATER)
    draft_tokens: int | None = field(default=0, metadata=LATER)
    accepted_tokens: int | None = field(default=0, metadata=LATER)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """What an opened engine is: sizes in bytes per rank, limits as they took effect.

    `notes` say, one line each, what does not run as it should, such as a kernel that fell back to plain torch.
    `device_memory` splits a GPU's bytes after opening, by what holds them; empty where nobody can tell.
    """

    target: str
    device: str
    vocab_size: int
    max_seq_len: int
    max_batch_size: int
    max_num_tokens: int
    weight_bytes: int
    kv_pool_bytes: int
    kv_policy: KVPolicySpec
    eos_ids: tuple[int, ...] = ()
    pid: int | None = None
    notes: tuple[str, ...] = ()
    device_memory: Mapping[str, int] = field(default_factory=dict)
    speculation: SpeculationSpec | None = field(default=None, metadata=LATER)


@runtime_checkable
class Engine(Protocol):
    """Generates tokens for many requests at once.

    `generate` takes any iterable of requests. It is asked for the next one whenever the engine could admit more;
    it may yield None to say "none right now, go on and ask again", which is how a load generator holds a
    concurrency or an arrival time. Events come in the order of time; each request ends with exactly one event
    whose `finish` is set.
    """

    @property
    def info(self) -> EngineInfo:
        """Sizes and limits."""

    def generate(self, requests: Iterable[Request | None]) -> Iterator[TokenEvent]:
        """Run `requests`, yielding one event per token."""

    def cancel(self, request_id: str) -> None:
        """End a request early; its last event says CANCELLED. Unknown or finished ids are ignored."""

    def kv_stats(self) -> KVStats:
        """The block pool at this moment."""

    def close(self) -> None:
        """Release everything. Safe to call twice."""

    def __enter__(self) -> Engine: ...

    def __exit__(self, *exc_info: object) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRequest:
    """Log-probabilities of several continuations of one context.

    The context is fed in pieces that end at `chunk_ends` (ascending positions in (0, len(context_ids)]; the end of
    the context is implied). A policy evicts after each piece, so that what follows is scored on the evicted
    cache; with no `chunk_ends` the context is one piece and the first continuation token never sees an eviction.
    `top_logprobs` asks for that many best (id, log-probability) pairs at every continuation position, at most the
    vocabulary.
    """

    request_id: str
    context_ids: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    chunk_ends: tuple[int, ...] = ()
    top_logprobs: int = 0
    kv: KVPolicySpec | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ContinuationScore:
    """One continuation: natural-log probability and greedy match of each token; `top` per position, best first."""

    logprobs: tuple[float, ...]
    is_greedy: tuple[bool, ...]
    top: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreResult:
    """Scores in the order of the request's continuations, and whether eviction acted on this request."""

    request_id: str
    continuations: tuple[ContinuationScore, ...] = ()
    evictions: int = 0
    tokens_evicted: int = 0
    error: str | None = None


@runtime_checkable
class Scorer(Protocol):
    """Scores continuations. Results come in any order, one per request."""

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        """Log-probabilities of each request's continuations after its context."""
