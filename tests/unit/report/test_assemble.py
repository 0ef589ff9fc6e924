"""What the comparison remarks on beside its tables."""

from __future__ import annotations

from dataclasses import replace

from support.synthetic_records import PRICES, bench

from trtkit.report.assemble import assemble
from trtkit.report.records import Records
from trtkit.spec.result import BenchResult
from trtkit.spec.speculation import SpeculationSpec


def _reusing(tokens: int | None) -> BenchResult:
    result = bench()
    limits = replace(result.engine.plan.limits, enable_block_reuse=True)
    engine = replace(result.engine, plan=replace(result.engine.plan, limits=limits))
    repeats = tuple(replace(r, kv=replace(r.kv, prompt_tokens_reused=tokens)) for r in result.repeats)
    load = replace(result.workload, shared_prefix_tokens=32)
    return replace(result, engine=engine, repeats=repeats, workload=load)


def _notes(result: BenchResult) -> str:
    return "\n".join(assemble(Records(bench=(result,), quality=()), PRICES).notes)


def test_what_block_reuse_saved_is_told_with_the_load_it_saved_it_on() -> None:
    result = _reusing(32)
    every = sum(sample.prompt_tokens for repeat in result.repeats for sample in repeat.samples)
    saved = 32 * len(result.repeats)
    assert f"ISL 64 (32 shared), OSL 32: {saved:,} of {every:,} prompt tokens were found" in _notes(result)


def test_a_runtime_that_does_not_tell_what_it_reused_is_not_taken_for_zero() -> None:
    assert "the runtime does not tell how many prompt tokens were" in _notes(_reusing(None))


def test_an_engine_without_block_reuse_gets_no_such_remark() -> None:
    assert "prompt tokens" not in _notes(bench())


def _guessing(drafted: int | None, accepted: int | None) -> BenchResult:
    result = bench()
    plan = replace(result.engine.plan, speculation=SpeculationSpec(max_draft_tokens=4))
    repeats = tuple(
        replace(r, kv=replace(r.kv, draft_tokens=drafted, accepted_tokens=accepted)) for r in result.repeats
    )
    return replace(result, engine=replace(result.engine, plan=plan), repeats=repeats)


def test_how_guesses_did_is_told_with_the_load_they_were_made_on() -> None:
    result = _guessing(400, 100)
    count = len(result.repeats)
    assert f"ISL 64, OSL 32: speculation ngram:4: {100 * count:,} of {400 * count:,} guessed tokens" in _notes(result)


def test_a_runtime_that_does_not_tell_its_guesses_is_not_taken_for_zero() -> None:
    assert "the runtime does not tell how many guesses were right" in _notes(_guessing(None, None))


def test_an_engine_without_speculation_gets_no_such_remark() -> None:
    assert "guess" not in _notes(bench())
