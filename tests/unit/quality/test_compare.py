"""Side by side: ratios with their noise, paired quality, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from support.synthetic_records import bench, engine, environment, invalid, stat

from trtkit.quality.compare import compare_sides, noise_floor, ratio_interval
from trtkit.quality.paired import Verdict
from trtkit.quality.sides import Side
from trtkit.report.compare import FORMATS, render_comparisons
from trtkit.spec.errors import MeasurementError, UsageError
from trtkit.spec.result import BenchResult, DocumentOutcome, MetricResult, QualityResult


def quality(name: str, scores: list[float], *, group: str = "g", task: str = "mmlu", **change: object) -> QualityResult:
    documents = tuple(DocumentOutcome(document=f"d{i}", group=f"{group}{i % 4}", score=s) for i, s in enumerate(scores))
    record = QualityResult(
        engine=engine(name),
        task=task,
        metric="acc",
        unit="fraction",
        better="higher",
        protocol="5-shot",
        score=float(np.mean(scores)),
        stderr=0.01,
        documents=documents,
        evictions=0,
        tokens_evicted=0,
        environment=environment(),
    )
    return replace(record, **change)  # type: ignore[arg-type]


def side(name: str, *records: BenchResult | QualityResult) -> Side:
    return Side(
        engine=engine(name),
        bench=tuple(r for r in records if isinstance(r, BenchResult)),
        quality=tuple(r for r in records if isinstance(r, QualityResult)),
    )


def ratios(a: BenchResult, b: BenchResult) -> dict[str, object]:
    found = compare_sides([side("fp32", a), side("int8", b)])[0].ratios
    return {f"{r.metric}.{r.stat}": r for r in found}


def test_a_faster_engine_is_better_and_the_ratio_is_welchs() -> None:
    a, b = bench(), bench("int8")
    found = ratios(a, b)["tps.value"]
    logs = [np.log(r.metrics["tps"].stats["value"].repeats) for r in (a, b)]
    test = stats.ttest_ind(logs[1], logs[0], equal_var=False)
    interval = test.confidence_interval(0.95)
    assert found.ratio == pytest.approx(1.5)
    assert (found.low, found.high) == pytest.approx((math.exp(interval.low), math.exp(interval.high)), rel=1e-6)
    assert found.verdict is Verdict.BETTER


def test_lower_latency_is_better_and_higher_is_worse() -> None:
    assert ratios(bench(), bench("int8"))["ttft_ms.p50"].verdict is Verdict.BETTER
    assert ratios(bench("int8"), bench())["ttft_ms.p50"].verdict is Verdict.WORSE


def test_an_identical_pair_has_no_detectable_change_or_is_undecided_but_never_worse() -> None:
    verdicts = {r.verdict for r in ratios(bench(), bench()).values()}
    assert verdicts <= {Verdict.SAME, Verdict.UNDECIDED}


def with_tps(record: BenchResult, value: float, spread: float) -> BenchResult:
    metric = record.metrics["tps"]
    new = MetricResult(unit=metric.unit, source=metric.source, samples=20, stats={"value": stat(value, spread=spread)})
    return replace(record, metrics={"tps": new})


def test_a_change_inside_the_noise_is_not_called_one() -> None:
    found = ratios(with_tps(bench(), 100, 0.2), with_tps(bench("int8"), 104, 0.2))["tps.value"]
    assert found.verdict is Verdict.UNDECIDED
    assert found.noise == pytest.approx(0.2, rel=0.05)


def test_one_repeat_gives_no_verdict() -> None:
    one = bench("int8")
    metric = one.metrics["tps"]
    single = MetricResult(
        unit=metric.unit,
        source=metric.source,
        samples=20,
        stats={"value": replace(metric.stats["value"], repeats=(150.0,), low=None, high=None)},
    )
    found = ratios(bench(), replace(one, metrics={"tps": single}))["tps.value"]
    assert (found.verdict, found.low) == (Verdict.UNDECIDED, None)
    assert "fewer than two repeats" in found.reason


def test_an_invalid_record_gives_no_verdict_and_says_why() -> None:
    found = ratios(bench(), invalid(bench("int8")))["tps.value"]
    assert found.verdict is Verdict.UNDECIDED
    assert "above the limit of 900" in found.reason


def test_ratios_of_what_is_not_positive_are_absent() -> None:
    assert ratio_interval([1.0, 2.0], [0.0, 1.0]) == (None, None, None, None)
    assert noise_floor([1.0], [1.0, 2.0]) is None


def test_subjects_are_corrected_together() -> None:
    rng = np.random.default_rng(5)
    a = (rng.random(400) < 0.7).astype(float)
    b = a.copy()
    first = np.arange(400) % 4 == 0
    b[first & (a == 1)] = 0.0
    found = compare_sides([side("fp32", quality("fp32", a.tolist())), side("int8", quality("int8", b.tolist()))])[0]
    groups = {g.group: g.verdict for g in found.quality[0].groups}
    assert groups["g0"] is Verdict.WORSE
    assert {groups[f"g{i}"] for i in (1, 2, 3)} == {Verdict.UNDECIDED}


def test_a_subject_that_looks_worse_among_many_by_luck_is_not_called_worse() -> None:
    """Six lost and none won is p = 0.03 alone; among twenty subjects it is nothing."""
    a = [1.0] * 400
    b = [0.0 if i % 20 == 0 and i < 120 else 1.0 for i in range(400)]
    sides = [
        side(
            n,
            replace(
                quality(n, v),
                documents=tuple(replace(d, group=f"s{i % 20}") for i, d in enumerate(quality(n, v).documents)),
            ),
        )
        for n, v in (("fp32", a), ("int8", b))
    ]
    groups = {g.group: g for g in compare_sides(sides)[0].quality[0].groups}
    assert groups["s0"].adjusted_p == pytest.approx(min(1.0, 20 * 2 / 2**6))
    assert groups["s0"].verdict is not Verdict.WORSE


def test_documents_are_paired_by_identity_not_by_position() -> None:
    scores = [float(i % 2) for i in range(40)]
    a = quality("fp32", scores)
    b = replace(quality("int8", scores), documents=tuple(reversed(quality("int8", scores).documents)))
    paired = compare_sides([side("fp32", a), side("int8", b)])[0].quality[0].paired
    assert paired is not None
    assert (paired.wins, paired.losses) == (0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "0-shot"}, "different protocols .*5-shot.*0-shot"),
        ({"documents": quality("int8", [1.0] * 9).documents}, "different documents \\(10 and 9, 1 of them"),
    ],
)
def test_what_was_judged_differently_is_refused(change: dict[str, object], message: str) -> None:
    a, b = quality("fp32", [1.0] * 10), quality("int8", [1.0] * 10, **change)
    with pytest.raises(MeasurementError, match=message):
        compare_sides([side("fp32", a), side("int8", b)])


def test_numbers_per_token_of_different_vocabularies_are_refused() -> None:
    a, b = (quality(n, [1.0, 2.0, 3.0], unit="nats/token", metric="nll", better="lower") for n in ("fp32", "int8"))
    plan = b.engine.plan
    other = replace(b, engine=replace(b.engine, plan=replace(plan, model=replace(plan.model, vocab_size=999))))
    with pytest.raises(MeasurementError, match="vocabularies of"):
        compare_sides([side("fp32", a), side("int8", other)])


def test_sides_that_share_nothing_are_refused() -> None:
    with pytest.raises(MeasurementError, match="share no workload and no task"):
        compare_sides([side("fp32", bench()), side("int8", bench("int8", concurrency=4))])
    with pytest.raises(UsageError, match="at least two"):
        compare_sides([side("fp32", bench())])


def test_what_only_one_side_has_is_said() -> None:
    found = compare_sides([side("fp32", bench(), bench(concurrency=4)), side("int8", bench("int8"))])[0]
    assert found.remarks[0].startswith("1 workloads are on both sides (2 and 1 recorded)")


def test_longer_answers_are_more_not_better() -> None:
    sides = [
        side(n, quality(n, v, metric="generated_tokens", unit="tokens", better="neither"))
        for n, v in (("fp32", [10.0, 12.0, 14.0, 11.0]), ("int8", [20.0, 22.5, 24.0, 21.0]))
    ]
    text = render_comparisons(compare_sides(sides), [], "console")
    assert " more" in text
    assert "better" not in text.replace("positive is better", "")


@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_shows_verdicts_and_escapes_names(fmt: str) -> None:
    scores = [float(i % 3 > 0) for i in range(60)]
    hostile = replace(engine("int8"), label="<b>|x")
    a = side("fp32", bench(), quality("fp32", scores))
    b = replace(side("int8", bench("int8"), quality("int8", scores)), engine=hostile)
    text = render_comparisons(compare_sides([a, b]), [], fmt)
    assert "better" in text
    assert "undecided (about" in text
    assert ("<b>" in text) is (fmt == "console")
    assert "http" not in text
