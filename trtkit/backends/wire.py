"""JSON lines between `RemoteEngine` and its child process: how requests, events and errors are spelled.

Tokens go as short lists, because there may be ten thousand a second and the child's time is being measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trtkit.spec import errors
from trtkit.spec.codec import from_plain, to_plain
from trtkit.spec.engine import (
    ContinuationScore,
    FinishReason,
    Request,
    Sampling,
    ScoreRequest,
    ScoreResult,
    TokenEvent,
)
from trtkit.spec.errors import EngineError, TrtkitError
from trtkit.spec.kv import KVPolicySpec

Message = dict[str, Any]


def dump(message: Mapping[str, Any] | list[Any]) -> bytes:
    """One line."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def pack_request(request: Request) -> Message:
    """A generation request, prompt ids as they are (checking each of 4,096 ids twice would cost milliseconds)."""
    return {
        "id": request.request_id,
        "prompt": request.prompt_ids,
        "max_tokens": request.max_tokens,
        "sampling": to_plain(request.sampling),
        "stop": request.stop_ids,
        "ignore_eos": request.ignore_eos,
        "kv": _pack_kv(request.kv),
    }


def unpack_request(data: Message) -> Request:
    """The inverse of `pack_request`."""
    return Request(
        request_id=data["id"],
        prompt_ids=tuple(data["prompt"]),
        max_tokens=data["max_tokens"],
        sampling=from_plain(Sampling, data["sampling"]),
        stop_ids=tuple(data["stop"]),
        ignore_eos=data["ignore_eos"],
        kv=_unpack_kv(data["kv"]),
    )


def pack_event(event: TokenEvent) -> list[Any]:
    """A token event, as a list."""
    finish = event.finish.value if event.finish else None
    return [event.request_id, event.index, event.token_id, event.time_ns, finish, event.error]


def unpack_event(data: list[Any]) -> TokenEvent:
    """The inverse of `pack_event`."""
    request_id, index, token_id, time_ns, finish, error = data
    return TokenEvent(
        request_id=request_id,
        index=index,
        token_id=token_id,
        time_ns=time_ns,
        finish=FinishReason(finish) if finish else None,
        error=error,
    )


def pack_score_request(request: ScoreRequest) -> Message:
    """A scoring request."""
    return {
        "id": request.request_id,
        "context": request.context_ids,
        "continuations": request.continuations,
        "chunk_ends": request.chunk_ends,
        "top_logprobs": request.top_logprobs,
        "kv": _pack_kv(request.kv),
    }


def unpack_score_request(data: Message) -> ScoreRequest:
    """The inverse of `pack_score_request`."""
    return ScoreRequest(
        request_id=data["id"],
        context_ids=tuple(data["context"]),
        continuations=tuple(tuple(ids) for ids in data["continuations"]),
        chunk_ends=tuple(data["chunk_ends"]),
        top_logprobs=data["top_logprobs"],
        kv=_unpack_kv(data["kv"]),
    )


def pack_score_result(result: ScoreResult) -> Message:
    """A scoring result; log-probabilities of minus infinity go as JSON's `-Infinity`."""
    return {
        "id": result.request_id,
        "continuations": [[c.logprobs, c.is_greedy, c.top] for c in result.continuations],
        "evictions": result.evictions,
        "tokens_evicted": result.tokens_evicted,
        "error": result.error,
    }


def unpack_score_result(data: Message) -> ScoreResult:
    """The inverse of `pack_score_result`."""
    return ScoreResult(
        request_id=data["id"],
        continuations=tuple(
            ContinuationScore(
                logprobs=tuple(logprobs),
                is_greedy=tuple(is_greedy),
                top=tuple(tuple((token, value) for token, value in position) for position in top),
            )
            for logprobs, is_greedy, top in data["continuations"]
        ),
        evictions=data["evictions"],
        tokens_evicted=data["tokens_evicted"],
        error=data["error"],
    )


def pack_overrides(overrides: Mapping[str, object]) -> Message:
    """What `open_engine` is called with; paths become strings, the KV policy an object."""
    packed = {
        key: _pack_kv(value) if isinstance(value, KVPolicySpec) else value
        for key, value in overrides.items()
        if value is not None
    }
    try:
        json.dumps(packed)
    except TypeError as error:
        raise EngineError(f"an override cannot be sent to the engine's process: {error}") from None
    return packed


def unpack_overrides(data: Message) -> dict[str, object]:
    """The inverse of `pack_overrides`."""
    return {key: _unpack_kv(value) if key == "kv" and isinstance(value, dict) else value for key, value in data.items()}


def pack_error(error: TrtkitError) -> Message:
    """An error for people: its class by name, and its line."""
    return {"class": type(error).__name__, "message": str(error)}


def unpack_error(data: Message) -> TrtkitError:
    """The same class with the same line; a class this side does not know becomes an `EngineError`."""
    cls = getattr(errors, str(data["class"]), EngineError)
    known = isinstance(cls, type) and issubclass(cls, TrtkitError)
    return (cls if known else EngineError)(data["message"])


def _pack_kv(policy: KVPolicySpec | None) -> Message | None:
    return None if policy is None else to_plain(policy)


def _unpack_kv(data: Message | None) -> KVPolicySpec | None:
    return None if data is None else from_plain(KVPolicySpec, data)
