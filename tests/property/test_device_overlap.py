"""Steps collected late write what steps collected at once write, whatever arrives, ends, is cancelled or preempted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.device_engines import Replays, open_device
from support.engine_models import make_hf
from support.random_loads import Told, assert_same, play

from trtkit.engine.loop import EmbeddedEngine
from trtkit.spec.engine import Request, Sampling
from trtkit.spec.kv import parse_kv_policy


@cache
def _hf() -> Any:
    return make_hf(num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2)


@dataclass(frozen=True)
class Work:
    prompt: int
    new: int
    waits: int
    sampled: bool
    stops: int | None
    cancel_after: int | None
    kv: str | None


works = st.builds(
    Work,
    prompt=st.integers(1, 40),
    new=st.integers(1, 14),
    waits=st.integers(0, 4),
    sampled=st.booleans(),
    stops=st.none() | st.integers(3, 40),
    cancel_after=st.none() | st.none() | st.integers(0, 8),
    kv=st.sampled_from([None, "full", "h2o:12", "window:8"]),
)
engines = st.fixed_dictionaries(
    {
        "blocks": st.integers(14, 40),
        "max_batch_size": st.integers(1, 6),
        "max_num_tokens": st.integers(40, 64),
        "tokens_per_block": st.sampled_from([2, 4, 5]),
    }
)


def _request(index: int, work: Work) -> Request:
    return Request(
        request_id=str(index),
        prompt_ids=tuple(3 + (7 * index + 11 * place) % 80 for place in range(work.prompt)),
        max_tokens=work.new,
        sampling=Sampling(temperature=1.0, seed=index) if work.sampled else Sampling(),
        stop_ids=() if work.stops is None else tuple(range(work.stops, work.stops + 12)),
        ignore_eos=True,
        kv=None if work.kv is None else parse_kv_policy(work.kv),
    )


def _told(engine: EmbeddedEngine, load: list[Work]) -> dict[str, Told]:
    told = play(engine, load, _request)
    assert len(engine._runner._free) == engine.info.max_batch_size, "every place in the last tokens is free again"
    assert not engine._runner.observer._watched
    return told


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(load=st.lists(works, min_size=1, max_size=8), options=engines)
def test_collecting_late_changes_no_token(load: list[Work], options: dict[str, int]) -> None:
    policy = parse_kv_policy("h2o:16")
    at_once = _told(open_device(_hf(), policy=policy, late=0, max_seq_len=64, **options), load)
    late = _told(open_device(_hf(), policy=policy, late=1, capture=Replays(), max_seq_len=64, **options), load)
    assert_same(load, at_once, late)
