"""Speculation changes no token: whatever is guessed, arrives, ends, is cancelled, preempted or shared."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.device_engines import Replays, open_device
from support.engine_models import make_hf, open_hf
from support.random_loads import Told, assert_same, play

from trtkit.engine.loop import EmbeddedEngine
from trtkit.engine.sequence import Sequence, blocks_for
from trtkit.engine.speculation import NgramIndex
from trtkit.spec.engine import Request, Sampling
from trtkit.spec.speculation import SpeculationSpec

NOTHING_SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@cache
def _hf() -> Any:
    return make_hf(num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2, vocab_size=24)


@dataclass(frozen=True)
class Work:
    """A request; its prompt repeats every `period` tokens."""

    prompt: int
    period: int
    new: int
    waits: int
    temperature: float
    stops: int | None
    cancel_after: int | None


works = st.builds(
    Work,
    prompt=st.integers(1, 40),
    period=st.integers(1, 9),
    new=st.integers(1, 24),
    waits=st.integers(0, 4),
    temperature=st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    stops=st.none() | st.none() | st.integers(3, 20),
    cancel_after=st.none() | st.none() | st.integers(0, 12),
)
engines = st.fixed_dictionaries(
    {
        "blocks": st.integers(14, 40),
        "max_batch_size": st.integers(1, 9),
        "max_num_tokens": st.integers(1, 90),
        "tokens_per_block": st.sampled_from([1, 2, 4, 5]),
        "enable_block_reuse": st.booleans(),
    }
)
speculations = st.builds(
    SpeculationSpec,
    max_draft_tokens=st.integers(1, 8) | st.just(63),
    max_ngram=st.integers(1, 4),
    adaptive=st.booleans(),
)


class Scripted:
    """Guesses that have nothing to do with the text."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens or [0]
        self.asked = 0

    def propose(self, sequence: Sequence, most: int) -> Seq[int]:
        assert -2 not in sequence.output_ids, "all tokens are known when guesses are made"
        self.asked += 1
        start = self.asked % len(self.tokens)
        return [*self.tokens[start:], *self.tokens][: min(most, self.asked % 9)]

    def forget(self, sequence: Sequence) -> None:
        """Nothing is remembered."""


def _request(index: int, work: Work) -> Request:
    return Request(
        request_id=str(index),
        prompt_ids=tuple(3 + (7 * (index % 2) + 5 * (place % work.period)) % 20 for place in range(work.prompt)),
        max_tokens=work.new,
        sampling=Sampling(temperature=work.temperature, seed=index),
        stop_ids=() if work.stops is None else (work.stops, work.stops + 1),
        ignore_eos=work.stops is None,
    )


def _told(engine: EmbeddedEngine, load: list[Work]) -> dict[str, Told]:
    def nothing_is_held_for_wrong_guesses() -> None:
        for sequence in engine._scheduler.running:
            needed = blocks_for(sequence.cache_len, engine._limits.tokens_per_block)
            assert len(sequence.block_table) == needed, "what wrong guesses took is free again"

    told = play(engine, load, _request, nothing_is_held_for_wrong_guesses)
    stats = engine.kv_stats()
    assert 0 <= (stats.accepted_tokens or 0) <= (stats.draft_tokens or 0)
    return told


@settings(NOTHING_SLOW, max_examples=60)
@given(load=st.lists(works, min_size=1, max_size=8), options=engines, spec=speculations)
def test_the_cpu_engine_writes_the_same_with_guesses(
    load: list[Work], options: dict[str, int], spec: SpeculationSpec
) -> None:
    plain = _told(open_hf(_hf(), max_seq_len=64, **options), load)
    assert_same(load, plain, _told(open_hf(_hf(), max_seq_len=64, speculation=spec, **options), load))


@settings(NOTHING_SLOW, max_examples=60)
@given(load=st.lists(works, min_size=1, max_size=8), options=engines, spec=speculations, captured=st.booleans())
def test_the_device_path_writes_the_same_with_guesses(
    load: list[Work], options: dict[str, int], spec: SpeculationSpec, captured: bool
) -> None:
    capture = Replays() if captured else None
    plain = _told(open_device(_hf(), max_seq_len=64, **options), load)
    guessing = open_device(_hf(), max_seq_len=64, speculation=spec, capture=capture, **options)
    assert_same(load, plain, _told(guessing, load))
    assert len(guessing._runner._free) == options["max_batch_size"], "every place in the last tokens is free again"


@settings(NOTHING_SLOW, max_examples=60)
@given(
    load=st.lists(works, min_size=1, max_size=8),
    options=engines,
    spec=speculations,
    script=st.lists(st.integers(0, 23), max_size=12),
    device=st.booleans(),
)
def test_guesses_out_of_the_blue_change_nothing_but_speed(
    load: list[Work], options: dict[str, int], spec: SpeculationSpec, script: list[int], device: bool
) -> None:
    opened = open_device if device else open_hf
    plain = _told(opened(_hf(), max_seq_len=64, **options), load)
    guessing = opened(_hf(), max_seq_len=64, speculation=spec, proposer=Scripted(script), **options)
    assert_same(load, plain, _told(guessing, load))


@settings(NOTHING_SLOW, max_examples=40)
@given(load=st.lists(works, min_size=1, max_size=6), options=engines, spec=speculations)
def test_a_perfect_guess_is_accepted_to_the_last_token(
    load: list[Work], options: dict[str, int], spec: SpeculationSpec
) -> None:
    load = [replace(work, cancel_after=None, stops=None) for work in load]
    plain = _told(open_hf(_hf(), max_seq_len=64, **options), load)

    class Oracle:
        def propose(self, sequence: Sequence, most: int) -> Seq[int]:
            done = len(sequence.output_ids)
            return plain[sequence.request_id].tokens[done : done + most]

        def forget(self, sequence: Sequence) -> None:
            pass

    engine = open_hf(_hf(), max_seq_len=64, speculation=spec, proposer=Oracle(), **options)
    assert _told(engine, load) == plain
    stats = engine.kv_stats()
    assert stats.accepted_tokens == stats.draft_tokens


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 5), st.integers(1, 9), st.lists(st.integers(0, 60)))
def test_the_index_finds_what_a_search_through_the_text_finds(
    text: list[int], longest: int, most: int, cuts: list[int]
) -> None:
    index = NgramIndex(longest)
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    for start, stop in pairwise(bounds):
        index.extend(text[start:stop])
    assert index.continuation(most) == _searched(text, longest, most)


def _searched(text: list[int], longest: int, most: int) -> list[int]:
    for length in range(min(longest, len(text) - 1), min(2, longest) - 1, -1):
        for start in range(len(text) - length - 1, -1, -1):
            if text[start : start + length] == text[-length:]:
                grown = list(text)
                for offset in range(most):
                    grown.append(grown[start + length + offset])
                return grown[len(text) :]
    return []
