"""An engine that reuses blocks: what it saves, what it leaves alone, and that nothing of it can be seen in the text."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from support.device_engines import open_device
from support.engine_models import hf_greedy, make_hf, open_hf, spec_of, trtllm_tensors

from trtkit.engine.eviction import eviction_observer
from trtkit.engine.loop import EmbeddedEngine
from trtkit.engine.open import open_tensors, pool_blocks
from trtkit.spec.dtype import DType
from trtkit.spec.engine import FinishReason, Request, ScoreRequest
from trtkit.spec.errors import UsageError
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.plan import Limits

Opener = Callable[..., EmbeddedEngine]
SYSTEM = tuple(range(3, 43))


@cache
def _hf() -> Any:
    return make_hf()


@pytest.fixture(params=["cpu", "device"])
def opener(request: pytest.FixtureRequest) -> Opener:
    """Opens the CPU engine or the device path, with block reuse unless told otherwise."""
    make = {"cpu": open_hf, "device": open_device}[request.param]

    def opened(**options: Any) -> EmbeddedEngine:
        engine: EmbeddedEngine = make(_hf(), **{"enable_block_reuse": True, **options})
        return engine

    return opened


def _request(name: str, prompt: tuple[int, ...], count: int = 6, **fields: Any) -> Request:
    return Request(request_id=name, prompt_ids=prompt, max_tokens=count, **{"ignore_eos": True, **fields})


def _texts(engine: EmbeddedEngine, *requests: Request) -> dict[str, list[int]]:
    texts: dict[str, list[int]] = {}
    for event in engine.generate(requests):
        assert event.error is None
        texts.setdefault(event.request_id, []).append(event.token_id or 0)
    engine.check()
    assert engine.kv_stats().blocks_used == 0
    return texts


def test_a_second_prompt_computes_only_what_is_new(opener: Opener) -> None:
    engine = opener()
    questions = [(*SYSTEM, 50, 51), (*SYSTEM, 60, 61, 62)]
    told = [_texts(engine, _request("a", question))["a"] for question in questions]
    assert told == [hf_greedy(_hf(), question, 6) for question in questions]
    stats = engine.kv_stats()
    assert stats.prompt_tokens_reused == 40
    assert stats.blocks_cached is not None
    assert stats.blocks_cached >= 11


def test_prompts_that_arrive_together_compute_what_they_share_once(opener: Opener) -> None:
    engine = opener()
    questions = {str(token): (*SYSTEM, token, token + 1) for token in (50, 60, 70, 80)}
    told = _texts(engine, *(_request(name, question) for name, question in questions.items()))
    assert told == {name: hf_greedy(_hf(), question, 6) for name, question in questions.items()}
    assert engine.kv_stats().prompt_tokens_reused == 3 * 40


def test_a_conversation_computes_neither_question_nor_answer_again(opener: Opener) -> None:
    engine = opener()
    first = _texts(engine, _request("1", SYSTEM, 10))["1"]
    again = (*SYSTEM, *first, 50, 51)
    assert _texts(engine, _request("2", again))["2"] == hf_greedy(_hf(), again, 6)
    assert engine.kv_stats().prompt_tokens_reused == 48, (
        "all whole blocks of 49 tokens: the answer's last was never fed"
    )


def test_without_block_reuse_every_prompt_is_computed(opener: Opener) -> None:
    engine = opener(enable_block_reuse=False)
    for name in "ab":
        _texts(engine, _request(name, SYSTEM))
    stats = engine.kv_stats()
    assert (stats.prompt_tokens_reused, stats.blocks_cached) == (0, 0)


def test_a_step_that_fails_leaves_nothing_to_be_found(opener: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = opener()

    def fails(step: object) -> None:
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "launch", fails)
        with pytest.raises(RuntimeError, match="out of luck"):
            list(engine.generate([_request("a", SYSTEM)]))
    engine.check()
    assert engine.kv_stats().blocks_cached == 0
    assert _texts(engine, _request("a", SYSTEM))["a"] == hf_greedy(_hf(), SYSTEM, 6)
    assert engine.kv_stats().prompt_tokens_reused == 0


def test_leaving_in_the_middle_of_a_prompt_leaves_only_what_was_computed(opener: Opener) -> None:
    engine = opener(max_num_tokens=16)
    events = iter(engine.generate([_request("a", (7, 8)), _request("b", SYSTEM)]))
    next(events)
    events.close()  # type: ignore[attr-defined]
    engine.check()
    assert _texts(engine, _request("b", SYSTEM))["b"] == hf_greedy(_hf(), SYSTEM, 6)


def test_thousands_of_requests_leave_a_pool_whose_books_are_right(opener: Opener) -> None:
    engine = opener(blocks=16, max_seq_len=32)
    requests = (
        _request(str(index), tuple(3 + (index // 7 * place) % 11 for place in range(9 + index % 9)), 1)
        for index in range(2000)
    )
    for event in engine.generate(requests):
        assert event.finish is FinishReason.LENGTH
    engine.check()
    stats = engine.kv_stats()
    assert (stats.blocks_used, stats.requests_running) == (0, 0)
    assert 0 < (stats.blocks_cached or 0) <= 16
    assert len(engine._scheduler.prefixes or ()) == stats.blocks_cached, "what can be found is what is held"
    assert stats.prompt_tokens_reused


def test_scores_are_those_of_an_engine_that_never_saw_the_text(opener: Opener) -> None:
    request = ScoreRequest(request_id="s", context_ids=SYSTEM, continuations=((50, 51, 52), (60,)), top_logprobs=2)
    (fresh,) = opener(enable_block_reuse=False).score([request])
    engine = opener(blocks=12)
    _texts(engine, _request("a", SYSTEM, 2))
    assert list(engine.score([request])) == [fresh]
    engine.check()
    assert engine.kv_stats().prompt_tokens_reused == 0
    assert (engine.kv_stats().blocks_cached or 0) < 10, "scoring took memory that held tokens, as it may"
    assert _texts(engine, _request("a", SYSTEM))["a"] == hf_greedy(_hf(), SYSTEM, 6)


def test_eviction_and_block_reuse_are_refused_together(opener: Opener) -> None:
    with pytest.raises(UsageError, match=r"block reuse with KV policy 'h2o:.*--kv full or --no-reuse-prefix"):
        open_device(_hf(), policy=parse_kv_policy("h2o:16"), enable_block_reuse=True)
    with pytest.raises(UsageError, match="block reuse with KV policy"):
        open_tensors(
            spec_of(_hf()),
            trtllm_tensors(_hf()),
            limits=Limits(kv_memory_bytes=1 << 20, enable_block_reuse=True),
            kv_policy=parse_kv_policy("window:16"),
        )


@pytest.mark.parametrize("path", ["cpu", "device"])
def test_a_request_that_evicts_shares_nothing_and_is_served_as_ever(path: str) -> None:
    def opened(**options: Any) -> EmbeddedEngine:
        if path == "device":
            return open_device(_hf(), **options)
        model = spec_of(_hf())
        limits = {"max_batch_size": 8, "max_num_tokens": 64, "max_seq_len": 128, "tokens_per_block": 4, **options}
        return open_tensors(
            model,
            trtllm_tensors(_hf()),
            limits=Limits(**limits),
            observer_factory=eviction_observer(parse_kv_policy("full"), model),
        )

    evicting = _request("e", SYSTEM, 12, kv=parse_kv_policy("window:16"))
    alone = _texts(opened(), evicting)
    engine = opened(enable_block_reuse=True)
    _texts(engine, _request("a", SYSTEM))
    assert _texts(engine, evicting) == alone
    assert engine.kv_stats().evictions
    assert engine.kv_stats().prompt_tokens_reused == 0
    assert _texts(engine, _request("a", (*SYSTEM, 50)))["a"] == hf_greedy(_hf(), (*SYSTEM, 50), 6)
    assert engine.kv_stats().prompt_tokens_reused == 40, "its compacted blocks were never mistaken for the prompt"


def test_a_pool_that_sizes_itself_leaves_room_for_what_nobody_owns() -> None:
    model = spec_of(_hf())
    limits = Limits(max_batch_size=2, max_seq_len=64, tokens_per_block=4)
    reusing = Limits(max_batch_size=2, max_seq_len=64, tokens_per_block=4, enable_block_reuse=True)
    assert pool_blocks(model, limits, DType.FP32, 1 << 40) == 32
    assert pool_blocks(model, reusing, DType.FP32, 1 << 40) == 64
