"""What each lever does to answers, and how docs/gpu.md tells it beside what each should cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench import levers
from bench.gpu import forecast, lever_page
from bench.gpu import rows as table
from bench.levers import KIND, LEVERS, Exactness, LeversRecord, Outcome, Verdict
from trtkit.benchmark.environment import fingerprint
from trtkit.plan.cost import cost_per_million
from trtkit.plan.prices import load_prices
from trtkit.spec.codec import read_record, write_record


def verdict(lever: str, gate: str = "pass", nats: float = 0.0123) -> Verdict:
    outcomes = (
        Outcome(rule="no task worse [heldout/acc]", status="pass", reason="same"),
        Outcome(rule="no task worse [heldout/perplexity]", status=gate, reason="how it is"),
    )
    return Verdict(
        lever=lever, options=LEVERS[lever], gate=gate, outcomes=outcomes, perplexity=9.2, difference_nats=nats,
        low=nats - 0.01, high=nats + 0.01, windows=68, kl_nats=0.004, agreement=0.987, tokens_evicted=0,
    )  # fmt: skip


def record(*verdicts: Verdict) -> LeversRecord:
    exact = Exactness(
        lever="prefix reuse", overrides={"enable_block_reuse": "True"}, tokens=1792, same=1792,
        counters={"prompt_tokens_reused": 6912},
    )  # fmt: skip
    return LeversRecord(
        model="tiny", reference=levers.REFERENCE, perplexity=9.148, verdicts=verdicts, exact=(exact,),
        environment=fingerprint(device="cpu"), seconds=1.0,
    )  # fmt: skip


def written(folder: Path, found: LeversRecord) -> Path:
    write_record(folder / "levers-cpu-202611.json", KIND, found)
    assert lever_page.newest_record(folder) == found
    return folder


def test_without_a_record_the_page_says_so(tmp_path: Path) -> None:
    assert lever_page.newest_record(tmp_path) is None
    assert "Not run yet" in lever_page.verdict_table(tmp_path)
    assert lever_page.NO_RECORD in lever_page.lever_table(tmp_path)


def test_verdicts_stand_with_their_interval_and_with_what_failed(tmp_path: Path) -> None:
    folder = written(tmp_path, record(verdict("INT8 weights"), verdict("INT4 weights", "fail", 0.4826)))
    text = lever_page.verdict_table(folder)
    assert (
        "| INT8 weights | pass | +0.0123 (+0.0023 to +0.0223) | 9.200 | 0.0040 | 98.7% | every task within its margin |"
        in text
    )
    assert "| INT4 weights | fail | +0.4826 (+0.4726 to +0.4926) |" in text
    assert "heldout/perplexity fail |" in text
    assert "| prefix reuse | 1,792 of 1,792 | prompt tokens reused 6,912 |" in text


def test_a_row_is_judged_by_its_own_lever_and_what_was_not_run_is_called_so(tmp_path: Path) -> None:
    found = record(verdict("INT4 + H2O", "fail", 0.5))
    assert lever_page.verdict_cell(found, "int4-h2o") == "fail, +0.500 nats"
    assert lever_page.verdict_cell(found, "int8") == lever_page.NO_RECORD
    assert lever_page.verdict_cell(found, "int8-reuse").endswith("1,792 of 1,792 tokens the same")
    assert set(lever_page.LEVER_OF.values()) <= set(LEVERS)
    assert set(lever_page.LEVER_OF) == {key for key, row in table.ROWS.items() if row.speculation == "off"} - {"fp16"}


@pytest.mark.parametrize("isl", [512, 4096])
def test_prices_are_those_of_the_rates_beside_them_cheapest_prediction_first(isl: int) -> None:
    rows = lever_page.priced_rows(isl)
    price = load_prices().gpu_price("h100-sxm").usd_per_gpu_h
    assert [each.usd_predicted for each in rows] == sorted(each.usd_predicted for each in rows)
    for each in rows:
        assert each.usd_floor == pytest.approx(cost_per_million(each.sheet.tps.value, price))
        assert each.usd_floor < each.usd_predicted
        assert each.batch <= table.ROWS[each.row].limits.max_batch_size
        assert each.sheet.step_ms.value < each.predicted.step_ms.value


def test_guesses_pay_from_what_a_checking_step_costs_more() -> None:
    lines = [line.split(" | ") for line in lever_page.guess_table().splitlines()[2:]]
    assert [line[1] for line in lines] == ["4", "8", "4", "7"]
    for line in lines:
        plain, checking, pays, alone = (float(value) for value in line[2:6])
        assert pays == pytest.approx(checking / plain - 1, abs=0.01)
        assert alone == pytest.approx(1000 / plain, abs=0.6)
        assert float(line[7]) == pytest.approx(1.5 * 1000 / checking, abs=0.6)


def test_where_fp8_overtakes_int4_depends_on_the_share_assumed_for_small_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The page says that the order rests on one assumption: it turns when that share turns."""

    def cheapest() -> str:
        return lever_page.priced_rows(512)[0].row

    assert cheapest() == "fp8-kv8"
    monkeypatch.setattr(forecast, "FUSED_MATMUL_SHARE", 1.0)
    assert cheapest() == "int4-kv8"


def test_an_unknown_lever_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["levers.py", "--levers", "INT2 weights"])
    with pytest.raises(SystemExit):
        levers.main()
    assert "unknown lever 'INT2 weights'" in capsys.readouterr().err


def test_a_token_that_differs_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(levers, "answers", lambda *_, **__: ({"0": [1, 2, 9], "1": [4]}, {"draft_tokens": 7}))
    found = levers.exactness(tmp_path, "prefix reuse", (), {"0": [1, 2, 3], "1": [4]})
    assert (found.tokens, found.same, found.counters) == (4, 3, {"draft_tokens": 7})


@pytest.mark.slow
def test_one_lever_and_two_exact_ones_measured_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levers, "ANSWER", 12)
    monkeypatch.setattr(levers, "exact_requests", lambda seed, made=levers.exact_requests: made(seed)[:6])
    exact = ["n-gram guesses, 4 a step", "prefix reuse"]
    found = levers.measure(tmp_path, ["INT8 weights"], exact, 3, 0, tasks=False)
    (int8,) = found.verdicts
    assert int8.gate in {"pass", "fail", "invalid"}
    assert int8.low < int8.difference_nats < int8.high
    assert abs(int8.difference_nats) < 0.05
    assert int8.windows == 3
    assert 0 < int8.kl_nats < 0.1
    assert 0.9 < int8.agreement <= 1
    assert len(int8.outcomes) >= 2
    assert [each.lever for each in found.exact] == exact
    assert all(each.same == each.tokens == 6 * 12 for each in found.exact)
    assert all(each.counters for each in found.exact), "a lever that did nothing proves nothing"
    write_record(tmp_path / "levers-cpu-209901.json", KIND, replace(found, notes=("x",)))
    assert read_record(tmp_path / "levers-cpu-209901.json", KIND, LeversRecord).notes == ("x",)
