from __future__ import annotations

from dataclasses import replace

import pytest
from support.synthetic_records import bench, engine, environment, full_set, quality

from trtkit.report.columns import configurations
from trtkit.spec.dtype import DType
from trtkit.spec.kv import KVFidelity, parse_kv_policy
from trtkit.spec.result import BenchResult
from trtkit.spec.speculation import SpeculationSpec


def titles(*results: BenchResult) -> list[str]:
    return [c.column.title for c in configurations(results, ())[0]]


def with_engine(name: str, fidelity: KVFidelity, policy: str) -> BenchResult:
    result = bench(name)
    plan = replace(result.engine.plan, kv=parse_kv_policy(policy))
    return replace(result, engine=replace(result.engine, plan=plan, fidelity=fidelity))


def test_configurations_stand_in_the_published_order_whatever_the_order_of_records() -> None:
    cells, scores = full_set()
    expected = [
        "Baseline (FP32)",
        "INT8",
        "KV-pruned (H2O 50 %)",
        "Optimised (INT8 + H2O 50 % + tuned batching)",
    ]
    for order in (cells, cells[::-1]):
        found, notes = configurations(order, scores)
        assert [c.column.title for c in found] == expected
        assert notes == ()


def test_every_record_belongs_to_exactly_one_configuration() -> None:
    cells, scores = full_set()
    found, _ = configurations(cells, scores)
    assert sorted(id(r) for c in found for r in c.records) == sorted(id(r) for r in (*cells, *scores))


@pytest.mark.parametrize(
    ("fidelity", "policy", "title"),
    [
        (KVFidelity.EXACT, "h2o:50%", "KV-pruned (H2O 50 %)"),
        (KVFidelity.EXACT, "h2o:2048", "KV-pruned (H2O 2048 tokens)"),
        (KVFidelity.EXACT, "window:25%", "KV-pruned (sinks + window 25 %)"),
        (KVFidelity.EXACT, "mine:25%", "KV-pruned (mine 25 %)"),
        (KVFidelity.PREFILL_ONLY, "h2o:50%", "KV-pruned (H2O 50 %, prefill only)"),
        (KVFidelity.GENERATED_ONLY, "h2o:50%", "KV-pruned (H2O 50 % of generated tokens, prompt kept)"),
        (KVFidelity.WINDOW_ONLY, "h2o:50%", "KV-pruned (sinks + window 50 %, in place of H2O)"),
        (KVFidelity.WINDOW_ONLY, "window:50%", "KV-pruned (sinks + window 50 %)"),
    ],
)
def test_a_policy_is_called_by_the_name_it_has_earned(fidelity: KVFidelity, policy: str, title: str) -> None:
    assert titles(with_engine("fp32-h2o", fidelity, policy)) == [title]


@pytest.mark.parametrize(("kv", "title"), [("fp8", "INT8, FP8 KV"), ("fp32", "INT8"), (None, "INT8")])
def test_a_cache_narrower_than_the_computation_is_in_the_title(kv: str | None, title: str) -> None:
    record = bench("int8")
    quant = record.engine.plan.quant if kv is None else record.engine.plan.quant.with_kv(DType(kv))
    plan = replace(record.engine.plan, quant=quant)
    assert titles(replace(record, engine=replace(record.engine, plan=plan))) == [title]


def test_only_a_cache_that_is_tuned_otherwise_than_the_baseline_is_called_tuned() -> None:
    assert titles(bench("int8-h2o")) == ["Optimised (INT8 + H2O 50 %)"]
    assert "tuned batching" in titles(bench("fp32"), bench("int8-h2o"))[1]


def test_an_engine_that_reuses_prefixes_says_so() -> None:
    result = bench()
    plan = replace(result.engine.plan, limits=replace(result.engine.plan.limits, enable_block_reuse=True))
    reusing = replace(result, engine=replace(result.engine, plan=plan))
    (found,) = configurations([reusing], ())[0]
    assert (found.column.title, found.column.kv) == ("Baseline (FP32) + prefix reuse", "full, prefixes reused")
    assert titles(result) == ["Baseline (FP32)"]


def test_an_engine_that_guesses_says_so() -> None:
    plan = replace(bench().engine.plan, speculation=SpeculationSpec(max_draft_tokens=4))
    guessing = replace(bench(), engine=replace(bench().engine, plan=plan))
    assert titles(bench(), guessing) == ["Baseline (FP32)", "Baseline (FP32) + n-gram 4"]


def test_columns_of_one_title_are_told_apart_by_engine() -> None:
    other = replace(bench(), engine=replace(engine("fp32"), name="other", digest="other"))
    assert titles(bench(), other) == ["Baseline (FP32) [fp32]", "Baseline (FP32) [other]"]


def test_one_engine_on_two_machines_is_two_columns() -> None:
    other = replace(bench(), environment=environment(device="another CPU"))
    assert titles(bench(), other) == ["Baseline (FP32) [another CPU]", "Baseline (FP32) [synthetic CPU]"]


def test_titles_are_unique_even_when_nothing_readable_differs() -> None:
    here = bench()
    there = replace(here, environment=replace(here.environment, hostname_hash="another"))
    found = titles(here, there)
    assert len(set(found)) == 2


def test_a_label_makes_a_column_of_its_own() -> None:
    labelled = replace(bench(), engine=replace(engine("fp32"), label="night run"))
    assert titles(bench(), labelled)[1].startswith("Baseline (FP32), night run")


def test_the_newer_record_of_a_cell_counts_and_a_note_says_so() -> None:
    old, new = bench(), replace(bench(), environment=environment(started_utc="2026-05-05T00:00:00Z"))
    for order in ((old, new), (new, old)):
        found, notes = configurations(order, ())
        assert found[0].bench == (new,)
        assert len(notes) == 1
        assert "2026-05-05" in notes[0]


def test_a_score_without_a_benchmark_gets_a_column() -> None:
    found, _ = configurations([bench("fp32")], [quality("int8")])
    assert [(c.column.title, len(c.bench), len(c.quality)) for c in found] == [
        ("Baseline (FP32)", 1, 0),
        ("INT8", 0, 1),
    ]


def test_a_score_with_another_policy_does_not_join_the_engine() -> None:
    score = quality("fp32")
    plan = replace(score.engine.plan, kv=parse_kv_policy("h2o:50%"))
    found, _ = configurations([bench("fp32")], [replace(score, engine=replace(score.engine, plan=plan))])
    assert len(found) == 2
