"""Generated texts: stop strings, resumption, refusals."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from support.fake_scorer import EOS, BigramEngine, ByteTokenizer

from trtkit.quality.generation import Job, cut_at, generate_texts
from trtkit.quality.scoring import ContinuationScorer
from trtkit.spec.engine import FinishReason, TokenEvent
from trtkit.spec.errors import MeasurementError
from trtkit.spec.kv import KVPolicySpec


def writer(text: str) -> BigramEngine:
    """An engine that goes through the distinct letters of `text`, one after the other, then ends."""
    engine = BigramEngine(memory=0.0)
    engine.table = np.zeros((300, 300))
    ids = [*ByteTokenizer().encode(text), EOS]
    for previous, token in pairwise(ids):
        engine.table[previous, token] = 50
    return engine


def job(max_tokens: int = 20, stop: tuple[str, ...] = ()) -> Job:
    return Job(prompt_ids=tuple(ByteTokenizer().encode("a")), max_tokens=max_tokens, stop=stop)


def test_a_text_ends_at_eos() -> None:
    assert generate_texts(writer("abcdef"), ByteTokenizer(), [job()])[0].text == "bcdef"


def test_a_text_ends_before_its_stop_string_and_the_request_is_cancelled() -> None:
    engine = writer("abcdefgh")
    result = generate_texts(engine, ByteTokenizer(), [job(stop=("de",))])[0]
    assert result.text == "bc"
    assert len(result.token_ids) == 4
    assert engine.cancelled


def test_a_text_ends_at_its_length() -> None:
    assert generate_texts(writer("abcdef"), ByteTokenizer(), [job(max_tokens=2)])[0].text == "bc"


def test_equal_jobs_are_run_once_and_answered_each() -> None:
    results = generate_texts(writer("abc"), ByteTokenizer(), [job(), job(max_tokens=1), job()])
    assert [r.text for r in results] == ["bc", "b", "bc"]


def test_finished_texts_come_from_the_journal() -> None:
    engine = writer("abc")
    scoring = ContinuationScorer(scorer=engine, info=engine.info)
    generate_texts(engine, ByteTokenizer(), [job()], scoring)
    silent = writer("abc")
    silent.generate = lambda requests: iter(())  # type: ignore[method-assign,assignment,misc]
    assert generate_texts(silent, ByteTokenizer(), [job()], scoring)[0].text == "bc"
    assert scoring.counts.resumed == 1


@pytest.mark.parametrize(("budget", "acted"), [(3, 1), (100, 0)])
def test_texts_that_outgrew_the_budget_count_as_acted_on(budget: int, acted: int) -> None:
    engine = writer("abcdefgh")
    engine.kv = KVPolicySpec(kind="window", budget=budget)
    generate = engine.generate

    def evicting(requests):  # type: ignore[no-untyped-def]
        yield from generate(requests)
        engine.evictions += 2
        engine.tokens_evicted += 5

    engine.generate = evicting  # type: ignore[method-assign]
    scoring = ContinuationScorer(scorer=engine, info=engine.info)
    generate_texts(engine, ByteTokenizer(), [job()], scoring)
    assert (scoring.counts.acted, scoring.counts.evictions, scoring.counts.tokens_evicted) == (acted, 2, 5)


def test_an_engine_that_never_evicted_did_not_act() -> None:
    engine = writer("abcdefgh")
    engine.kv = KVPolicySpec(kind="window", budget=3)
    scoring = ContinuationScorer(scorer=engine, info=engine.info)
    generate_texts(engine, ByteTokenizer(), [job()], scoring)
    assert scoring.counts.acted == 0


def test_a_refused_prompt_is_an_invalid_measurement() -> None:
    engine = writer("abc")

    def refuse(requests):  # type: ignore[no-untyped-def]
        for request in requests:
            yield TokenEvent(
                request_id=request.request_id,
                index=0,
                token_id=None,
                time_ns=1,
                finish=FinishReason.ERROR,
                error="too long",
            )

    engine.generate = refuse  # type: ignore[method-assign,assignment]
    with pytest.raises(MeasurementError, match="refused a prompt: too long"):
        generate_texts(engine, ByteTokenizer(), [job()])


def test_the_first_stop_string_wins() -> None:
    assert cut_at("one two three", ["three", "two", ""]) == "one "
