"""`trtkit gate`, `compare`, `audit-report` and `eval` from the command line: exit codes, JSON, files, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.synthetic_records import bench, engine, environment, invalid
from typer.testing import CliRunner, Result

from trtkit.cli.app import build_app
from trtkit.spec.codec import write_record
from trtkit.spec.result import BENCH_KIND, QUALITY_KIND, DocumentOutcome, QualityResult


def run(*arguments: str, env: dict[str, str] | None = None) -> Result:
    clean = {"GITHUB_STEP_SUMMARY": None, **(env or {})}
    return CliRunner().invoke(build_app(requested={arguments[0]}), list(arguments), env=clean)


def mmlu(name: str, right: int, total: int = 1000) -> QualityResult:
    documents = tuple(
        DocumentOutcome(document=f"d{i}", group=f"g{i % 3}", score=float(i < right)) for i in range(total)
    )
    return QualityResult(
        engine=engine(name),
        task="mmlu",
        metric="acc",
        unit="fraction",
        better="higher",
        protocol="5-shot",
        score=right / total,
        stderr=0.01,
        documents=documents,
        evictions=0,
        tokens_evicted=0,
        environment=environment(),
    )


@pytest.fixture
def results(tmp_path: Path) -> str:
    folder = tmp_path / "results"
    for name, right in (("fp32", 700), ("int8", 695), ("int8-h2o", 600)):
        write_record(folder / name / "bench.json", BENCH_KIND, bench(name))
        write_record(folder / name / "quality.json", QUALITY_KIND, mmlu(name, right))
    return str(folder)


def gate(results: str, candidate: str, *options: str, **kwargs) -> Result:
    return run("gate", "fp32", candidate, "--results", results, *options, **kwargs)


def test_exit_codes_are_pass_fail_and_invalid(results: str) -> None:
    assert gate(results, "fp32", "--max-mmlu-drop", "2", "--max-vram", "78GiB").exit_code == 0
    assert gate(results, "int8", "--max-mmlu-drop", "2", "--min-tps-gain", "1.3").exit_code == 0
    assert gate(results, "int8-h2o", "--max-mmlu-drop", "2").exit_code == 1
    assert gate(results, "int8", "--max-ttft-p99", "500ms").exit_code == 9


def test_an_invalid_record_ends_with_nine(results: str) -> None:
    write_record(Path(results) / "int8" / "bench.json", BENCH_KIND, invalid(bench("int8")))
    assert gate(results, "int8", "--min-tps-gain", "1.3").exit_code == 9


def test_every_rule_gives_its_reason(results: str) -> None:
    out = gate(results, "int8-h2o", "--max-mmlu-drop", "2", "--min-tps-gain", "1.3").stdout
    assert "FAIL     max-mmlu-drop 2 [mmlu/acc]: drop +10.00 points" in out
    assert "pass     min-tps-gain 1.3" in out
    assert out.splitlines()[-1].startswith("gate: FAIL (int8-h2o against fp32")


def test_json_is_one_object(results: str) -> None:
    result = gate(results, "int8-h2o", "--max-mmlu-drop", "2", "--json")
    body = json.loads(result.stdout)
    assert (body["status"], body["exit_code"], result.exit_code) == ("fail", 1, 1)
    assert {o["status"] for o in body["gate"]["outcomes"]} == {"fail"}


def test_rules_come_from_toml_and_reports_go_to_ci(results: str, tmp_path: Path) -> None:
    rules, junit, summary = tmp_path / "gate.toml", tmp_path / "junit.xml", tmp_path / "summary.md"
    rules.write_text("max_mmlu_drop = 2\nmin_tps_gain = 1.3\n")
    result = gate(
        results, "int8", "--rules", str(rules), "--junit", str(junit), env={"GITHUB_STEP_SUMMARY": str(summary)}
    )
    assert result.exit_code == 0
    assert 'tests="2"' in junit.read_text()
    assert "| pass | max-mmlu-drop 2" in summary.read_text()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--max-vram", "lots"), 2, "max_vram is 'lots'"),
        (("--max-ttft-p99", "3GiB"), 2, "max_ttft_p99 is '3GiB'"),
        (("--rules", "none.toml"), 3, "no such file of rules"),
    ],
)
def test_wrong_rules_are_one_line(results: str, options: tuple[str, ...], code: int, message: str) -> None:
    result = gate(results, "int8", *options)
    assert result.exit_code == code
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_compare_shows_speed_memory_cost_and_quality(results: str, tmp_path: Path) -> None:
    result = run("compare", "fp32", "int8", "int8-h2o", "--results", results)
    assert result.exit_code == 0, result.stderr
    for part in (
        "Performance: int8 against fp32",
        "Quality: int8-h2o against fp32",
        "peak memory rss",
        "worse",
        "Cost",
    ):
        assert part in result.stdout
    page = tmp_path / "c.html"
    assert run("compare", "fp32", "int8", "--results", results, "--format", "html", "-o", str(page)).exit_code == 0
    assert page.read_text().startswith("<!doctype html>")
    body = json.loads(run("compare", "fp32", "int8", "--results", results, "--json").stdout)
    assert body["comparisons"][0]["quality"][0]["paired"]["verdict"] == "no detectable change"


def test_compare_refuses_an_unknown_format(results: str) -> None:
    result = run("compare", "fp32", "int8", "--results", results, "--format", "pdf")
    assert (result.exit_code, "allowed are console, md, html" in result.stderr) == (2, True)


def test_the_read_is_written(results: str, tmp_path: Path) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text(
        '[[gpu]]\ngpu = "h100-sxm"\nkind = "cloud"\nname = "t"\nusd_per_gpu_h = 3.0\nsource = "made up"\ndate = "2026-01-01"\n'
    )
    for name in ("fp32", "int8"):
        ref = engine(name)
        record = replace(bench(name), engine=replace(ref, plan=replace(ref.plan, gpu="h100-sxm")))
        write_record(Path(results) / name / "bench.json", BENCH_KIND, record)
    common = ("audit-report", "fp32", "int8", "--results", results, "--traffic", "200M/month", "--spend", "47K")
    result = run(*common, "--prices", str(prices))
    assert result.exit_code == 0, result.stderr
    assert "## What to do on Monday" in result.stdout
    body = json.loads(run(*common, "--prices", str(prices), "--json").stdout)
    assert body["levers"][0]["running"]["name"] == "int8"
    bad = run("audit-report", "fp32", "int8", "--results", results, "--traffic", "lots")
    assert (bad.exit_code, "expected a positive amount" in bad.stderr) == (2, True)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--tasks", "x"), 2, "no engine given"),
        (("none.engine",), 2, "nothing to evaluate"),
        (("none.engine", "--tasks-dir", "."), 2, "--tasks-dir needs --tasks"),
        (("none.engine", "--prompts", "none.jsonl"), 3, "no such file of prompts"),
        (("none.engine", "--tasks", "x", "--num-fewshot", "-1"), 2, "must not be negative"),
        (("none.engine", "--tasks", "x", "--evict-after", "never"), 2, "allowed are shots, question"),
        (("none.engine", "--tasks", "x", "--max-truncated", "2"), 2, "must be between 0 and 1"),
        (("none.engine", "--tasks", "x"), 8, "no such engine directory"),
        (("--grades", "g.json"), 2, "--grades needs --sheet"),
        (("a.engine", "a.engine", "--tasks", "x"), 2, "is given twice"),
    ],
)
def test_eval_refuses_in_one_line(options: tuple[str, ...], code: int, message: str) -> None:
    result = run("eval", *options)
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr
    assert len(result.stderr.splitlines()) == 1
