"""The engine's behaviour towards its caller: refusals, cancelling, stopping, closing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from support.engine_models import make_hf, open_hf, spec_of, trtllm_tensors

from trtkit.engine.loop import EmbeddedEngine
from trtkit.engine.open import open_tensors
from trtkit.spec.engine import FinishReason, Request, Sampling, TokenEvent
from trtkit.spec.errors import EngineError
from trtkit.spec.kv import parse_kv_policy


@cache
def _hf() -> Any:
    return make_hf()


def _engine(**options: Any) -> EmbeddedEngine:
    return open_hf(_hf(), **options)


def _request(name: str = "a", prompt: tuple[int, ...] = (5, 6, 7), count: int = 6, **fields: Any) -> Request:
    return Request(request_id=name, prompt_ids=prompt, max_tokens=count, **{"ignore_eos": True, **fields})


def _run(engine: EmbeddedEngine, *requests: Request | None) -> dict[str, list[TokenEvent]]:
    events: dict[str, list[TokenEvent]] = {}
    for event in engine.generate(list(requests)):
        events.setdefault(event.request_id, []).append(event)
    engine.check()
    assert engine.kv_stats().blocks_used == 0
    return events


def _ids(events: list[TokenEvent]) -> list[int | None]:
    return [event.token_id for event in events]


def test_events_count_from_zero_and_only_the_last_says_why() -> None:
    events = _run(_engine(), _request())["a"]
    assert [event.index for event in events] == list(range(6))
    assert [event.finish for event in events] == [None] * 5 + [FinishReason.LENGTH]
    assert all(a.time_ns <= b.time_ns for a, b in pairwise(events))


def test_a_stop_id_ends_the_request_and_is_emitted() -> None:
    tokens = _ids(_run(_engine(), _request())["a"])
    assert tokens[2] is not None
    stopped = _run(_engine(), _request(stop_ids=(tokens[2],)))["a"]
    assert _ids(stopped) == tokens[: tokens.index(tokens[2]) + 1]
    assert stopped[-1].finish is FinishReason.STOP


def test_eos_ends_a_request_unless_it_is_ignored() -> None:
    hf = _hf()
    first = _ids(_run(_engine(), _request())["a"])[0]
    model = spec_of(hf)
    from dataclasses import replace

    engine = open_tensors(replace(model, eos_ids=(int(first or 0),)), trtllm_tensors(hf))
    assert [e.finish for e in _run(engine, _request(ignore_eos=False))["a"]] == [FinishReason.STOP]
    assert len(_run(engine, _request())["a"]) == 6


def test_output_ends_where_prompt_and_output_reach_max_seq_len() -> None:
    events = _run(_engine(max_seq_len=8), _request(count=100))["a"]
    assert len(events) == 5
    assert events[-1].finish is FinishReason.LENGTH


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "empty prompt": ({"prompt": ()}, "the prompt is empty"),
    "no tokens": ({"count": 0}, "max_tokens is 0"),
    "long prompt": ({"prompt": (5,) * 128}, "the prompt has 128 tokens, the engine's max_seq_len is 128"),
    "unknown id": ({"prompt": (5, 96)}, "token id 96, the vocabulary has ids 0 to 95"),
    "negative id": ({"prompt": (-1,)}, "token id -1"),
    "pool": ({"prompt": (5,) * 90}, "needs 24 KV blocks"),
    "temperature": ({"sampling": Sampling(temperature=-1.0)}, "temperature is -1.0"),
    "nan": ({"sampling": Sampling(temperature=float("nan"))}, "temperature is nan"),
    "top_k": ({"sampling": Sampling(top_k=-1)}, "top_k is -1"),
    "top_p": ({"sampling": Sampling(top_p=0.0)}, "top_p is 0.0"),
    "seed": ({"sampling": Sampling(seed=-3)}, "seed is -3"),
    "policy": ({"kv": parse_kv_policy("no-such-policy:8")}, "no-such-policy"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_request_says_why_in_one_line_and_disturbs_nobody(name: str) -> None:
    fields, line = REFUSED[name]
    alone = _ids(_run(_engine(blocks=20), _request("good"))["good"])
    events = _run(_engine(blocks=20), _request("bad", **fields), _request("good"))
    (refusal,) = events["bad"]
    assert (refusal.finish, refusal.token_id, refusal.index) == (FinishReason.ERROR, None, 0)
    assert line in (refusal.error or "")
    assert "\n" not in (refusal.error or "")
    assert _ids(events["good"]) == alone


def test_two_requests_of_one_name_at_once_are_refused() -> None:
    events = _run(_engine(), _request(), _request())["a"]
    assert sorted(e.finish for e in events if e.finish) == [FinishReason.ERROR, FinishReason.LENGTH]


def test_a_name_may_be_used_again_later() -> None:
    engine = _engine()
    assert _ids(_run(engine, _request())["a"]) == _ids(_run(engine, _request())["a"])


def test_cancelling_ends_one_request_and_frees_its_blocks() -> None:
    engine = _engine()
    events: dict[str, list[TokenEvent]] = {"a": [], "b": []}
    for event in engine.generate([_request("a", count=50), _request("b")]):
        events[event.request_id].append(event)
        if event.request_id == "a" and event.index == 1:
            engine.cancel("a")
    last = events["a"][-1]
    assert (last.finish, last.token_id, last.index) == (FinishReason.CANCELLED, None, len(events["a"]) - 1)
    assert len(events["a"]) < 10
    assert _ids(events["b"]) == _ids(_run(_engine(), _request("b"))["b"])
    assert engine.kv_stats().blocks_used == 0


def test_cancelling_an_unknown_or_finished_request_does_nothing() -> None:
    engine = _engine()
    engine.cancel("ghost")
    assert len(_run(engine, _request())["a"]) == 6
    engine.cancel("a")
    assert len(_run(engine, _request())["a"]) == 6, "a cancel that came too late hit the next request of that name"


def test_leaving_the_iterator_early_frees_everything() -> None:
    engine = _engine()
    events = iter(engine.generate([_request("a", count=50), _request("b", count=50)]))
    next(events)
    events.close()  # type: ignore[attr-defined]
    engine.check()
    assert (engine.kv_stats().blocks_used, engine.kv_stats().requests_running) == (0, 0)
    assert len(_run(engine, _request())["a"]) == 6


def test_a_source_that_has_nothing_right_now_is_asked_again() -> None:
    finished: list[str] = []

    def source() -> Iterator[Request | None]:
        yield _request("a")
        while "a" not in finished:
            yield None
        yield _request("b")

    engine = _engine()
    for event in engine.generate(source()):
        if event.finish:
            finished.append(event.request_id)
    assert finished == ["a", "b"]


def test_an_idle_engine_sleeps_between_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    monkeypatch.setattr(time, "sleep", naps.append)
    assert list(_engine().generate([None, None, None])) == []
    assert len(naps) == 3


def test_requests_are_taken_only_while_the_batch_has_room() -> None:
    taken: list[str] = []

    def source() -> Iterator[Request]:
        for i in range(6):
            taken.append(str(i))
            yield _request(str(i))

    engine = _engine(max_batch_size=2)
    next(iter(engine.generate(source())))
    assert taken == ["0", "1"]


def test_a_second_generate_at_the_same_time_is_refused() -> None:
    engine = _engine()
    events = iter(engine.generate([_request()]))
    next(events)
    with pytest.raises(EngineError, match="busy"):
        next(iter(engine.generate([_request()])))
    with pytest.raises(EngineError, match="busy"):
        next(iter(engine.score([])))


def test_close_twice_is_safe_and_a_closed_engine_says_so() -> None:
    engine = _engine()
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        list(engine.generate([_request()]))


def test_an_output_that_is_no_number_ends_its_request_with_an_error() -> None:
    tensors = trtllm_tensors(_hf())
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 3e38
    engine = open_tensors(spec_of(_hf()), tensors)
    (event,) = _run(engine, _request())["a"]
    assert event.finish is FinishReason.ERROR
    assert "not a number" in (event.error or "")


def test_what_a_freed_block_held_cannot_be_seen_by_its_next_owner() -> None:
    engine, clean = _engine(blocks=6), _engine(blocks=6)
    for layer in engine._runner.cache.layers:
        layer[: engine._runner.cache.num_blocks] = float("nan")
    assert _run(engine, _request()).keys() == {"a"}
    assert [_ids(v) for v in _run(engine, _request()).values()] == [_ids(v) for v in _run(clean, _request()).values()]


def test_stats_and_info_tell_the_pool_and_the_limits() -> None:
    engine = _engine(blocks=32, max_batch_size=3)
    _run(engine, *[_request(str(i)) for i in range(5)])
    stats = engine.kv_stats()
    assert (stats.blocks_total, stats.requests_peak, stats.preemptions) == (32, 3, 0)
    assert stats.blocks_peak == 3 * 2
    assert engine.info.kv_pool_bytes == stats.block_bytes * 32
    assert engine.info.weight_bytes == spec_of(_hf()).num_params * 4


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_runs_and_stays_near_float32(precision: str) -> None:
    from trtkit.spec.dtype import DType

    engine = open_tensors(spec_of(_hf()), trtllm_tensors(_hf()), dtype=DType.parse(precision))
    assert engine._runner.weights.dtype is getattr(torch, DType.parse(precision).trtllm_name)
    assert len(_run(engine, _request())["a"]) == 6
