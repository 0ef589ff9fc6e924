"""The gate: identical pairs pass, damage fails, noise neither fails nor hides, and every rule gives its reason."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.synthetic_records import bench, engine, environment, invalid, stat

from trtkit.quality.gate import Status, run_gate
from trtkit.quality.gate_output import gate_junit, gate_markdown, gate_text, write_outputs
from trtkit.quality.rules import parse_drop, parse_rule
from trtkit.quality.sides import Side
from trtkit.spec.errors import OutputError
from trtkit.spec.result import BenchResult, Check, DocumentOutcome, MetricResult, QualityResult, Stat


def quality(
    scores: Sequence[float],
    *,
    name: str = "fp32",
    task: str = "mmlu",
    metric: str = "acc",
    unit: str = "fraction",
    better: str = "higher",
    values: float | None = None,
    reference: str | None = None,
) -> QualityResult:
    documents = tuple(
        DocumentOutcome(
            document=f"d{i}", group=f"g{i % 3}", score=float(s), values=() if values is None else (values, values - 1)
        )
        for i, s in enumerate(scores)
    )
    return QualityResult(
        engine=engine(name),
        task=task,
        metric=metric,
        unit=unit,
        better=better,
        protocol="5-shot",
        score=float(np.mean(scores)),
        stderr=0.01,
        documents=documents,
        evictions=0,
        tokens_evicted=0,
        environment=environment(),
        reference=None if reference is None else engine(reference),
    )


def side(name: str = "fp32", *records: QualityResult | BenchResult) -> Side:
    return Side(
        engine=engine(name),
        bench=tuple(r for r in records if isinstance(r, BenchResult)),
        quality=tuple(r for r in records if isinstance(r, QualityResult)),
    )


def right(count: int, total: int) -> list[float]:
    return [1.0] * count + [0.0] * (total - count)


MMLU = (parse_rule("max_mmlu_drop", 2),)


def test_an_identical_pair_passes_every_rule() -> None:
    a = side("fp32", quality(right(70, 100), values=-1.0), bench())
    rules = (*MMLU, parse_rule("min_tps_gain", "1.0"), parse_rule("max_vram", "1GiB"), parse_rule("max_ttft_p50", "1s"))
    result = run_gate(a, a, rules)
    assert {outcome.status for outcome in result.outcomes} == {Status.PASS}
    assert result.exit_code == 0


def test_a_loss_beyond_the_limit_and_the_noise_fails() -> None:
    a, b = side("fp32", quality(right(700, 1000))), side("int8", quality(right(650, 1000), name="int8"))
    result = run_gate(a, b, MMLU)
    assert (result.status, result.exit_code) == (Status.FAIL, 1)
    assert "drop +5.00 points" in result.outcomes[0].reason


def test_a_loss_within_the_limit_passes_though_it_is_significant() -> None:
    a, b = side("fp32", quality(right(700, 1000))), side("int8", quality(right(685, 1000), name="int8"))
    assert run_gate(a, b, MMLU).status is Status.PASS


def noisy_pair(wins: int, losses: int, total: int) -> tuple[Side, Side]:
    reference = [0.0] * wins + [1.0] * losses + [1.0] * (total - wins - losses)
    candidate = [1.0] * wins + [0.0] * losses + [1.0] * (total - wins - losses)
    return side("fp32", quality(reference)), side("int8", quality(candidate, name="int8"))


def test_a_limit_tighter_than_the_noise_is_widened_to_it() -> None:
    a, b = noisy_pair(40, 52, 2000)
    result = run_gate(a, b, (parse_rule("max_mmlu_drop", 0.5),))
    assert result.status is Status.PASS
    assert "limit 0.5 widened to the noise of 0.9" in result.outcomes[0].reason


def test_too_few_documents_give_no_verdict_instead_of_a_pass() -> None:
    a, b = noisy_pair(1, 4, 30)
    result = run_gate(a, b, MMLU)
    assert (result.status, result.exit_code) == (Status.INVALID, 9)
    assert "documents would" in result.outcomes[0].reason


def test_without_rules_a_task_that_got_worse_fails() -> None:
    a, b = side("fp32", quality(right(700, 1000))), side("int8", quality(right(650, 1000), name="int8"))
    assert run_gate(a, b, ()).status is Status.FAIL
    assert run_gate(b, a, ()).status is Status.PASS


def test_without_rules_a_loss_that_too_few_documents_can_confirm_is_invalid() -> None:
    a, b = noisy_pair(1, 4, 30)
    assert run_gate(a, b, ()).exit_code == 9
    assert run_gate(b, a, ()).exit_code == 0
    with_bench = replace(b, bench=(bench(),))
    rule = (parse_rule("max_vram", "1GiB"),)
    assert run_gate(a, with_bench, rule).exit_code == 0, "with a rule of one's own, only a detectable loss fails"


def test_two_builds_of_one_plan_must_compute_the_same_numbers() -> None:
    a = side("int8", quality(right(70, 100), name="int8", values=-1.0))
    damaged = side("int8", quality(right(70, 100), name="int8", values=-1.03))
    result = run_gate(a, damaged, MMLU)
    assert result.status is Status.FAIL
    assert "same plan, same numbers" in result.outcomes[-1].rule
    other_plan = side("fp32", quality(right(70, 100), values=-1.03))
    assert run_gate(a, other_plan, MMLU).status is Status.PASS


def test_more_drift_from_a_third_engine_than_the_reference_has_fails() -> None:
    rng = np.random.default_rng(0)
    honest, damaged = 0.0002 + 5e-5 * rng.random(24), 0.0006 + 5e-5 * rng.random(24)
    a, b, c = (
        side("int8", quality(v, name="int8", metric="kl", unit="nats", better="lower", reference="fp32"))
        for v in (honest, damaged, honest + 2e-5)
    )
    assert run_gate(a, b, ()).status is Status.FAIL
    assert run_gate(a, c, ()).status is Status.PASS


@pytest.mark.parametrize(("limit", "status"), [("0.01", Status.PASS), ("0.001", Status.FAIL)])
def test_kl_against_the_reference_is_limited(limit: str, status: Status) -> None:
    drift = replace(
        quality([0.004, 0.006], name="int8", metric="kl", unit="nats", better="lower", reference="fp32"), stderr=0.0005
    )
    result = run_gate(side("fp32"), side("int8", drift), (parse_rule("max_kl", limit),))
    assert result.status is status


def test_a_missing_measurement_is_invalid_and_says_what_to_run() -> None:
    a = side("fp32", quality(right(70, 100)))
    for rule, hint in (
        ("max_ttft_p99", "trtkit bench"),
        ("max_kl", "eval --reference"),
        ("min_tps_gain", "trtkit bench"),
        ("max_vram", "trtkit bench"),
    ):
        outcome = run_gate(a, a, (parse_rule(rule, 1),)).outcomes[0]
        assert outcome.status is Status.INVALID
        assert hint in outcome.reason
    outcome = run_gate(a, a, (parse_drop("gsm8k", 1),)).outcomes[0]
    assert "no task like 'gsm8k'" in outcome.reason


def test_a_percentile_that_too_few_samples_bound_is_invalid() -> None:
    result = run_gate(side("fp32", bench()), side("int8", bench("int8")), (parse_rule("max_ttft_p99", "500ms"),))
    assert result.exit_code == 9
    assert "20 samples, 299 are needed" in result.outcomes[0].reason


def with_stat(record: BenchResult, metric: str, name: str, value: Stat) -> BenchResult:
    old = record.metrics[metric]
    new = MetricResult(unit=old.unit, source=old.source, samples=old.samples, stats={**old.stats, name: value})
    return replace(record, metrics={**record.metrics, metric: new})


@pytest.mark.parametrize(
    ("value", "spread", "status"),
    [(400, 0.02, Status.PASS), (600, 0.02, Status.FAIL), (505, 0.02, Status.PASS), (520, 0.5, Status.INVALID)],
)
def test_an_absolute_limit_counts_the_noise(value: float, spread: float, status: Status) -> None:
    record = with_stat(bench(), "ttft_ms", "p99", stat(value, spread=spread))
    assert run_gate(side("fp32"), side("fp32", record), (parse_rule("max_ttft_p99", "500ms"),)).status is status


def test_one_repeat_cannot_fail_narrowly() -> None:
    rule = (parse_rule("max_ttft_p99", "500ms"),)
    for value, status in ((490.0, Status.PASS), (520.0, Status.INVALID), (2000.0, Status.FAIL)):
        record = with_stat(bench(), "ttft_ms", "p99", Stat(value=value, repeats=(value,)))
        assert run_gate(side("fp32"), side("fp32", record), rule).status is status


@pytest.mark.parametrize(("limit", "status"), [("1.3", Status.PASS), ("1.49", Status.PASS), ("2", Status.FAIL)])
def test_a_gain_is_measured_against_the_reference(limit: str, status: Status) -> None:
    """The synthetic INT8 engine is 1.5 times as fast."""
    result = run_gate(side("fp32", bench()), side("int8", bench("int8")), (parse_rule("min_tps_gain", limit),))
    assert result.status is status


def test_a_gain_just_missed_within_noise_passes_and_says_so() -> None:
    result = run_gate(side("fp32", bench()), side("int8", bench("int8")), (parse_rule("min_tps_gain", "1.52"),))
    assert result.status is Status.PASS
    assert "widened to the noise" in result.outcomes[0].reason


def test_gains_of_latencies_are_turned_so_that_more_is_better() -> None:
    rule = (parse_rule("min_tpot_gain", "1.4"),)
    assert run_gate(side("fp32", bench()), side("int8", bench("int8")), rule).status is Status.PASS
    assert run_gate(side("int8", bench("int8")), side("fp32", bench()), rule).status is Status.FAIL


def test_memory_beyond_its_limit_fails() -> None:
    result = run_gate(side("fp32", bench()), side("fp32", bench()), (parse_rule("max_vram", "1MiB"),))
    assert result.status is Status.FAIL
    assert "limit 1.00 MiB" in result.outcomes[0].reason


def test_an_invalid_benchmark_gives_no_verdict() -> None:
    rules = (parse_rule("min_tps_gain", "1.0"), parse_rule("max_vram", "1GiB"), parse_rule("max_ttft_p50", "1s"))
    result = run_gate(side("fp32", bench()), side("fp32", invalid(bench())), rules)
    assert result.exit_code == 9
    assert all("above the limit of 900" in outcome.reason for outcome in result.outcomes)


def test_an_evaluation_whose_eviction_never_acted_gives_no_verdict() -> None:
    bad = replace(
        quality(right(70, 100), name="int8"),
        valid=False,
        checks=(Check(name="eviction acted", status="fail", detail="0 of 100 contexts"),),
    )
    for rules in (MMLU, ()):
        result = run_gate(side("fp32", quality(right(70, 100))), side("int8", bad), rules)
        assert result.exit_code == 9
        assert "0 of 100 contexts" in result.outcomes[0].reason


def test_different_documents_give_no_verdict() -> None:
    result = run_gate(side("fp32", quality(right(70, 100))), side("int8", quality(right(70, 99), name="int8")), MMLU)
    assert result.exit_code == 9
    assert "judged on different documents (100 and 99" in result.outcomes[0].reason


def test_nothing_shared_is_invalid_not_a_pass() -> None:
    assert run_gate(side("fp32"), side("int8"), ()).exit_code == 9


def test_a_failed_rule_outweighs_an_invalid_one() -> None:
    a, b = side("fp32", quality(right(700, 1000))), side("int8", quality(right(650, 1000), name="int8"))
    assert run_gate(a, b, (*MMLU, parse_rule("max_vram", "1GiB"))).exit_code == 1


def test_a_rule_on_a_named_metric_limits_that_metric_only() -> None:
    a, b = (
        side(n, quality([0.0, 0.1, 0.2, 0.3], name=n, metric="gold_logprob", unit="nats"), quality(right(5, 9), name=n))
        for n in ("fp32", "int8")
    )
    result = run_gate(a, b, (parse_drop("mmlu/gold_logprob", "0.1"),))
    assert [o.rule for o in result.outcomes] == [
        "max-drop mmlu/gold_logprob=0.1 [mmlu/gold_logprob]",
        "no task worse [mmlu/acc]",
    ]


def hostile_result():
    bad = quality(right(700, 1000), task='mmlu<script>|"&\x01')
    return run_gate(side("fp32", bad), side("int8", replace(bad, engine=engine("int8"))), MMLU)


def test_junit_is_well_formed_and_counts() -> None:
    a, b = side("fp32", quality(right(700, 1000))), side("int8", quality(right(650, 1000), name="int8"))
    suite = ET.fromstring(gate_junit(run_gate(a, b, (*MMLU, parse_rule("max_vram", "1GiB")))))
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", "1", "1")
    assert "drop +5.00 points" in suite.find("testcase/failure").get("message")
    assert ET.fromstring(gate_junit(hostile_result())).get("failures") == "0"


def test_markdown_escapes_what_records_hold() -> None:
    text = gate_markdown(hostile_result())
    assert "<script>" not in text
    assert "&lt;script&gt;\\|" in text


def test_text_ends_with_the_verdict() -> None:
    assert (
        gate_text(run_gate(side("fp32"), side("int8"), ()))
        .splitlines()[-1]
        .startswith("gate: INVALID (int8 against fp32")
    )


def test_a_summary_is_appended_and_junit_replaced(tmp_path: Path) -> None:
    result = run_gate(side("fp32"), side("int8"), ())
    junit, summary = tmp_path / "out" / "junit.xml", tmp_path / "summary.md"
    summary.write_text("before\n")
    for _ in range(2):
        write_outputs(result, junit=junit, summary=summary)
    assert summary.read_text().startswith("before\n")
    assert summary.read_text().count("### gate") == 2
    assert junit.read_text().count("<testsuite") == 1
    with pytest.raises(OutputError):
        write_outputs(result, junit=None, summary=tmp_path)
