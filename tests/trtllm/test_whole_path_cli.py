"""Build, bench, eval and report by the command line, through the strict fake of TensorRT-LLM, at TP=2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.fake_trtllm import fake_environment

from trtkit.report.records import load_records

ROOT = Path(__file__).parents[2]
TINY = ROOT / "bench" / "tiny_model" / "model"

pytestmark = pytest.mark.slow


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in fake_environment(FAKE_GPUS="2").items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "trtkit", *(str(a) for a in arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


@pytest.mark.parametrize("target", ["tensorrt", "pytorch"])
def test_build_bench_eval_and_report_at_tp_2(fake: pytest.MonkeyPatch, tmp_path: Path, target: str) -> None:
    builds, results = tmp_path / "builds", tmp_path / "results"
    built = run(
        "build", "--model", TINY, "--gpu", "h100", "--tp", 2, "--precision", "int8", "--target", target,
        "--max-batch-size", 8, "--max-num-tokens", 1024, "--max-seq-len", 1024, "--kv-memory", "8MiB",
        "--output", builds,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    (engine,) = builds.glob("*.engine")
    assert engine.name == "model-int8-h100-sxm-tp2.engine"
    bench = run("bench", engine, "--concurrency", "2", "--isl", 16, "--osl", 4, "--num-requests", 6, "-o", results)
    assert bench.returncode == 0, bench.stderr
    scored = run("eval", engine, "--text", "shipped", "--limit", 1, "-o", results)
    assert scored.returncode == 0, scored.stderr
    asked = run("eval", engine, "--tasks", "mini_mmlu", "--tasks-dir", "shipped", "--limit", 2, "-o", results)
    assert asked.returncode == 0, asked.stderr
    report = run("report", results, "-o", tmp_path / "report.md")
    assert report.returncode == 0, report.stderr
    records = load_records([results])
    assert (len(records.bench), len(records.quality) >= 1, records.problems) == (1, True, ())
    assert "mini_mmlu" in {r.task for r in records.quality}
    assert "tok/s" in (tmp_path / "report.md").read_text(encoding="utf-8")
