import csv
import io

import pytest

from trtkit.plan.table import ADDED, forecast_rows, read_rows, table_text
from trtkit.spec.errors import InputError

ROW = {
    "source": "x",
    "engine": "TensorRT-LLM",
    "engine_version": "0.17",
    "model": "Llama-3.1-70B",
    "gpu": "H100",
    "num_gpus": "2",
    "tp": "2",
    "precision": "FP8",
    "kv_dtype": "fp8",
    "isl": "1000",
    "osl": "1000",
    "batch_or_concurrency": "max (inf rate)",
    "metric": "throughput_tok_s_total",
    "value": "",
    "notes": "",
}


def one(**changes):
    return forecast_rows([{**ROW, **changes}])[0]


def test_a_row_gets_floor_forecast_band_and_source():
    found = one()
    assert float(found["forecast_low"]) < float(found["forecast"]) < float(found["forecast_high"])
    assert float(found["forecast"]) < float(found["floor"])
    assert (found["source"], found["reason"]) == ("modeled", "")


def test_value_and_notes_are_not_read():
    assert {k: one(value="999", notes="static batch")[k] for k in ADDED} == {k: one()[k] for k in ADDED}


def test_per_gpu_and_replicas_scale():
    total = float(one()["forecast"])
    assert float(one(metric="per_gpu")["forecast"]) == pytest.approx(total / 2, rel=1e-3)
    assert float(one(num_gpus="4")["forecast"]) == pytest.approx(total * 2, rel=1e-3)


def test_per_user_rate_is_the_inverse_of_time_per_token():
    tpot = one(metric="tpot_ms", batch_or_concurrency="8")
    user = one(metric="decode_tok_s_user", batch_or_concurrency="8")
    assert float(user["forecast"]) == pytest.approx(1000 / float(tpot["forecast"]), rel=1e-3)
    assert float(user["forecast_low"]) < float(user["forecast"]) < float(user["forecast_high"])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"gpu": "TPU v9"}, "gpu"),
        ({"precision": "fp7"}, "precision"),
        ({"model": "mystery-3b"}, "mystery"),
        ({"isl": "sharegpt"}, "isl"),
        ({"isl": "-5"}, "isl"),
        ({"tp": ""}, "tp"),
        ({"tp": "3"}, "divide"),
        ({"metric": "joy"}, "metric"),
        ({"batch_or_concurrency": "4 rps"}, "rate"),
        ({"gpu": "A100-SXM-80GB"}, "fp8"),
    ],
)
def test_a_row_that_cannot_be_forecast_keeps_empty_cells_and_says_why(change, word):
    found = one(**change)
    assert found["forecast"] == ""
    assert word in found["reason"]


def test_an_uncalibrated_gpu_keeps_its_floor():
    found = one(gpu="L4", precision="FP16", kv_dtype="", num_gpus="8", tp="8")
    assert found["floor"]
    assert found["forecast"] == ""
    assert found["source"] == "datasheet"
    assert "only the floor" in found["reason"]


def test_one_wrong_row_does_not_stop_the_others():
    found = forecast_rows([{**ROW, "gpu": "?"}, ROW])
    assert (found[0]["forecast"], found[1]["reason"]) == ("", "")


def test_memory_of_a_reserved_pool_is_forecast_per_gpu():
    found = one(engine="LMDeploy TurboMind", gpu="A100-SXM-80GB", precision="FP16", kv_dtype="fp16", metric="mem_gb")
    assert float(found["floor"]) < float(found["forecast"]) < 85.9


def test_the_table_keeps_the_input_columns_and_appends(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, ROW)
        writer.writeheader()
        writer.writerow(ROW)
    header, rows = read_rows(path)
    text = table_text(header, forecast_rows(rows))
    columns = next(csv.reader(io.StringIO(text)))
    # The input has a `source` of its own; the added one would hide it.
    assert columns == ["row_source", *(c for c in ROW if c != "source"), *ADDED]
    assert next(csv.DictReader(io.StringIO(text)))["row_source"] == "x"


@pytest.mark.parametrize(("text", "word"), [("", "missing"), ("a,b\n1,2\n", "missing"), ("model,model\n", "missing")])
def test_a_file_that_is_no_such_table_is_one_sentence(tmp_path, text, word):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=word):
        read_rows(path)


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_rows(tmp_path / "none.csv")
