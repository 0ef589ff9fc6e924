"""`trtkit plan`, `cost` and `audit` from the command line."""

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trtkit.cli.app import build_app

ROOT = Path(__file__).parents[2]
ROW = {
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
    "batch_or_concurrency": "max",
    "metric": "throughput_tok_s_total",
}


def run(*arguments):
    command = str(arguments[0])
    return CliRunner().invoke(build_app(requested={command}), [str(a) for a in arguments])


def table(tmp_path, *rows):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, ROW)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_one_configuration_shows_memory_floor_and_forecast():
    result = run("plan", "--model", "llama-3-70b", "--gpu", "h100", "--precision", "int8", "--concurrency", "1,max")
    assert result.exit_code == 0, result.output
    assert "67.68 GiB" in result.output
    assert "512/256 at max" in result.output


def test_a_plan_that_build_would_refuse_says_so():
    engine, ours = (
        run("plan", "--model", "llama-3-8b", "--precision", "int4", "--target", target).output
        for target in ("tensorrt", "embedded")
    )
    assert "not to be built: trtkit writes no int4 checkpoint for target tensorrt" in engine
    assert "not to be built" not in ours


def test_json_is_one_object_with_sources():
    result = run("plan", "--model", "llama-3-70b", "--gpu", "h100", "--precision", "int8", "--isl", "512", "--json")
    body = json.loads(result.stdout)
    assert body["loads"][0]["floors"]["ttft_ms"]["source"] == "datasheet"
    assert body["loads"][0]["forecast"]["ttft_ms"]["source"] == "modeled"


def test_recipes_show_published_beside_corrected(monkeypatch):
    monkeypatch.chdir(ROOT)
    result = run("plan", "fp16-a100-tp2", "int8-h100", "fp16-h2o50-a100-tp2", "int8-h2o50-h100", "--isl", "512")
    assert result.exit_code == 0, result.output
    assert result.output.count("published comparison") == 4
    assert "impossible" in result.output


def test_a_table_is_written_and_not_overwritten(tmp_path):
    out = tmp_path / "out.csv"
    source = table(tmp_path, ROW, {**ROW, "gpu": "Abacus"})
    first = run("plan", "--table", source, "-o", out)
    assert first.exit_code == 0, first.output
    with out.open() as handle:
        rows = list(csv.DictReader(handle))
    assert float(rows[0]["forecast"]) > 0
    assert rows[1]["forecast"] == ""
    assert "gpu" in rows[1]["reason"]
    before = out.read_bytes()
    again = run("plan", "--table", source, "-o", out)
    assert again.exit_code == 7
    assert "--force" in again.output
    assert out.read_bytes() == before
    assert run("plan", "--table", source, "-o", out, "--force").exit_code == 0


def test_a_search_ranks_and_plots(tmp_path):
    plot = tmp_path / "front.svg"
    arguments = (
        "--traffic",
        "200M/month",
        "--isl",
        "1000",
        "--osl",
        "256",
        "--ttft-p99",
        "500ms",
        "--max-mmlu-drop",
        2,
    )
    result = run("plan", "--model", "llama-3-70b", *arguments, "--gpu", "h100,a100", "--pareto", plot)
    assert result.exit_code == 0, result.output
    assert "cheapest first" in result.output
    assert plot.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("plan",), 2, "--model"),
        (("plan", "--model", "mystery"), 2, "mystery"),
        (("plan", "--model", "llama-3-70b", "--gpu", "abacus"), 2, "abacus"),
        (("plan", "--model", "llama-3-70b", "--isl", "0"), 2, "--isl"),
        (("plan", "--model", "llama-3-70b", "--concurrency", "x"), 2, "--concurrency"),
        (("plan", "--model", "llama-3-70b", "--concurrency", ","), 2, "--concurrency"),
        (("plan", "--model", "llama-3-70b", "--precision", "fp7"), 4, "fp7"),
        (("plan", "--model", "llama-3-70b", "--gpu", "a100", "--precision", "fp8"), 4, "fp8"),
        (("plan", "--model", "llama-3-70b", "--tp", "3"), 2, "tp=3"),
        (("plan", "--model", "llama-3-70b", "--pp", "3"), 2, "pp=3"),
        (("plan", "--model", "llama-3-70b", "--request-rate", "-1"), 2, "--request-rate"),
        (("plan", "--model", "llama-3-70b", "--traffic", "lots"), 2, "lots"),
        (("plan", "--model", "llama-3-70b", "--traffic", "1M", "--ttft-p99", "soon"), 2, "--ttft-p99"),
        (("plan", "--table", "none.csv"), 3, "none.csv"),
        (("plan", "no-such-recipe"), 2, "no-such-recipe"),
        (("cost",), 2, "--tps"),
        (("cost", "--tps", "-1"), 2, "--tps"),
        (("cost", "--tps", "10", "--tps-low", "20"), 2, "interval"),
        (("cost", "--tps", "10", "--gpu", "b200"), 2, "no price"),
        (("cost", "--tps", "10", "--kind", "stolen"), 2, "stolen"),
        (("cost", "--tps", "10", "--utilisation", "2"), 2, "utilisation"),
        (("cost", "--tps", "10", "--usd-per-gpu-h", "0"), 2, "--usd-per-gpu-h"),
        (("cost", "--tps", "10", "--tokens-per-month", "9T"), 2, "machines at"),
        (("cost", "none.json"), 3, "none.json"),
        (("audit", "none.csv"), 3, "none.csv"),
    ],
)
def test_bad_input_is_one_line_and_a_documented_code(arguments, code, word):
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert word in result.output
    assert "Traceback" not in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_cost_names_every_definition():
    arguments = ("--tps", 680, "--tps-low", 600, "--tps-high", 720, "--gpu", "a100", "--num-gpus", 2)
    more = ("--input-tps", 1360, "--utilisation", 0.3, "--tokens-per-month", "200M", "--slo-tps", 400)
    result = run("cost", *arguments, *more, "--json")
    (report,) = json.loads(result.stdout)
    found = {(line["definition"], line["tokens"]): line["cost"] for line in report["lines"]}
    assert found["full load", "output"]["value"] == pytest.approx(1.797, abs=0.001)
    assert found["full load", "output"]["low"] == pytest.approx(1.698, abs=0.001)
    assert {d for d, _ in found} >= {"measured utilisation", "bought month", "at SLO"}
    assert report["break_even"][0]["million_tokens_month"] == pytest.approx(1284.8)


def test_cost_on_premises_shows_its_parts():
    result = run("cost", "--tps", 680, "--kind", "onprem")
    assert "capex" in result.output
    assert "kWh" in result.output


def test_audit_lists_one_verdict_per_row():
    result = run("audit", ROOT / "docs" / "examples" / "token-tax.md", "--json")
    assert result.exit_code == 0, result.output
    body = json.loads(result.stdout)
    assert {"name", "verdict", "share_of_limit", "limit", "arithmetic"} <= set(body[0])
    assert {row["verdict"] for row in body} == {"possible", "implausible", "impossible", "inconsistent"}


def test_audit_defaults_fill_empty_cells(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text("metric,value,isl\nttft_ms,5,4096\n")
    result = run("audit", path, "--model", "llama-3-70b", "--gpu", "h100", "--precision", "fp16", "--num-gpus", "2")
    assert "impossible" in result.output
