"""Tables with a column per configuration, as posts print them."""

from __future__ import annotations

from pathlib import Path

import pytest

from trtkit.audit.run import audit_file
from trtkit.audit.tables import csv_rows, markdown_rows
from trtkit.spec.errors import InputError

POST = """
Some prose, and a table of words that holds no claim:

| metric | meaning |
|---|---|
| TTFT | time to the first token |

| | Baseline | INT8 |
|---|---|---|
| Model | Llama-3-70B | Llama-3-70B |
| GPUs | 2x A100-SXM-80GB | H100 |
| Weights | FP16 | INT8-WO |
| OSL | 256 | 256 |
| TPS, batch 1 | 25 | 42 |
| TPS (batch 32) | 680 | 1,150 |
| TTFT 512 / 4K | 85 / 340 ms | 62 / 250 ms |
| peak VRAM | 140 GB | - |
| cost per 1M tokens | $0.82 | |
| MMLU 5-shot | 79.2% | 78.1% |
"""


def rows_of(text: str = POST) -> dict[str, dict[str, str]]:
    return {row["name"]: row for row in markdown_rows(text, "post.md")}


def test_each_filled_cell_becomes_a_claim_with_its_columns_settings():
    rows = rows_of()
    assert len(rows) == 12
    first = rows["Baseline tps c=1"]
    assert (first["model"], first["gpu"], first["num_gpus"], first["precision"]) == (
        "Llama-3-70B",
        "A100-SXM-80GB",
        "2",
        "FP16",
    )
    assert (first["value"], first["concurrency"], first["osl"]) == ("25", "1", "256")
    assert rows["INT8 tps c=32"]["value"] == "1150"
    assert (rows["INT8 mmlu"]["value"], rows["INT8 mmlu"]["unit"]) == ("78.1", "%")


def test_a_label_with_two_lengths_splits_its_cells_and_the_last_unit_serves_both():
    rows = rows_of()
    assert [(rows[f"Baseline ttft ISL {n}"]["value"], rows[f"Baseline ttft ISL {n}"]["unit"]) for n in (512, 4096)] == [
        ("85", "ms"),
        ("340", "ms"),
    ]


def test_the_words_one_million_are_no_prompt_length():
    cost = rows_of()["Baseline cost per 1m tokens"]
    assert (cost["value"], cost["unit"], "isl" in cost) == ("0.82", "usd", False)


def test_a_row_of_weights_in_gigabytes_is_a_metric_and_one_of_words_a_setting():
    text = "| | A |\n|---|---|\n| weights | 140 GB |\n| TPS | 5 |\n"
    assert markdown_rows(text, "t.md")[0] == {"metric": "weights", "value": "140", "unit": "GB", "name": "A weights"}


def test_the_audit_finds_what_is_impossible_in_such_a_table(tmp_path: Path):
    path = tmp_path / "post.md"
    path.write_text(POST)
    verdicts = {finding.name: finding.verdict for finding in audit_file(path)}
    assert verdicts["Baseline ttft ISL 4096"] == "impossible"
    assert verdicts["INT8 ttft ISL 512"] == "impossible"
    assert verdicts["Baseline tps c=32"] == "possible"


def test_options_fill_what_the_table_leaves_out(tmp_path: Path):
    path = tmp_path / "bare.csv"
    path.write_text("metric name,A,B\nprecision,FP16,INT8-WO\nTTFT 512 (ms),62,150\n")
    found = audit_file(path, defaults={"model": "llama-3-70b", "gpu": "h100", "osl": "256"})
    assert [finding.verdict for finding in found] == ["impossible", "possible"]


def test_a_cell_that_is_no_number_is_one_unreadable_row_and_the_rest_is_audited(tmp_path: Path):
    path = tmp_path / "post.md"
    path.write_text(POST.replace("| 680 |", "| fast |"))
    verdicts = {finding.name: finding.verdict for finding in audit_file(path)}
    assert verdicts["Baseline tps c=32"] == "unreadable"
    assert verdicts["INT8 tps c=32"] == "possible"


@pytest.mark.parametrize("text", ["a,b\n1,2\n", "TTFT,what it is\nTTFT,time to the first token\n"])
def test_a_table_without_a_metric_and_a_number_is_no_table_of_claims(text: str):
    with pytest.raises(InputError, match="no table of claims"):
        csv_rows(text, "t.csv")
