import pytest

from trtkit.audit.run import audit_rows

BASE = {"model": "Llama-3-70B", "gpu": "A100-SXM-80GB", "num_gpus": "2", "precision": "FP16", "osl": "256"}


def audit(*rows):
    given = [{**BASE, "name": f"r{i}", **{k: str(v) for k, v in row.items()}} for i, row in enumerate(rows)]
    return audit_rows(given)


def rate(value, concurrency=32, isl=512, **cells):
    return {"metric": "tps", "value": value, "concurrency": concurrency, "isl": isl, **cells}


def test_a_cheaper_token_than_throughput_and_price_allow_is_inconsistent():
    cost = {"metric": "cost_per_1m", "value": 0.82, "price_usd_per_gpu_h": 2.2}
    found = audit(rate(600), cost)[1]
    assert found.verdict == "inconsistent"
    assert "2.037" in found.arithmetic


def test_a_dearer_token_may_be_an_idle_machine():
    assert audit(rate(600), {"metric": "cost_per_1m", "value": 5, "price_usd_per_gpu_h": 2.2})[1].verdict == "possible"


def test_a_cost_without_a_price_cannot_be_judged():
    assert audit(rate(600), {"metric": "cost_per_1m", "value": 0.1})[1].verdict == "possible"


@pytest.mark.parametrize(("value", "verdict"), [(3212, "possible"), (5110, "inconsistent"), (1600, "inconsistent")])
def test_a_month_is_its_hours(value, verdict):
    assert audit({"metric": "usd_per_month", "value": value, "price_usd_per_gpu_h": 2.2})[0].verdict == verdict


def test_a_bought_month_fixes_the_price_of_a_token():
    row = {"metric": "cost_per_1m", "price_usd_per_gpu_h": 2.2, "tokens_per_month": "30,000,000"}
    assert audit({**row, "value": 107})[0].verdict == "possible"
    assert audit({**row, "value": 0.82})[0].verdict == "inconsistent"


def test_a_longer_prompt_takes_at_least_its_operations_more():
    first, second = audit(
        {"metric": "ttft_ms", "value": 900, "isl": 512}, {"metric": "ttft_ms", "value": 1000, "isl": 4096}
    )
    assert (first.verdict, second.verdict) == ("possible", "inconsistent")
    assert "ratio 1.11" in second.arithmetic


def test_an_honest_pair_of_prompts_passes_despite_a_fixed_overhead():
    pair = audit({"metric": "ttft_ms", "value": 400, "isl": 512}, {"metric": "ttft_ms", "value": 1700, "isl": 4096})
    assert [f.verdict for f in pair] == ["possible", "possible"]


def test_eviction_cannot_save_more_time_than_the_cache_took_to_read():
    pruned = rate(660, kv="h2o:50%")
    assert audit(rate(600), pruned)[1].verdict == "inconsistent"
    assert audit(rate(600), rate(610, kv="h2o:50%"))[1].verdict == "possible"


def test_an_impossible_claim_stays_impossible_when_it_also_contradicts():
    found = audit(rate(600), rate(1200, kv="h2o:50%"))[1]
    assert found.verdict == "impossible"
    assert "saves" in found.arithmetic


def test_the_claimed_peak_must_hold_the_claimed_load():
    assert audit(rate(300), {"metric": "vram", "value": 142})[1].verdict == "inconsistent"
    assert audit(rate(300), {"metric": "vram", "value": 160})[1].verdict == "possible"


CELL = {"concurrency": 8, "isl": 512}


def test_little_s_law_bounds_throughput():
    times = ({"metric": "ttft_ms", "value": 400, **CELL}, {"metric": "tpot_ms", "value": 60, **CELL})
    honest = {"metric": "throughput_tok_s_total", "value": 125, **CELL}
    assert audit(*times, honest)[2].verdict == "possible"
    found = audit(*times, {**honest, "value": 160})[2]
    assert found.verdict == "inconsistent"
    assert "Little" in found.arithmetic


def test_end_to_end_is_first_token_plus_steps():
    times = ({"metric": "ttft_ms", "value": 400, **CELL}, {"metric": "tpot_ms", "value": 60, **CELL})
    assert audit(*times, {"metric": "e2e_ms", "value": 15700, **CELL})[2].verdict == "possible"
    assert audit(*times, {"metric": "e2e_ms", "value": 12000, **CELL})[2].verdict == "inconsistent"


def test_claims_of_different_machines_are_not_mixed():
    other = {"gpu": "H100", "metric": "cost_per_1m", "value": 0.01, "price_usd_per_gpu_h": 2.2}
    assert audit(rate(600), other)[1].verdict == "possible"


def test_claims_of_different_software_are_not_mixed():
    slow = {"metric": "ttft_ms", "value": 3000, "isl": 512}
    fast = {"metric": "ttft_ms", "value": 3100, "isl": 4096}
    assert audit({**slow, "engine": "a"}, {**fast, "engine": "a"})[1].verdict == "inconsistent"
    assert audit({**slow, "engine": "a"}, {**fast, "engine": "b"})[1].verdict == "possible"
