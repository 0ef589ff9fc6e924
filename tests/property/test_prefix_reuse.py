"""Blocks of earlier requests are reused, and no token changes: whatever is shared, preempted, cancelled or stopped.

Sizes are small and vocabularies tiny, so that prompts meet by chance as well as by design.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.device_engines import Replays, open_device
from support.engine_models import make_hf, open_hf
from support.random_loads import Told, assert_same, play

from trtkit.engine.loop import EmbeddedEngine
from trtkit.engine.sequence import Sequence
from trtkit.engine.step import StepInput
from trtkit.spec.engine import Request, Sampling
from trtkit.spec.speculation import SpeculationSpec


@cache
def _hf() -> Any:
    return make_hf(num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2)


@dataclass(frozen=True)
class Work:
    """`shared` tokens of text `text`, then `own` tokens of its own."""

    text: int
    shared: int
    own: int
    new: int
    waits: int
    sampled: bool
    stops: int | None
    cancel_after: int | None


works = st.builds(
    Work,
    text=st.integers(0, 1),
    shared=st.integers(0, 22),
    own=st.integers(0, 8),
    new=st.integers(1, 30),
    waits=st.integers(0, 3),
    sampled=st.booleans(),
    stops=st.none() | st.none() | st.integers(3, 40),
    cancel_after=st.none() | st.none() | st.none() | st.integers(0, 8),
)


def _options(size: int, tokens: int, batch: int, step: int) -> dict[str, int]:
    blocks = -(-tokens // size)
    return {"blocks": blocks, "max_batch_size": batch, "max_num_tokens": step, "tokens_per_block": size}


engines = st.builds(
    _options,
    size=st.sampled_from([2, 4, 5]),
    tokens=st.integers(60, 90),  # the longest request just fits; a few of them do not
    batch=st.integers(2, 6),
    step=st.integers(6, 64),
)


def _request(index: int, work: Work) -> Request:
    head = tuple(3 + (5 * work.text + 11 * place) % 80 for place in range(work.shared))
    own = tuple(3 + (7 * index + 13 * place) % 80 for place in range(max(work.own, 1 - work.shared)))
    return Request(
        request_id=str(index),
        prompt_ids=head + own,
        max_tokens=work.new,
        sampling=Sampling(temperature=1.0, seed=index) if work.sampled else Sampling(),
        stop_ids=() if work.stops is None else tuple(range(work.stops, work.stops + 12)),
        ignore_eos=True,
    )


def _told(engine: EmbeddedEngine, load: list[Work]) -> dict[str, Told]:
    told = play(engine, load, _request)
    assert [ended.error for ended in told.values()] == [None] * len(load)
    return told


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(load=st.lists(works, min_size=1, max_size=8), options=engines)
def test_reuse_changes_no_token_on_the_cpu_engine(load: list[Work], options: dict[str, int]) -> None:
    plain = open_hf(_hf(), max_seq_len=64, **options)
    reusing = open_hf(_hf(), max_seq_len=64, enable_block_reuse=True, **options)
    told = _told(plain, load)
    assert_same(load, told, _told(reusing, load))
    # A second time, on whatever the first has left.
    assert_same(load, told, _told(reusing, load))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(load=st.lists(works, min_size=1, max_size=8), options=engines, late=st.integers(0, 1))
def test_reuse_changes_no_token_on_the_device_path(load: list[Work], options: dict[str, int], late: int) -> None:
    plain = open_device(_hf(), max_seq_len=64, late=late, **options)
    reusing = open_device(
        _hf(), max_seq_len=64, enable_block_reuse=True, late=late, capture=Replays() if late else None, **options
    )
    told = _told(plain, load)
    assert_same(load, told, _told(reusing, load))
    assert_same(load, told, _told(reusing, load))
    assert len(reusing._runner._free) == reusing.info.max_batch_size, "every place in the last tokens is free again"


class HalfRight:
    """Guesses what will be written, with every third position wrong."""

    def __init__(self, told: dict[str, Told]) -> None:
        self.told = told

    def propose(self, sequence: Sequence, most: int) -> list[int]:
        written = self.told[sequence.request_id].tokens
        start = len(sequence.output_ids)
        return [token if place % 3 else 95 - token for place, token in enumerate(written[start : start + most], start)]

    def forget(self, sequence: Sequence) -> None:
        pass


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    load=st.lists(works, min_size=1, max_size=6),
    options=engines,
    drafts=st.integers(1, 6),
    opened=st.sampled_from([open_hf, open_device]),
)
def test_reuse_and_guessing_together_change_no_token(
    load: list[Work], options: dict[str, int], drafts: int, opened: Callable[..., EmbeddedEngine]
) -> None:
    told = _told(opened(_hf(), max_seq_len=64, **options), load)
    guesses = SpeculationSpec(kind="ngram", max_draft_tokens=drafts, adaptive=False)
    both = opened(
        _hf(), max_seq_len=64, enable_block_reuse=True, speculation=guesses, proposer=HalfRight(told), **options
    )
    assert_same(load, told, _told(both, load))
    assert_same(load, told, _told(both, load))


class BrokenError(Exception):
    """What a launch raises."""


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    load=st.lists(works, min_size=1, max_size=6),
    options=engines,
    drafts=st.integers(0, 6),
    opened=st.sampled_from([open_hf, open_device]),
    fails_at=st.integers(0, 12),
    half_done=st.booleans(),
)
def test_what_a_failed_step_was_to_write_is_never_read(
    load: list[Work],
    options: dict[str, int],
    drafts: int,
    opened: Callable[..., EmbeddedEngine],
    fails_at: int,
    half_done: bool,
) -> None:
    told = _told(opened(_hf(), max_seq_len=64, **options), load)
    guesses = SpeculationSpec(max_draft_tokens=drafts, adaptive=False) if drafts else None
    engine = opened(
        _hf(), max_seq_len=64, enable_block_reuse=True, speculation=guesses, proposer=HalfRight(told), **options
    )
    launch, steps = engine._runner.launch, iter(range(1000))

    def breaks(step: StepInput) -> Any:
        fails = next(steps) == fails_at
        if fails and not half_done:
            raise BrokenError
        launched = launch(step)
        if fails:
            raise BrokenError
        return launched

    engine._runner.launch = breaks  # type: ignore[method-assign]
    with contextlib.suppress(BrokenError):
        _told(engine, load)
    engine._runner.launch = launch  # type: ignore[method-assign]
    engine.check()
    assert engine.kv_stats().blocks_used == 0
    assert_same(load, told, _told(engine, load))
