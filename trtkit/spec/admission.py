"""What a request must be before it may queue. No tensors here; every refusal is one line."""

from __future__ import annotations

import math

from trtkit.spec.engine import Request, Sampling, ScoreRequest
from trtkit.spec.errors import UsageError


def check_request(request: Request, vocab_size: int, max_seq_len: int) -> int:
    """Returns how many tokens it may generate: `max_tokens`, cut where prompt and output reach `max_seq_len`.

    Raises:
        UsageError: naming what is wrong and what is allowed.
    """
    prompt_len = len(request.prompt_ids)
    if prompt_len == 0:
        raise UsageError("the prompt is empty; give at least one token")
    if request.max_tokens < 1:
        raise UsageError(f"max_tokens is {request.max_tokens}, must be at least 1")
    if prompt_len >= max_seq_len:
        raise UsageError(
            f"the prompt has {prompt_len} tokens, the engine's max_seq_len is {max_seq_len} including at least one "
            "token of output; shorten the prompt or build with a larger max_seq_len"
        )
    _check_ids(request.prompt_ids, vocab_size, "the prompt")
    _check_sampling(request.sampling)
    return min(request.max_tokens, max_seq_len - prompt_len)


def check_score_request(request: ScoreRequest, vocab_size: int, max_seq_len: int) -> None:
    """Refuse what cannot be scored.

    Raises:
        UsageError: naming what is wrong and what is allowed.
    """
    context_len = len(request.context_ids)
    longest = max(map(len, request.continuations), default=0)
    if context_len == 0:
        raise UsageError("the context is empty; give at least one token")
    if context_len + longest > max_seq_len:
        raise UsageError(
            f"context and continuation have {context_len} + {longest} tokens, max_seq_len is {max_seq_len}"
        )
    ends = request.chunk_ends
    if list(ends) != sorted(set(ends)) or (ends and not 0 < ends[0] <= ends[-1] <= context_len):
        raise UsageError(f"chunk_ends must ascend inside (0, {context_len}]")
    if request.top_logprobs < 0:
        raise UsageError(f"top_logprobs is {request.top_logprobs}, must not be negative")
    _check_ids(request.context_ids, vocab_size, "the context")
    for continuation in request.continuations:
        _check_ids(continuation, vocab_size, "a continuation")


def _check_ids(ids: tuple[int, ...], vocab_size: int, what: str) -> None:
    wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise UsageError(f"{what} holds token id {wrong}, the vocabulary has ids 0 to {vocab_size - 1}")


def _check_sampling(sampling: Sampling) -> None:
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise UsageError(f"temperature is {sampling.temperature}, must be 0 (greedy) or a positive number")
    if sampling.top_k < 0:
        raise UsageError(f"top_k is {sampling.top_k}, must be 0 (off) or positive")
    if not 0 < sampling.top_p <= 1:
        raise UsageError(f"top_p is {sampling.top_p}, must be above 0 and at most 1")
    if sampling.seed is not None and sampling.seed < 0:
        raise UsageError(f"seed is {sampling.seed}, must not be negative")
