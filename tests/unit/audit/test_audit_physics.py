import pytest

from trtkit.audit.claims import kind_of
from trtkit.audit.run import audit_rows, findings_text
from trtkit.spec.catalog import gpu_spec

ROW = {"name": "c", "model": "Llama-3-70B", "gpu": "A100-SXM-80GB", "num_gpus": "2", "precision": "FP16"}


def one(metric, value, **cells):
    return audit_rows([{**ROW, "metric": metric, "value": str(value), **{k: str(v) for k, v in cells.items()}}])[0]


@pytest.mark.parametrize(
    ("metric", "value", "cells", "verdict", "share"),
    # Shares recomputed by hand from bytes, operations and datasheet peaks.
    [
        ("ttft_ms", 85, {"isl": 512}, "impossible", 1.328),
        ("ttft_ms", 340, {"isl": 4096}, "impossible", 2.747),
        ("ttft_ms", 250, {"isl": 512}, "possible", 0.452),
        ("ttft_ms", 62, {"isl": 512, "gpu": "H100", "num_gpus": 1, "precision": "INT8-SQ"}, "implausible", 0.577),
        ("tps", 25, {"concurrency": 1, "isl": 512, "osl": 1}, "implausible", 0.853),
        ("tps", 680, {"concurrency": 32}, "possible", 0.724),
        ("tps", 1560, {"concurrency": 32, "gpu": "H100", "num_gpus": 1, "precision": "INT8-WO"}, "impossible", 1.027),
        ("tpot_ms", 30, {"concurrency": 1, "isl": 512}, "impossible", 1.138),
        ("tpot_ms", 60, {"concurrency": 1, "isl": 512}, "possible", 0.569),
        ("decode_tok_s_user", 40, {"isl": 512}, "impossible", 1.365),
        ("vram", 140, {}, "impossible", 1.008),
        ("vram", 120, {}, "impossible", 1.176),
        ("mem_gb", 80, {}, "possible", 0.882),
        ("mem_gb", 60, {}, "impossible", 1.176),
        ("mmlu", 101, {}, "impossible", 1.01),
        ("mmlu", 20, {}, "implausible", 0.2),
    ],
)
def test_verdicts_follow_from_bytes_and_operations(metric, value, cells, verdict, share):
    found = one(metric, value, **cells)
    assert found.verdict == verdict
    assert found.share_of_limit == pytest.approx(share, abs=0.002)


def test_more_than_all_memory_is_impossible():
    assert one("vram", 400).verdict == "impossible"


@pytest.mark.parametrize(
    ("metric", "value", "cells", "verdict"),
    [
        ("kv_gb_per_request", 8.8, {"isl": 4096}, "inconsistent"),
        ("kv_gb_per_request", 1.34, {"isl": 4096}, "possible"),
        ("kv_gb_per_request", 1.25, {"isl": 4096, "unit": "GiB"}, "possible"),
        ("kv_gb", 70.4, {"isl": 4096, "concurrency": 32}, "inconsistent"),
        ("kv_gb", 43, {"isl": 4096, "concurrency": 32}, "possible"),
        ("kv_gb", 21.5, {"isl": 4096, "concurrency": 32, "kv": "h2o:50%"}, "possible"),
        ("weights_gb", 140, {}, "possible"),
        ("weights_gb", 70, {}, "inconsistent"),
    ],
)
def test_sizes_that_are_counts_must_be_right_on_both_sides(metric, value, cells, verdict):
    assert one(metric, value, **cells).verdict == verdict


def test_a_claim_at_a_load_that_cannot_fit_is_held_against_what_fits():
    found = one("throughput_tok_s_total", 680, concurrency=32, isl=4096, osl=256)
    assert found.verdict == "impossible"
    assert "prefill" in found.arithmetic


def test_speculative_decoding_moves_the_limit_of_tokens_not_of_the_prompt():
    assert one("tps", 60, concurrency=1, isl=512).verdict == "impossible"
    assert one("tps", 60, concurrency=1, isl=512, accept_length=3).verdict == "possible"
    assert one("ttft_ms", 85, isl=512, accept_length=3).verdict == "impossible"


def test_a_prefix_cache_and_sparsity_move_the_limit_of_the_prompt():
    assert one("ttft_ms", 85, isl=512, cached_tokens=400).verdict == "possible"
    assert one("ttft_ms", 85, isl=512, sparsity="2:4").verdict != "impossible"


def test_a_format_without_units_runs_at_the_16_bit_rate():
    found = one("ttft_ms", 100, isl=512, precision="FP8")
    assert found.share_of_limit == pytest.approx(1.129, abs=0.002)


def test_units_are_converted():
    assert one("ttft_ms", 0.085, isl=512, unit="s").share_of_limit == pytest.approx(1.328, abs=0.002)
    assert one("vram", 140, unit="GiB").verdict == "possible"


@pytest.mark.parametrize(
    ("cells", "column"),
    [
        ({"gpu": "Cerebras"}, "gpu"),
        ({"precision": "fp7"}, "precision"),
        ({"model": ""}, "model"),
        ({"value": "-3"}, "value"),
        ({"value": "fast"}, "value"),
        ({"value": "nan"}, "value"),
        ({"unit": "GB"}, "unit"),
        ({"unit": "furlong"}, "unit"),
        ({"metric": "joy"}, "metric"),
        ({"num_gpus": "1.5"}, "num_gpus"),
        ({"isl": "-1"}, "isl"),
        ({"concurrency": "0"}, "concurrency"),
        ({"kv": "h2o:200%"}, "kv"),
        ({"sparsity": "3:7"}, "sparsity"),
        ({"price_usd_per_gpu_h": "free!"}, "price_usd_per_gpu_h"),
        ({"kv_dtype": "fp3"}, "precision"),
    ],
)
def test_a_wrong_cell_is_pointed_at_and_the_rest_still_audited(cells, column):
    good = {**ROW, "metric": "ttft_ms", "value": "200", "isl": "512"}
    wrong, right = audit_rows([{**good, **cells}, good])
    assert wrong.verdict == "unreadable"
    assert f"row 1, column {column}" in wrong.arithmetic
    assert right.verdict == "possible"


def test_the_text_counts_verdicts():
    text = findings_text(audit_rows([{**ROW, "metric": "ttft_ms", "value": "1", "isl": "512"}]))
    assert text.endswith("1 rows: 1 impossible")
    assert findings_text(()) == "no claims"


def test_the_arithmetic_shows_the_counted_work():
    found = one("ttft_ms", 85, isl=512)
    assert "70.44 TFLOP" in found.arithmetic
    assert "112.9 ms" in found.arithmetic
    assert found.limit == pytest.approx(112.9, abs=0.1)


def test_an_unfitting_gpu_does_not_crash_the_limit():
    # FP16 weights alone exceed one L4; the claim is held against bytes all the same.
    assert gpu_spec("l4").memory_bytes < 30e9
    assert one("tpot_ms", 10, gpu="L4", num_gpus=1, isl=512, concurrency=4).verdict == "impossible"


@pytest.mark.parametrize(
    ("metric", "unit"),
    [
        ("ttft_p99_ms", "ms"),
        ("mean_ttft_ms", "ms"),
        ("cost_usd_per_1m", "USD/1M"),
        ("peak_mem_gb", "GB"),
        ("TPS/user", "tok/s"),
        ("tok/s/gpu", "tok/s"),
        ("tps_total", "tok/s"),
    ],
)
def test_other_spellings_of_a_metric_are_understood(metric, unit):
    assert one(metric, 150, isl=512).unit == unit


def test_a_unit_in_the_metrics_name_counts():
    assert one("ttft_s", 0.3, isl=512).claimed == 300


@pytest.mark.parametrize("column", ["name", "model", "gpu", "num_gpus", "kv_dtype", "price_usd_per_gpu_h", "notes"])
def test_a_configurations_columns_are_no_metrics(column):
    assert kind_of(column) is None


def test_a_speed_without_room_for_the_weights_is_impossible():
    found = one("decode_tok_s_user", 5, gpu="H100", num_gpus=1, isl=512)
    assert found.verdict == "impossible"
    assert found.share_of_limit == pytest.approx(1.65, abs=0.01)
    assert "do not fit" in found.arithmetic
