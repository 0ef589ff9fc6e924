import itertools

import pytest

from trtkit.plan.options import Wanted
from trtkit.plan.prices import load_prices
from trtkit.plan.search import mmlu_drop, pareto, search
from trtkit.plan.search_text import pareto_plot, search_text
from trtkit.spec.catalog import model_preset


def wanted(**changes):
    given = {
        "model": model_preset("llama-3-70b"),
        "tokens_per_month": 200e6,
        "isl": 1000,
        "osl": 256,
        "ttft_p99_ms": 500,
        "max_mmlu_drop": 2,
    }
    return Wanted(**{**given, **changes})


@pytest.fixture(scope="module")
def found():
    return search(wanted(), load_prices())


def test_options_come_cheapest_first_and_keep_every_limit(found):
    costs = [option.usd_per_month for option in found.options]
    assert costs == sorted(costs)
    assert all(option.ttft_p99_ms <= 500 and option.mmlu_drop <= 2 for option in found.options)


def test_each_option_can_make_the_traffic(found):
    assert all(0 < option.utilisation <= 1 for option in found.options)


def test_every_rejection_has_a_reason(found):
    reasons = {rejected.label: rejected.reason for rejected in found.rejected}
    assert all(reasons.values())
    assert "does not fit" in reasons["h100-sxm, TP1, fp16, KV full"]
    assert "fp8" in reasons["a100-80gb-sxm, TP1, fp8, KV full"]


def test_a_tight_quality_limit_rejects_lossy_precisions():
    found = search(wanted(max_mmlu_drop=0), load_prices())
    assert {option.precision for option in found.options} == {"fp16"}
    assert {option.kv for option in found.options} == {"full"}
    assert any("MMLU loss" in rejected.reason for rejected in found.rejected)


def test_more_traffic_needs_more_machines():
    small, large = (search(wanted(tokens_per_month=t, gpus=("h100-sxm",)), load_prices()) for t in (1e8, 1e11))
    assert large.options[0].num_gpus > 20 * small.options[0].num_gpus
    assert large.options[0].usd_per_million < small.options[0].usd_per_million


def test_the_levers_start_from_the_reference(found):
    first = found.levers[0]
    assert first.step.startswith("reference")
    assert (first.saving, first.tok_s_gain, first.mmlu_points) == (0, 1, 0)
    assert {"INT8 weights", "H2O, 50% of the cache", "another GPU, FP8"} <= {lever.step for lever in found.levers}


def test_small_traffic_and_small_models_are_advised_against():
    advice = " ".join(search(wanted(tokens_per_month=1e6), load_prices()).advice)
    assert "under 1M" in advice
    small = wanted(model=model_preset("llama-2-7b"))
    assert "tune batching" in " ".join(search(small, load_prices()).advice)


def test_nothing_possible_is_said_so():
    found = search(wanted(ttft_p99_ms=1), load_prices())
    assert found.options == ()
    assert "nothing keeps every limit" in found.advice[0]


def test_losses_add_up():
    assert mmlu_drop("int8", "h2o:50%") == pytest.approx(mmlu_drop("int8", "full") + mmlu_drop("fp16", "h2o:50%"))


def test_the_front_holds_no_option_that_another_beats(found):
    front = pareto(found.options)
    for option in found.options:
        assert any(o.usd_per_month <= option.usd_per_month and o.tpot_ms <= option.tpot_ms for o in front)
    assert all(a.tpot_ms > b.tpot_ms for a, b in itertools.pairwise(front))


def test_the_plot_is_a_picture(found, tmp_path):
    pareto_plot(found, tmp_path / "front.svg")
    assert "<svg" in (tmp_path / "front.svg").read_text()


def test_the_text_names_options_levers_and_rejections(found):
    text = search_text(found)
    assert found.options[0].label in text
    assert "levers" in text
    assert "rejected" in text
