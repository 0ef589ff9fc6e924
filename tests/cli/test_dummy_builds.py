"""`trtkit build --load-format dummy`: an engine without a checkpoint, for measuring speed and memory alone."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from trtkit.cli.app import build_app
from trtkit.spec.bundle import open_bundle

runner = CliRunner()
DUMMY = ("build", "--load-format", "dummy", "--model", "llama-3-70b", "--precision", "int8", "--gpu", "h100")


def _invoke(*arguments: str) -> str:
    result = runner.invoke(build_app(requested={arguments[0]}), list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_bundle_of_random_weights_is_a_manifest_alone(tmp_path: Path) -> None:
    payload = json.loads(_invoke(*DUMMY, "--kv-dtype", "fp8", "--output", str(tmp_path), "--json"))
    bundle = open_bundle(Path(payload["path"]))
    assert [file.name for file in bundle.path.iterdir()] == ["trtkit.json"]
    plan = bundle.manifest.plan
    assert (plan.load_format, plan.target, plan.quant.kv.value) == ("dummy", "embedded", "fp8")


def test_a_dry_run_says_that_nothing_is_converted(tmp_path: Path) -> None:
    payload = json.loads(_invoke(*DUMMY, "--output", str(tmp_path), "--dry-run", "--json"))
    assert payload["checkpoint_bytes"] == 0
    assert len(payload["steps"]) == 1
    assert not list(tmp_path.iterdir())


def _refusal(*arguments: str) -> str:
    result = runner.invoke(build_app(requested={arguments[0]}), list(arguments))
    assert result.exit_code != 0, result.output
    return " ".join(result.output.split())


def test_random_weights_are_not_judged(tmp_path: Path) -> None:
    path = json.loads(_invoke(*DUMMY, "--output", str(tmp_path), "--json"))["path"]
    assert "weights are random" in _refusal("eval", path, "--text", "shipped")


def test_another_load_format_is_refused(tmp_path: Path) -> None:
    told = _refusal("build", "--load-format", "dumy", "--model", "llama-3-70b", "--output", str(tmp_path))
    assert "unknown load format 'dumy': allowed are auto, dummy" in told
