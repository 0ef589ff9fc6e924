"""`evaluate` from bundles to records: own prompts, drift, the sheet, resumption, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.fake_engine import fake_bundle
from support.fake_scorer import BigramEngine, ByteTokenizer
from support.synthetic_records import environment

import trtkit.quality.run as run_module
from trtkit.quality.prompts import PromptSet, read_prompts
from trtkit.quality.run import EvalRequest, evaluate
from trtkit.quality.show import records_text
from trtkit.quality.tasks import TaskSelection
from trtkit.report.records import load_records
from trtkit.spec.errors import InputError, MeasurementError, UnsupportedError, UsageError
from trtkit.spec.kv import KVPolicySpec


@pytest.fixture
def prompts(tmp_path: Path) -> PromptSet:
    path = tmp_path / "mine.jsonl"
    rows = [{"id": f"p{i}", "prompt": f"question {i}", "reference": "an answer", "check": "contains"} for i in range(6)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return read_prompts(path)


@pytest.fixture(autouse=True)
def tokenizers(monkeypatch: pytest.MonkeyPatch) -> dict[str, ByteTokenizer]:
    known: dict[str, ByteTokenizer] = {}
    monkeypatch.setattr(run_module, "load_tokenizer", lambda path: known.setdefault(path.parent.name, ByteTokenizer()))
    return known


def engines(**by_name: BigramEngine):
    """An opener that counts how often each engine was opened."""
    opened: list[str] = []

    def opener(path: Path) -> BigramEngine:
        opened.append(path.name.removesuffix(".engine"))
        return by_name[opened[-1]]

    return opener, opened


def test_own_prompts_leave_graded_answers_lengths_and_drift(tmp_path: Path, prompts: PromptSet) -> None:
    a, b = fake_bundle(tmp_path, "a"), fake_bundle(tmp_path, "b")
    opener, _ = engines(a=BigramEngine(), b=BigramEngine(seed=1))
    request = EvalRequest(
        engines=(b,), output_dir=tmp_path / "out", prompts=prompts, max_tokens=8, reference=a, sheet=tmp_path / "s.html"
    )
    records = {r.metric: r for r in evaluate(request, environment(), opener=opener)}
    assert set(records) == {"contains", "generated_tokens", "agreement", "kl", "nll"}
    assert all(len(r.documents) == 6 for r in records.values())
    assert records["kl"].score > 0.001
    assert 0 <= records["agreement"].score < 1
    assert records["kl"].reference is not None
    assert records["kl"].reference.name == "a"
    assert len(load_records([tmp_path / "out"]).quality) == 5
    assert (tmp_path / "s.html").is_file()
    assert "generated_tokens" in records_text(list(records.values()))


def test_an_engine_judged_against_itself_does_not_drift(tmp_path: Path, prompts: PromptSet) -> None:
    a = fake_bundle(tmp_path, "a")
    opener, _ = engines(a=BigramEngine())
    request = EvalRequest(engines=(a,), output_dir=tmp_path / "out", prompts=prompts, max_tokens=8, reference=a)
    records = {r.metric: r.score for r in evaluate(request, environment(), opener=opener)}
    assert (records["kl"], records["agreement"]) == (pytest.approx(0, abs=1e-12), 1.0)


def test_a_second_run_asks_the_engine_for_nothing(tmp_path: Path, prompts: PromptSet) -> None:
    a = fake_bundle(tmp_path, "a")
    request = EvalRequest(engines=(a,), output_dir=tmp_path / "out", prompts=prompts, max_tokens=8, reference=a)
    opener, _ = engines(a=BigramEngine())
    first = evaluate(request, environment(), opener=opener)
    silent = BigramEngine()
    silent.generate = lambda requests: iter(())  # type: ignore[method-assign,assignment,misc]
    opener, _ = engines(a=silent)
    second = evaluate(request, environment(), opener=opener)
    assert [r.documents for r in second] == [r.documents for r in first]
    assert silent.scored == []


def test_an_evicting_engine_whose_prompts_fit_the_budget_is_invalid(tmp_path: Path, prompts: PromptSet) -> None:
    a, b = fake_bundle(tmp_path, "a"), fake_bundle(tmp_path, "b", kv=KVPolicySpec(kind="window", budget=5))
    for budget, valid in ((5, True), (500, False)):
        opener, _ = engines(a=BigramEngine(), b=BigramEngine(kv=KVPolicySpec(kind="window", budget=budget)))
        request = EvalRequest(
            engines=(b,), output_dir=tmp_path / f"out{budget}", prompts=prompts, max_tokens=4, reference=a
        )
        kl = next(r for r in evaluate(request, environment(), opener=opener) if r.metric == "kl")
        assert kl.valid is valid
        assert (kl.evictions > 0) is valid


def test_different_vocabularies_are_refused_before_an_engine_is_opened(
    tmp_path: Path, prompts: PromptSet, tokenizers: dict[str, ByteTokenizer]
) -> None:
    a, b = fake_bundle(tmp_path, "a"), fake_bundle(tmp_path, "b")
    other = ByteTokenizer()
    other.vocab_size = 512
    tokenizers["b.engine"] = other
    opener, opened = engines(a=BigramEngine(), b=BigramEngine())
    request = EvalRequest(engines=(b,), output_dir=tmp_path / "out", prompts=prompts, reference=a)
    with pytest.raises(UsageError, match="different vocabularies \\(512 and 300 tokens\\)"):
        evaluate(request, environment(), opener=opener)
    assert opened == []


def test_an_engine_without_a_tokenizer_is_refused(
    tmp_path: Path, prompts: PromptSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(path: Path) -> None:
        raise InputError(f"{path}: no tokenizer")

    monkeypatch.setattr(run_module, "load_tokenizer", missing)
    request = EvalRequest(engines=(fake_bundle(tmp_path, "a"),), output_dir=tmp_path / "out", prompts=prompts)
    with pytest.raises(InputError, match="quality needs the model's tokenizer"):
        evaluate(request, environment(), opener=engines()[0])


def test_an_engine_that_cannot_score_is_refused(tmp_path: Path, prompts: PromptSet) -> None:
    class Mute:
        info = BigramEngine().info

        def __enter__(self):
            return self

        def __exit__(self, *exc_info: object) -> None:
            pass

    request = EvalRequest(engines=(fake_bundle(tmp_path, "a"),), output_dir=tmp_path / "out", prompts=prompts)
    with pytest.raises(UnsupportedError, match="gives no log-probabilities"):
        evaluate(request, environment(), opener=lambda _: Mute())  # type: ignore[arg-type,return-value]


def test_a_reference_that_answers_nothing_is_an_invalid_measurement(tmp_path: Path, prompts: PromptSet) -> None:
    a = fake_bundle(tmp_path, "a")
    engine = BigramEngine()
    engine.generate = lambda requests: iter(())  # type: ignore[method-assign,assignment,misc]
    request = EvalRequest(engines=(a,), output_dir=tmp_path / "out", prompts=prompts, reference=a)
    with pytest.raises(MeasurementError, match="unanswered"):
        evaluate(request, environment(), opener=engines(a=engine)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engines": ()}, "no engine given"),
        ({"prompts": None}, "nothing to evaluate"),
        ({"sheet": Path("s.html")}, "needs two engines"),
        ({"prompts": None, "tasks": TaskSelection(names=("x",)), "reference": Path("r")}, "give --prompts too"),
        ({"engines": (Path("a"), Path("b")), "reference": Path("r"), "sheet": Path("s")}, "2 are given"),
        ({"max_tokens": 0}, "--max-tokens is 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(prompts: PromptSet, change: dict, message: str) -> None:
    options = {"engines": (Path("a"),), "output_dir": Path("out"), "prompts": prompts}
    with pytest.raises(UsageError, match=message):
        EvalRequest(**(options | change))


def test_labels_reach_the_records(tmp_path: Path, prompts: PromptSet) -> None:
    request = EvalRequest(
        engines=(fake_bundle(tmp_path, "a"),), output_dir=tmp_path / "out", prompts=prompts, max_tokens=2
    )
    records = evaluate(replace(request, label="mine"), environment(), opener=engines(a=BigramEngine())[0])
    assert {r.engine.label for r in records} == {"mine"}
