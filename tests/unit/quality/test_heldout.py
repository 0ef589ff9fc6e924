"""Held-out text: the windows, the arithmetic, and that an eviction is felt and counted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_scorer import BigramEngine
from support.synthetic_records import engine, environment

from trtkit.quality.heldout import (
    HeldoutRules,
    HeldoutScores,
    default_heldout,
    heldout_windows,
    load_texts,
    score_heldout,
)
from trtkit.quality.records import QualitySource
from trtkit.spec.engine import ContinuationScore, ScoreRequest, ScoreResult
from trtkit.spec.errors import InputError, MeasurementError, UsageError
from trtkit.spec.kv import KVPolicySpec

RULES = HeldoutRules(context=24, scored=8, piece=8)
SOURCE = QualitySource(engine=engine("fp32"), environment=environment())


def documents(*lengths: int, seed: int = 3) -> dict[str, list[int]]:
    generator = np.random.default_rng(seed)
    return {f"doc{i}": generator.integers(1, 300, n).tolist() for i, n in enumerate(lengths)}


def scored(fake: BigramEngine, rules: HeldoutRules = RULES) -> HeldoutScores:
    return score_heldout(fake, fake.info, heldout_windows(documents(100, 70), rules), SOURCE, rules=rules)


@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    context=st.integers(1, 40),
    scored=st.integers(1, 20),
    bos=st.sampled_from([None, 0]),
)
def test_windows_are_disjoint_runs_of_the_text(lengths: list[int], context: int, scored: int, bos: int | None) -> None:
    rules = HeldoutRules(context=context, scored=scored)
    texts = documents(*lengths)
    step = rules.window - (bos is not None)
    if max(lengths) < step:
        with pytest.raises(InputError, match="one window takes"):
            heldout_windows(texts, rules, bos_id=bos)
        return
    windows = heldout_windows(texts, rules, bos_id=bos)
    assert len({w.document for w in windows}) == len(windows) == sum(n // step for n in lengths)
    for name, ids in texts.items():
        joined: list[int] = []
        for window in (w for w in windows if w.group == name):
            assert len(window.context_ids) == context
            assert len(window.scored_ids) == scored
            whole = [*window.context_ids, *window.scored_ids]
            joined += whole if bos is None else whole[1:]
            assert bos is None or whole[0] == bos
        assert joined == ids[: len(joined)]


def test_windows_have_ids_that_follow_their_content() -> None:
    first = [w.document for w in heldout_windows(documents(100, 70), RULES)]
    assert first == [w.document for w in heldout_windows(documents(100, 70), RULES)]
    changed = documents(100, 70)
    changed["doc0"][3] += 1
    second = [w.document for w in heldout_windows(changed, RULES)]
    assert first[0] != second[0]
    assert first[1:] == second[1:]


def test_a_limit_spreads_over_all_documents() -> None:
    rules = dataclasses.replace(RULES, limit=4)
    windows = heldout_windows(documents(*[64] * 8), rules)
    assert [w.group for w in windows] == ["doc0", "doc2", "doc4", "doc6"]
    assert len(heldout_windows(documents(64), rules)) == 2
    assert "4 windows" in rules.protocol


def test_perplexity_and_accuracy_are_the_engines_own_numbers() -> None:
    fake = BigramEngine(max_seq_len=64)
    result = scored(fake)
    nats, hits = [], []
    for window in heldout_windows(documents(100, 70), RULES):
        cache, previous = list(window.context_ids), window.context_ids[-1]
        for token in window.scored_ids:
            row = fake.logprobs(cache, previous)
            nats.append(-row[token])
            hits.append(row.argmax() == token)
            cache.append(token)
            previous = token
    assert result.perplexity.score == pytest.approx(math.exp(np.mean(nats)))
    assert result.accuracy.score == pytest.approx(np.mean(hits))
    means = np.array(nats).reshape(-1, RULES.scored).mean(1)
    expected_error = result.perplexity.score * means.std(ddof=1) / math.sqrt(len(means))
    assert result.perplexity.stderr == pytest.approx(expected_error)
    assert [d.score for d in result.perplexity.documents] == pytest.approx(means)
    assert (result.perplexity.better, result.accuracy.better) == ("lower", "higher")
    assert (result.perplexity.unit, result.accuracy.unit) == ("ppl", "fraction")


def test_contexts_are_fed_in_pieces_up_to_their_end() -> None:
    fake = BigramEngine(max_seq_len=64)
    scored(fake)
    assert {request.chunk_ends for request in fake.scored} == {(8, 16, 24)}
    scored(fake, dataclasses.replace(RULES, piece=10))
    assert fake.scored[-1].chunk_ends == (10, 20, 24)


def test_an_eviction_changes_the_score_and_is_counted() -> None:
    full = scored(BigramEngine(max_seq_len=64))
    evicting = scored(BigramEngine(max_seq_len=64, kv=KVPolicySpec(kind="window", budget=6)))
    assert evicting.perplexity.score != full.perplexity.score
    assert [d.document for d in evicting.perplexity.documents] == [d.document for d in full.perplexity.documents]
    assert evicting.perplexity.valid
    windows = len(evicting.perplexity.documents)
    assert evicting.perplexity.evictions == 3 * windows
    assert evicting.perplexity.tokens_evicted == 18 * windows
    assert full.perplexity.evictions == 0


def test_a_policy_that_never_evicted_voids_the_record() -> None:
    result = scored(BigramEngine(max_seq_len=64, kv=KVPolicySpec(kind="window", budget=40)))
    assert not result.perplexity.valid
    assert not result.accuracy.valid


def test_one_window_has_no_standard_error() -> None:
    fake = BigramEngine(max_seq_len=64)
    result = score_heldout(fake, fake.info, heldout_windows(documents(40), RULES), SOURCE, rules=RULES)
    assert result.perplexity.stderr is None


def test_a_window_longer_than_the_engine_takes_is_refused() -> None:
    fake = BigramEngine(max_seq_len=31)
    with pytest.raises(UsageError, match="32 tokens do not fit the engine's max_seq_len 31"):
        scored(fake)
    assert not fake.scored


@pytest.mark.parametrize("sizes", [{"context": 0}, {"scored": 0}, {"piece": 0}, {"limit": -1}])
def test_sizes_that_make_no_window_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="must be at least 1"):
        HeldoutRules(**sizes)


class Broken(BigramEngine):
    """Answers with whatever `answer` makes of a right result, or not at all."""

    def __init__(self, **change: object) -> None:
        super().__init__(max_seq_len=64)
        self.change = change

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoreResult]:
        for result in super().score(requests):
            if self.change:
                yield dataclasses.replace(result, **self.change)


def one(*logprobs: float) -> tuple[ContinuationScore, ...]:
    return (ContinuationScore(logprobs=logprobs, is_greedy=(False,) * len(logprobs)),)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"error": "too long"}, "refused held-out window doc0/0/.*: too long"),
        ({"continuations": ()}, "did not score the 8 tokens"),
        ({"continuations": one(*[-1.0] * 7)}, "did not score the 8 tokens"),
        ({"continuations": one(*[-1.0] * 7, math.nan)}, "returned nan as a log-probability"),
        ({"continuations": one(*[-1.0] * 7, -math.inf)}, "returned -inf as a log-probability"),
        ({"continuations": one(*[-1.0] * 7, 0.5)}, "returned 0.5 as a log-probability"),
        ({}, "left 5 of 5 held-out windows unanswered"),
    ],
)
def test_an_engine_that_answers_nonsense_gives_no_score(change: dict[str, object], message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        scored(Broken(**change))


def test_texts_come_from_a_file_or_a_directory_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("beta")
    (tmp_path / "a.txt").write_text("alpha")
    (tmp_path / "c.md").write_text("not text")
    assert list(load_texts(tmp_path).items()) == [("a", "alpha"), ("b", "beta")]
    assert load_texts(tmp_path / "b.txt") == {"b": "beta"}


def test_texts_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \.txt file"):
        load_texts(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        load_texts(tmp_path / "absent.txt")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8 text"):
        load_texts(tmp_path)


def test_the_shipped_text_has_enough_windows_for_an_interval() -> None:
    texts = load_texts(default_heldout())
    assert len(texts) >= 8
    # Two to three bytes a token: this many characters make dozens of windows.
    assert sum(map(len, texts.values())) > 60_000
