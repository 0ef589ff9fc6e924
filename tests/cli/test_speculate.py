"""Speculation from the command line: built in, switched for a benchmark or a prompt, and refused where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny_checkpoints import ONE_LAYER
from typer.testing import CliRunner

from trtkit.backends import open_engine
from trtkit.backends.recipe import BuildOptions, make_plan
from trtkit.cli.app import build_app
from trtkit.spec.bundle import open_bundle
from trtkit.spec.codec import read_record
from trtkit.spec.result import BENCH_KIND, BenchResult
from trtkit.spec.speculation import SpeculationSpec

runner = CliRunner()
REPEATING = ",".join(["5", "6", "7", "8"] * 8)


def _run(*arguments: object) -> tuple[int, str]:
    result = runner.invoke(build_app(requested={str(arguments[0])}), [str(a) for a in arguments])
    return result.exit_code, result.stdout if result.exit_code == 0 else " ".join(result.output.split())


def _invoke(*arguments: object) -> str:
    code, told = _run(*arguments)
    assert code == 0, told
    return told


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The shape of a tiny model; its weights are made up when it is opened."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(ONE_LAYER))
    return tmp_path / "tiny"


def _build(model: Path, *options: object) -> Path:
    output = ("--output", model.parent / "builds")
    shape = ("--model", model, "--load-format", "dummy", "--precision", "fp32", "--max-seq-len", 256)
    return Path(json.loads(_invoke("build", *shape, *output, "--json", *options))["path"])


def test_an_engine_is_built_with_speculation_named_after_it_and_opens_with_it(model: Path) -> None:
    path = _build(model, "--speculate", "ngram:4,match=2")
    spec = SpeculationSpec(max_draft_tokens=4, max_ngram=2)
    assert (path.name, open_bundle(path).manifest.plan.speculation) == ("tiny-fp32-cpu-ngram4-match2.engine", spec)
    with open_engine(path) as engine:
        assert engine.info.speculation == spec
    with open_engine(path, speculation="off") as engine:
        assert engine.info.speculation is None


@pytest.mark.slow
def test_an_engine_in_a_process_of_its_own_tells_its_speculation(model: Path) -> None:
    with open_engine(_build(model), isolated=True, speculation="ngram:4,match=2") as engine:
        assert engine.info.speculation == SpeculationSpec(max_draft_tokens=4, max_ngram=2)


def test_an_engine_built_without_speculation_says_nothing_of_it(model: Path) -> None:
    assert "speculation" not in (_build(model) / "trtkit.json").read_text()


def test_a_dry_run_names_the_speculation(model: Path) -> None:
    options = ("--model", model, "--load-format", "dummy", "--dry-run")
    assert ", KV policy full, speculation ngram:4\n" in _invoke("build", *options, "--speculate", "ngram:4")
    assert "speculation" not in _invoke("build", *options)


def test_the_command_line_switches_off_what_a_recipe_switches_on(model: Path) -> None:
    recipe = BuildOptions(model=str(model), load_format="dummy", speculate="ngram:4")
    assert make_plan(BuildOptions().over(recipe))[0].speculation == SpeculationSpec(max_draft_tokens=4)
    assert make_plan(BuildOptions(speculate="off").over(recipe))[0].speculation is None


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--speculate", "ngram:4", "--kv", "h2o:50%"), "an eviction cannot be taken back"),
        (("--speculate", "ngram:four"), "expected a number, as in off, ngram:4"),
        (("--speculate", "medusa"), "unknown speculation 'medusa'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(model: Path, options: tuple[str, ...], line: str) -> None:
    out = model.parent / "out"
    code, told = _run("build", "--model", model, "--load-format", "dummy", "--output", out, *options)
    assert code != 0
    assert line in told
    assert not out.exists()


def test_generate_writes_the_same_with_speculation_and_counts_its_guesses(model: Path) -> None:
    path = _build(model)
    prompt = ("generate", path, "--prompt-ids", REPEATING, "--max-tokens", 40, "--ignore-eos", "--json")
    plain, guessed = json.loads(_invoke(*prompt)), json.loads(_invoke(*prompt, "--speculate", "ngram:4,adaptive=no"))
    assert guessed["output_ids"] == plain["output_ids"]
    assert (plain["speculation"], plain["draft_tokens"]) == ("off", 0)
    assert guessed["speculation"] == "ngram:4,adaptive=no"
    assert 0 <= guessed["accepted_tokens"] <= guessed["draft_tokens"]
    assert guessed["draft_tokens"] > 0


@pytest.mark.slow
def test_a_benchmark_with_speculation_is_a_record_of_its_own_that_tells_how_the_guesses_did(
    model: Path, tmp_path: Path
) -> None:
    path, out = _build(model), tmp_path / "results"
    load = ("--concurrency", 2, "--isl", 32, "--osl", 40, "--num-requests", 4, "--warmup", 2, "--repeats", 1)
    _invoke("bench", path, *load, "-o", out)
    table = _invoke("bench", path, *load, "-o", out, "--speculate", "ngram:4,adaptive=no")
    assert "Baseline (FP32) + n-gram 4" in table
    records = [read_record(file, BENCH_KIND, BenchResult) for file in sorted(out.glob("*.json"))]
    found = {r.engine.plan.speculation: r for r in records}
    guessing = found[SpeculationSpec(max_draft_tokens=4, adaptive=False)]
    counts = guessing.repeats[0].kv
    assert f"{counts.accepted_tokens:,} of {counts.draft_tokens:,} guessed tokens were right" in table
    assert counts.draft_tokens
    assert found[None].repeats[0].kv.draft_tokens == 0
    assert guessing.engine.digest != found[None].engine.digest
    assert all(r.valid for r in records), [c for r in records for c in r.checks if c.status == "fail"]
    assert set(guessing.shares) <= {"ttft_ms", "tps"}, "the limit of one lucky request's TPOT is unknown"
