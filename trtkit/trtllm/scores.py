"""Scoring with TensorRT-LLM: the logits of one next token, asked for at every position of a continuation.

Prompt log-probabilities would need engines built to gather context logits (gigabytes of output buffer), are shifted by
one position between releases, and come back short when a prompt's blocks are reused. The logits of the token about to
be generated have none of these troubles: position i of a continuation is the next token after the context and the
first i continuation tokens. Each of these prefixes is computed whole: found blocks would change its logits in the last
bits, and with an 8-bit cache by more, so that a score depended on what was asked before (see `lower.kv_cache_arguments`).
A continuation of one token, as in multiple choice, costs its prompt; one of n tokens costs n prompts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from trtkit.spec.admission import check_score_request
from trtkit.spec.engine import ContinuationScore, ScoreRequest, ScoreResult
from trtkit.spec.errors import EngineError, TrtkitError, UnsupportedError
from trtkit.spec.plan import BuildPlan
from trtkit.trtllm.lower import logits_arguments

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Wait = Callable[[Coroutine[Any, Any, Any]], Any]


def score(
    requests: Iterable[ScoreRequest],
    llm: Any,  # noqa: ANN401 - TensorRT-LLM's `LLM`
    sampling_class: Callable[..., Any],
    plan: BuildPlan,
    wait: Wait,
) -> Iterator[ScoreResult]:
    """Score requests in order, each with all its positions in flight together.

    Raises:
        EngineError: the logits have an unexpected shape, or a prompt came back changed.
    """
    for request in requests:
        try:
            if request.kv is not None and request.kv != plan.kv:
                raise UnsupportedError(f"KV policy {request.kv.label}: the engine keeps {plan.kv.label}")
            check_score_request(request, plan.model.vocab_size, plan.limits.max_seq_len)
        except TrtkitError as error:
            yield ScoreResult(request_id=request.request_id, error=str(error))
            continue
        prompts = list(_prompts(request))
        rows = wait(_next_logits(prompts, llm, sampling_class, plan))
        yield _result(request, dict(zip(prompts, rows, strict=True)))


def _prompts(request: ScoreRequest) -> Iterator[tuple[int, ...]]:
    """Every prefix whose next token is asked for, each once, shortest first."""
    wanted = {
        request.context_ids + continuation[:index]
        for continuation in request.continuations
        for index in range(len(continuation))
    }
    yield from sorted(wanted, key=len)


async def _next_logits(
    prompts: Sequence[tuple[int, ...]],
    llm: Any,  # noqa: ANN401
    sampling_class: Callable[..., Any],
    plan: BuildPlan,
) -> list[NDArray[np.float64]]:
    """Next-token logits of each prompt, float64 [vocab]."""
    gate = asyncio.Semaphore(plan.limits.max_batch_size)

    async def ask(prompt: tuple[int, ...]) -> NDArray[np.float64]:
        async with gate:
            result = llm.generate_async(list(prompt), sampling_class(**logits_arguments()), streaming=False)
            done = await result.aresult()
        return _row(done, prompt, plan)

    return list(await asyncio.gather(*(ask(prompt) for prompt in prompts)))


def _row(result: Any, prompt: tuple[int, ...], plan: BuildPlan) -> NDArray[np.float64]:  # noqa: ANN401
    import numpy as np

    if tuple(result.prompt_token_ids) != prompt:
        raise EngineError(f"{plan.name}: TensorRT-LLM changed a prompt of {len(prompt)} tokens before running it")
    logits = result.outputs[0].generation_logits
    vocab = plan.model.vocab_size
    if logits is None or logits.shape[-1] < vocab or logits.numel() != logits.shape[-1]:
        shape = None if logits is None else tuple(logits.shape)
        raise EngineError(f"{plan.name}: expected the logits of one token over {vocab} ids, got shape {shape}")
    # A tensor-parallel lm_head may be padded beyond the vocabulary; those columns are no tokens.
    row: NDArray[np.float64] = logits.reshape(-1)[:vocab].double().cpu().numpy()
    return np.asarray(row)


def _result(request: ScoreRequest, rows: dict[tuple[int, ...], NDArray[np.float64]]) -> ScoreResult:
    import numpy as np

    scores = []
    for continuation in request.continuations:
        logprobs, greedy, top = [], [], []
        for index, token in enumerate(continuation):
            logits = rows[request.context_ids + continuation[:index]]
            values = logits - (logits.max() + np.log(np.exp(logits - logits.max()).sum()))
            logprobs.append(float(values[token]))
            greedy.append(bool(values[token] >= values.max()))
            if request.top_logprobs:
                best = np.argsort(-values, kind="stable")[: request.top_logprobs]
                top.append(tuple((int(i), float(values[i])) for i in best))
        scores.append(ContinuationScore(logprobs=tuple(logprobs), is_greedy=tuple(greedy), top=tuple(top)))
    return ScoreResult(request_id=request.request_id, continuations=tuple(scores))
