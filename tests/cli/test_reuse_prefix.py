"""Prefix reuse from the command line: built in, switched for a benchmark, and refused where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny_checkpoints import ONE_LAYER
from typer.testing import CliRunner

from trtkit.backends import open_engine
from trtkit.backends.recipe import BuildOptions, make_plan
from trtkit.cli.app import build_app
from trtkit.cli.generate_run import chat_json
from trtkit.spec.bundle import open_bundle
from trtkit.spec.codec import read_record
from trtkit.spec.engine import Request, Sampling
from trtkit.spec.result import BENCH_KIND, BenchResult

runner = CliRunner()


def _invoke(*arguments: object) -> str:
    result = runner.invoke(
        build_app(requested={str(arguments[0])}), [str(a) for a in arguments], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.stdout


def _refused(*arguments: object) -> str:
    result = runner.invoke(build_app(requested={str(arguments[0])}), [str(a) for a in arguments])
    assert result.exit_code != 0, result.output
    return " ".join(result.output.split())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The shape of a tiny model; its weights are made up when it is opened."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(ONE_LAYER))
    return tmp_path / "tiny"


def _build(model: Path, *options: object) -> Path:
    where = model.parent / "builds"
    common = (
        "--model",
        model,
        "--load-format",
        "dummy",
        "--precision",
        "fp32",
        "--max-seq-len",
        256,
        "--output",
        where,
    )
    return Path(json.loads(_invoke("build", *common, "--json", *options))["path"])


def test_an_engine_is_built_with_prefix_reuse_and_opens_with_it(model: Path) -> None:
    path = _build(model, "--reuse-prefix", "--name", "on")
    assert open_bundle(path).manifest.plan.limits.enable_block_reuse
    prompt = tuple(range(3, 80))
    with open_engine(path) as engine:
        for name in "ab":
            list(engine.generate([Request(request_id=name, prompt_ids=prompt, max_tokens=2)]))
        assert engine.kv_stats().prompt_tokens_reused == 64
    with open_engine(_build(model, "--name", "off")) as engine:
        list(engine.generate([Request(request_id="a", prompt_ids=prompt, max_tokens=2)]))
        assert engine.kv_stats().blocks_cached == 0


def test_an_engine_that_reuses_prefixes_has_a_name_of_its_own(model: Path) -> None:
    names = [
        make_plan(BuildOptions(model=str(model), load_format="dummy", reuse_prefix=on))[0].name for on in (None, True)
    ]
    assert names[1] == f"{names[0]}-reuse"
    named = BuildOptions(model=str(model), load_format="dummy", reuse_prefix=True, name="mine")
    assert make_plan(named)[0].name == "mine"


def test_an_engine_built_before_there_was_prefix_reuse_opens_without_it(model: Path) -> None:
    path = _build(model)
    assert "enable_block_reuse" not in (path / "trtkit.json").read_text()
    assert not open_bundle(path).manifest.plan.limits.enable_block_reuse


def test_a_dry_run_says_that_prefixes_are_reused(model: Path) -> None:
    options = ("--model", model, "--load-format", "dummy", "--dry-run")
    assert "tokens a request, prefixes reused" in _invoke("build", *options, "--reuse-prefix")
    assert "prefixes reused" not in _invoke("build", *options)


def test_the_command_line_switches_off_what_a_recipe_switches_on(model: Path) -> None:
    recipe = BuildOptions(model=str(model), load_format="dummy", reuse_prefix=True)
    off = BuildOptions(reuse_prefix=False).over(recipe)
    assert make_plan(BuildOptions().over(recipe))[0].limits.enable_block_reuse
    assert not make_plan(off)[0].limits.enable_block_reuse


def test_eviction_with_prefix_reuse_is_refused_before_anything_is_written(model: Path) -> None:
    told = _refused(
        "build",
        "--model",
        model,
        "--load-format",
        "dummy",
        "--kv",
        "h2o:50%",
        "--reuse-prefix",
        "--output",
        model / "out",
    )
    assert "block reuse with KV policy 'h2o:50%'" in told
    assert "--kv full or --no-reuse-prefix" in told
    assert not (model / "out").exists()


LOAD = ("--concurrency", 2, "--isl", 96, "--osl", 3, "--num-requests", 6, "--warmup", 2, "--repeats", 1)


@pytest.mark.slow
def test_a_benchmark_of_prompts_with_a_shared_prefix_tells_what_was_reused(model: Path, tmp_path: Path) -> None:
    path = _build(model)
    out = tmp_path / "results"
    bench = ("bench", path, *LOAD, "--shared-prefix", 80, "-o", out)
    _invoke(*bench)
    table = _invoke(*bench, "--reuse-prefix")
    assert "384 of 576 prompt tokens were found in blocks of earlier prompts" in table
    records = [read_record(file, BENCH_KIND, BenchResult) for file in sorted(out.glob("*.json"))]
    found = {r.engine.plan.limits.enable_block_reuse: r for r in records}
    assert [found[on].repeats[0].kv.prompt_tokens_reused for on in (False, True)] == [0, 6 * 64]
    assert {r.workload.shared_prefix_tokens for r in records} == {80}
    assert found[True].engine.digest != found[False].engine.digest
    assert all(r.valid for r in records), [c for r in records for c in r.checks if c.status == "fail"]
    assert found[True].workload == found[False].workload


def test_a_prefix_as_long_as_the_prompt_is_refused(model: Path) -> None:
    told = _refused("bench", _build(model), *LOAD, "--shared-prefix", 96)
    assert "shared prefix of 96 tokens: must be above 0 and below --isl 96" in told


def test_a_conversation_reuses_what_was_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trtkit.cli import generate_run

    class Letters:
        """One id a character; the template is the texts one after the other."""

        def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
            return [3 + ord(letter) % 90 for message in messages for letter in message["content"]]

        def decode(self, ids: list[int]) -> str:
            return "".join(chr(90 + (token - 3) % 90) for token in ids)

    opened = []

    def spy(path: Path, **overrides: object) -> object:
        opened.append(open_engine(path, **overrides))
        return opened[-1]

    monkeypatch.setattr(generate_run, "load_tokenizer", lambda _: Letters())
    monkeypatch.setattr(generate_run, "open_engine", spy)
    lines = iter(["a question of some length, longer than a block of tokens", "and another one", "/exit"])
    told: list[str] = []
    chat_json(_build(model), max_tokens=4, sampling=Sampling(), read=lambda _: next(lines), write=told.append)
    assert [json.loads(line)["error"] for line in told] == [None, None]
    assert opened[0].kv_stats().prompt_tokens_reused == 32
