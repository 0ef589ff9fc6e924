"""Scoring: continuations, pieces, rollback, refusals, and memory for the vocabulary."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from support.engine_models import make_hf, open_hf

from trtkit.engine import scoring
from trtkit.spec.engine import ContinuationScore, ScoreRequest, ScoreResult


@cache
def _hf() -> Any:
    return make_hf(num_key_value_heads=4)


def _ids(count: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(int(i) for i in np.random.default_rng(seed).integers(3, 96, count))


def _expected(context: tuple[int, ...], continuation: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities [len(continuation), V] by one uncached pass of transformers."""
    with torch.no_grad():
        logits = _hf()(torch.tensor([context + continuation]), use_cache=False).logits[0]
    return logits.log_softmax(-1)[len(context) - 1 : -1]


def _score(*requests: ScoreRequest, **options: Any) -> dict[str, ScoreResult]:
    with open_hf(_hf(), **options) as engine:
        results = {result.request_id: result for result in engine.score(requests)}
        engine.check()
        assert engine.kv_stats().blocks_used == 0
    return results


def _agrees(score: ContinuationScore, context: tuple[int, ...], continuation: tuple[int, ...]) -> None:
    expected = _expected(context, continuation)
    assert score.logprobs == pytest.approx([float(expected[i, t]) for i, t in enumerate(continuation)], abs=1e-4)
    assert list(score.is_greedy) == [int(expected[i].argmax()) == t for i, t in enumerate(continuation)]


def _request(name: str, length: int = 20, **fields: Any) -> ScoreRequest:
    continuations = ((7,), _ids(5, 1), _ids(12, 2), (), (9,), _ids(2, 3))
    values = {"context_ids": _ids(length, length), "continuations": continuations, **fields}
    return ScoreRequest(request_id=name, **values)


@pytest.mark.parametrize("tokens", [64, 3], ids=["roomy steps", "three tokens a step"])
def test_each_continuation_follows_its_context_and_not_its_siblings(tokens: int) -> None:
    requests = [_request("a", 20), _request("b", 7), _request("c", 31, chunk_ends=(10, 31))]
    results = _score(*requests, max_num_tokens=tokens)
    assert set(results) == {"a", "b", "c"}
    for request in requests:
        scores = results[request.request_id].continuations
        assert len(scores) == len(request.continuations)
        for score, continuation in zip(scores, request.continuations, strict=True):
            _agrees(score, request.context_ids, continuation)


def test_top_logprobs_are_the_best_in_order_at_every_position() -> None:
    request = _request("a", top_logprobs=3)
    (result,) = _score(request).values()
    for score, continuation in zip(result.continuations, request.continuations, strict=True):
        assert len(score.top) == len(continuation)
        for top, row in zip(score.top, _expected(request.context_ids, continuation), strict=True):
            assert [token for token, _ in top] == row.topk(3).indices.tolist()
            assert [value for _, value in top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_more_top_logprobs_than_the_vocabulary_gives_the_vocabulary() -> None:
    (result,) = _score(_request("a", top_logprobs=500)).values()
    assert len(result.continuations[0].top[0]) == 96


def test_a_small_pool_scores_one_request_after_the_other() -> None:
    requests = [_request(str(i), 20 + i) for i in range(6)]
    for name, result in _score(*requests, blocks=10).items():
        request = requests[int(name)]
        for score, continuation in zip(result.continuations, request.continuations, strict=True):
            _agrees(score, request.context_ids, continuation)


def test_two_requests_of_one_name_are_both_answered() -> None:
    with open_hf(_hf()) as engine:
        assert len(list(engine.score([_request("same"), _request("same")]))) == 2


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "empty context": ({"context_ids": ()}, "context is empty"),
    "too long": ({"context_ids": _ids(120)}, r"120 + 12 tokens, max_seq_len is 128"),
    "unknown id": ({"continuations": ((96,),)}, "a continuation holds token id 96"),
    "descending chunks": ({"chunk_ends": (5, 3)}, "chunk_ends must ascend"),
    "chunk past the end": ({"chunk_ends": (21,)}, "chunk_ends must ascend inside (0, 20]"),
    "chunk at zero": ({"chunk_ends": (0, 4)}, "chunk_ends must ascend"),
    "top": ({"top_logprobs": -1}, "top_logprobs is -1"),
    "pool": ({"context_ids": _ids(100)}, "needs 28 KV blocks, the pool has 12"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_request_says_why_and_the_next_is_scored(name: str) -> None:
    fields, line = REFUSED[name]
    results = _score(_request("bad", **fields), _request("good"), blocks=12)
    assert line in (results["bad"].error or "")
    assert results["bad"].continuations == ()
    assert results["good"].error is None


def test_the_vocabulary_matrix_is_met_by_a_bounded_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_LOGIT_ROWS", 4)
    seen: list[int] = []
    request = _request("a", 40)
    with open_hf(_hf()) as engine:
        original = engine._runner.logits

        def counted(hidden: torch.Tensor, tokens: list[int]) -> torch.Tensor:
            seen.append(len(tokens))
            return original(hidden, tokens)

        monkeypatch.setattr(engine._runner, "logits", counted)
        list(engine.score([request]))
    needed = 1 + sum(max(0, len(c) - 1) for c in request.continuations)
    assert max(seen) <= 4
    assert sum(seen) == needed, "rows that predict nothing must not meet the vocabulary"


def test_leaving_early_frees_the_pool() -> None:
    with open_hf(_hf(), max_batch_size=2) as engine:
        results = iter(engine.score([_request(str(i)) for i in range(4)]))
        next(results)
        results.close()  # type: ignore[attr-defined]
        assert engine.kv_stats().blocks_used == 0
