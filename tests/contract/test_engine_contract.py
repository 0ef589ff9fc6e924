"""What every engine owes its callers, by the words of `trtkit.spec.engine`: in this process and in a child."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import write_bundle
from support.engine_models import make_hf, spec_of, trtllm_tensors

from trtkit.backends import open_engine
from trtkit.spec.engine import Engine, FinishReason, Request, Scorer, ScoreRequest


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    hf = make_hf()
    path = tmp_path_factory.mktemp("builds") / "tiny.engine"
    write_bundle(path, spec_of(hf), trtllm_tensors(hf))
    return path


@pytest.fixture(scope="module", params=[False, True], ids=["in process", "child"])
def engine(request: pytest.FixtureRequest, engine_dir: Path) -> Iterator[Any]:
    with open_engine(engine_dir, isolated=request.param) as opened:
        yield opened


def _request(name: str, prompt: int = 5, count: int = 4) -> Request:
    return Request(request_id=name, prompt_ids=(7,) * prompt, max_tokens=count, ignore_eos=True)


def test_it_is_an_engine_and_a_scorer(engine: Any) -> None:
    assert isinstance(engine, Engine)
    assert isinstance(engine, Scorer)


def test_each_request_ends_with_exactly_one_finish(engine: Any) -> None:
    requests = [_request("a"), _request("b", count=9), _request("empty", prompt=0), _request("long", prompt=64)]
    events = list(engine.generate(requests))
    finishes = {e.request_id: e.finish for e in events if e.finish}
    assert sum(e.finish is not None for e in events) == 4
    assert finishes == {
        "a": FinishReason.LENGTH,
        "b": FinishReason.LENGTH,
        "empty": FinishReason.ERROR,
        "long": FinishReason.ERROR,
    }
    for name in finishes:
        own = [e for e in events if e.request_id == name]
        assert own[-1].finish is not None
        assert [e.index for e in own] == list(range(len(own)))


def test_events_come_in_the_order_of_time(engine: Any) -> None:
    times = [e.time_ns for e in engine.generate([_request(str(i), count=6) for i in range(6)])]
    assert times == sorted(times)


def test_none_means_ask_again(engine: Any) -> None:
    events = list(engine.generate([None, _request("a"), None, None, _request("b")]))
    assert {e.request_id for e in events if e.finish} == {"a", "b"}


def test_tokens_repeat_between_calls(engine: Any) -> None:
    first, second = ([e.token_id for e in engine.generate([_request("a")])] for _ in range(2))
    assert first == second


def test_scores_come_one_per_request(engine: Any) -> None:
    requests = [
        ScoreRequest(request_id=str(i), context_ids=(5, 6, 7 + i), continuations=((8,), (9, 10))) for i in range(5)
    ]
    results = {r.request_id: r for r in engine.score(requests)}
    assert set(results) == set("01234")
    for result in results.values():
        assert [len(c.logprobs) for c in result.continuations] == [1, 2]
        assert all(value < 0 for c in result.continuations for value in c.logprobs)


def test_info_and_stats_agree_and_nothing_is_left_in_use(engine: Any) -> None:
    list(engine.generate([_request("a")]))
    stats = engine.kv_stats()
    assert stats.blocks_used == stats.requests_running == stats.requests_waiting == 0
    assert engine.info.kv_pool_bytes == stats.blocks_total * stats.block_bytes
    assert engine.info.target == "embedded"
    assert engine.info.max_seq_len == 64


@pytest.mark.parametrize("isolated", [False, True], ids=["in process", "child"])
def test_closing_twice_is_safe(engine_dir: Path, isolated: bool) -> None:
    engine = open_engine(engine_dir, isolated=isolated)
    engine.close()
    engine.close()
