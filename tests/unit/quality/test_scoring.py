"""Scoring: grouping, pieces that make eviction act, truncation counted, batches bounded, resumed work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.fake_scorer import BigramEngine

from trtkit.quality.journal import Journal
from trtkit.quality.scoring import ContinuationScorer, Item, ScoringRules
from trtkit.quality.selftest import check_alignment
from trtkit.spec.engine import ScoreResult
from trtkit.spec.errors import MeasurementError, UsageError
from trtkit.spec.kv import KVPolicySpec


def items(contexts: int = 3, length: int = 40, choices: int = 4) -> list[Item]:
    return [
        Item(
            context_ids=tuple((7 * c + 3 * i) % 300 for i in range(length)),
            continuation_ids=(100 + choice,),
            shots_end=length // 2,
        )
        for c in range(contexts)
        for choice in range(choices)
    ]


def scorer_of(engine: BigramEngine, **options: object) -> ContinuationScorer:
    return ContinuationScorer(scorer=engine, info=engine.info, **options)  # type: ignore[arg-type]


def test_scores_are_the_models_own_log_probabilities_in_order() -> None:
    engine = BigramEngine()
    asked = [
        Item(context_ids=(5, 6, 7), continuation_ids=(8, 9)),
        Item(context_ids=(5, 6), continuation_ids=(7,)),
        Item(context_ids=(5, 6, 7), continuation_ids=(10,)),
    ]
    answers = scorer_of(engine).score(asked)
    first = engine.logprobs([5, 6, 7], 7)[8] + engine.logprobs([5, 6, 7, 8], 8)[9]
    assert [a[0] for a in answers] == pytest.approx(
        [first, engine.logprobs([5, 6], 6)[7], engine.logprobs([5, 6, 7], 7)[10]]
    )


def test_greedy_is_reported_only_when_every_token_is() -> None:
    engine = BigramEngine(memory=0.0)
    best = int(engine.table[7].argmax())
    after = int(engine.table[best].argmax())
    asked = [
        Item(context_ids=(7,), continuation_ids=(best, after)),
        Item(context_ids=(7,), continuation_ids=(best, (after + 1) % 300)),
    ]
    assert [greedy for _, greedy in scorer_of(engine).score(asked)] == [True, False]


def test_all_choices_of_a_context_take_one_request() -> None:
    engine = BigramEngine()
    scorer_of(engine).score(items(contexts=3, choices=4))
    assert [len(r.continuations) for r in engine.scored] == [4, 4, 4]


def test_the_shots_are_evicted_before_the_question_is_read() -> None:
    engine = BigramEngine(kv=KVPolicySpec(kind="window", budget=8))
    scorer = scorer_of(engine)
    evicted = scorer.score(items())
    assert {r.chunk_ends for r in engine.scored} == {(20,)}
    assert (scorer.counts.acted, scorer.counts.evictions, scorer.counts.tokens_evicted) == (3, 3, 36)
    assert evicted != scorer_of(BigramEngine()).score(items())


def test_the_query_aware_variant_evicts_before_the_last_token() -> None:
    engine = BigramEngine(kv=KVPolicySpec(kind="window", budget=8))
    scorer_of(engine, rules=ScoringRules(evict_after="question")).score(items())
    assert {r.chunk_ends for r in engine.scored} == {(39,)}


def test_a_question_without_shots_is_evicted_before_its_last_token_and_counted() -> None:
    engine = BigramEngine(kv=KVPolicySpec(kind="window", budget=8))
    scorer = scorer_of(engine)
    scorer.score([Item(context_ids=tuple(range(30)), continuation_ids=(4,))])
    assert engine.scored[0].chunk_ends == (29,)
    assert scorer.counts.without_shots == 1


def test_a_context_within_the_budget_does_not_count_as_acted_on() -> None:
    engine = BigramEngine(kv=KVPolicySpec(kind="window", budget=64))
    scorer = scorer_of(engine)
    scorer.score(items())
    assert (scorer.counts.acted, scorer.counts.contexts) == (0, 3)


class EvictsAtTheEnd(BigramEngine):
    """Counts an eviction after the whole context, which is too late for the first token's score."""

    def score(self, requests):  # type: ignore[no-untyped-def]
        for result in super().score(requests):
            yield replace(result, evictions=1, tokens_evicted=4)


@pytest.mark.parametrize("budget", [{"budget": 30}, {"budget_fraction": 0.5}])
def test_an_eviction_after_the_last_piece_does_not_count_as_acted(budget: dict[str, float]) -> None:
    """The shots are 20 tokens, the context 40, the budget 30 (or half of the context and a token)."""
    engine = EvictsAtTheEnd(kv=KVPolicySpec(kind="window", **budget), max_seq_len=60)  # type: ignore[arg-type]
    scorer = scorer_of(engine)
    scorer.score(items())
    assert (scorer.counts.evictions, scorer.counts.acted) == (3, 0)


def test_a_context_that_does_not_fit_is_refused_by_default() -> None:
    scorer = scorer_of(BigramEngine(max_seq_len=32))
    with pytest.raises(UsageError, match=r"3 of 3 contexts are longer than the engine's max_seq_len 32"):
        scorer.score(items())


def test_an_allowed_truncation_keeps_the_end_and_is_counted() -> None:
    engine = BigramEngine(max_seq_len=32)
    scorer = scorer_of(engine, rules=ScoringRules(max_truncated=1.0))
    scorer.score(items(contexts=1))
    assert engine.scored[0].context_ids == items(contexts=1)[0].context_ids[-31:]
    assert engine.scored[0].chunk_ends == (11,), "the end of the shots moves with the cut"
    assert scorer.counts.truncated == 1


def test_batches_stay_within_tokens_times_vocabulary() -> None:
    engine = BigramEngine()
    rules = ScoringRules(logits_budget_bytes=8 * 300 * 4)
    scorer_of(engine, rules=rules).score(items(contexts=5, choices=4))
    assert engine.batches == [2, 2, 1]


def test_finished_documents_are_not_scored_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        first = scorer_of(BigramEngine(), journal=journal, engine_digest="x").score(items(contexts=2))
    engine = BigramEngine()
    with Journal(path) as journal:
        scorer = scorer_of(engine, journal=journal, engine_digest="x")
        again = scorer.score(items(contexts=3))
    assert again[: len(first)] == first
    assert len(engine.scored) == 1
    assert scorer.counts.resumed == 2


def test_another_engines_journal_entries_are_not_reused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        scorer_of(BigramEngine(), journal=journal, engine_digest="x").score(items())
    engine = BigramEngine(seed=1)
    with Journal(path) as journal:
        scorer_of(engine, journal=journal, engine_digest="y").score(items())
    assert len(engine.scored) == 3


def test_a_journal_cut_by_a_crash_keeps_what_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.put("a", 1)
        journal.put("b", 2)
    path.write_bytes(path.read_bytes()[:-4])
    with Journal(path) as journal:
        assert (journal.get("a"), journal.get("b"), journal.resumed) == (1, None, 1)
        journal.put("c", 3)
    with Journal(path) as journal:
        assert (journal.get("a"), journal.get("c")) == (1, 3)


class Broken(BigramEngine):
    """Answers with one field of every result replaced."""

    def __init__(self, **change: object) -> None:
        super().__init__()
        self.change = change

    def score(self, requests):  # type: ignore[no-untyped-def]
        for result in super().score(requests):
            fields = {n: getattr(result, n) for n in ("request_id", "continuations", "evictions", "error")}
            yield ScoreResult(**(fields | self.change))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"error": "no room"}, "refused to score a context: no room"), ({"continuations": ()}, "scored \\[\\] tokens")],
)
def test_a_broken_answer_is_an_invalid_measurement(change: dict[str, object], message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        scorer_of(Broken(**change)).score(items())


def test_an_engine_that_answers_nothing_is_an_invalid_measurement() -> None:
    engine = BigramEngine()
    engine.score = lambda requests: iter(())  # type: ignore[method-assign,assignment,misc]
    with pytest.raises(MeasurementError, match="left 3 of 3 scoring requests unanswered"):
        scorer_of(engine).score(items())


def test_nan_logits_are_an_invalid_measurement() -> None:
    engine = BigramEngine()
    engine.table[:] = float("nan")
    with pytest.raises(MeasurementError, match="nan as a log-probability"):
        scorer_of(engine).score(items())


def test_the_alignment_self_test_passes_on_an_aligned_engine() -> None:
    engine = BigramEngine()
    assert check_alignment(engine, engine, [(4, 5, 6), (9,)]).status == "pass"


@pytest.mark.parametrize("shift", [1, -1])
def test_the_alignment_self_test_catches_an_off_by_one(shift: int) -> None:
    engine = BigramEngine(shift=shift)
    with pytest.raises(MeasurementError, match="alignment self-test failed"):
        check_alignment(engine, engine, [(4, 5, 6), (9,)])


def test_unknown_eviction_points_are_refused() -> None:
    with pytest.raises(UsageError, match="allowed are shots, question"):
        ScoringRules(evict_after="never")
