"""`trtkit convert` and `trtkit build` as people run them: output, exit codes, and a real kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.tiny_checkpoints import write_model
from typer.testing import CliRunner

from trtkit.backends import verify as verify_module
from trtkit.cli.app import build_app
from trtkit.spec.errors import CapacityError, InputError, OutputError, UsageError
from trtkit.trtllm.journal import NAME as JOURNAL_NAME

STOPPING_CONVERT = """
import itertools, sys, time
from trtkit.trtllm.piece import PieceWorker
real, count = PieceWorker.move, itertools.count(1)
def move(self, piece):
    if next(count) > 6:
        time.sleep(600)
    real(self, piece)
PieceWorker.move = move
from trtkit.cli.app import main
sys.argv = ["trtkit", "convert", *sys.argv[1:]]
main()
"""


def trtkit(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(build_app(requested={arguments[0]}), list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_convert_says_what_it_wrote(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    code, out, err = trtkit("convert", str(tmp_path / "m"), str(tmp_path / "out"), "--precision", "int8", "--tp", "2")
    assert (code, err) == (0, "")
    assert "2 rank(s)" in out
    assert (tmp_path / "out" / "rank1.safetensors").is_file()


def test_convert_json_is_one_object(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    code, out, _ = trtkit("convert", str(tmp_path / "m"), str(tmp_path / "out"), "--json")
    assert code == 0
    assert json.loads(out)["output_bytes"] == (tmp_path / "out" / "rank0.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("{m}", "{m}"), OutputError),
        (("{t}/nothing", "{t}/out"), InputError),
        (("{m}", "{t}/out", "--precision", "int9"), UsageError),
        (("{m}", "{t}/out", "--tp", "0"), UsageError),
        (("{m}", "{t}/out", "--tp", "3"), UsageError),
        (("{m}", "{t}/out", "--precision", "fp16", "--dtype", "fp32"), UsageError),
    ],
)
def test_bad_convert_arguments_are_one_line(tmp_path: Path, arguments: tuple[str, ...], error: type) -> None:
    write_model(tmp_path / "m")
    code, out, err = trtkit("convert", *(a.format(m=tmp_path / "m", t=tmp_path) for a in arguments))
    assert (code, out, err.count("\n")) == (error.exit_code, "", 1)  # type: ignore[attr-defined]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_a_conversion_killed_with_kill_9_continues(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    command = [sys.executable, "-c", STOPPING_CONVERT, str(tmp_path / "m"), str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = tmp_path / "out.partial" / JOURNAL_NAME
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not journal.is_file() or journal.read_bytes().count(b"\n") < 7):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    code, out, _ = trtkit("convert", str(tmp_path / "m"), str(tmp_path / "out"), "--json")
    assert code == 0
    assert json.loads(out)["resumed_pieces"] == 6 < json.loads(out)["pieces"]
    trtkit("convert", str(tmp_path / "m"), str(tmp_path / "fresh"))
    assert (tmp_path / "out" / "rank0.safetensors").read_bytes() == (
        tmp_path / "fresh" / "rank0.safetensors"
    ).read_bytes()


def test_build_from_a_recipe_with_options_on_top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "verify", lambda *_: {"drift": 0.0})
    write_model(tmp_path / "m")
    (tmp_path / "mine.toml").write_text('model = "./m"\nprecision = "int8"\n')
    options = ("--max-seq-len", "64", "--output", str(tmp_path / "builds"), "--json")
    code, out, _ = trtkit("build", str(tmp_path / "mine.toml"), *options)
    assert code == 0
    built = json.loads(out)
    assert built["path"] == str(tmp_path / "builds" / "mine.engine")
    assert built["manifest"]["plan"]["limits"]["max_seq_len"] == 64


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    output = tmp_path / "builds"
    code, out, _ = trtkit("build", "--model", str(tmp_path / "m"), "--dry-run", "--output", str(output))
    assert (code, output.exists()) == (0, False)
    assert "verify the checkpoint" in out


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((), UsageError),
        (("no-such-recipe",), UsageError),
        (("--model", "{m}", "--gpu", "h1000"), UsageError),
        (("--model", "{m}", "--target", "onnx"), UsageError),
        (("--model", "{m}", "--max-batch-size", "0"), UsageError),
        (("--model", "{m}", "--kv", "h2o:0%"), UsageError),
        (("--model", "{m}", "--kv-memory", "1KiB"), CapacityError),
        (("--model", "{m}/nothing"), InputError),
    ],
)
def test_bad_build_arguments_are_one_line(tmp_path: Path, arguments: tuple[str, ...], error: type) -> None:
    write_model(tmp_path / "m")
    given = [argument.format(m=tmp_path / "m") for argument in arguments]
    code, out, err = trtkit("build", *given, "--output", str(tmp_path / "builds"))
    assert (code, out, err.count("\n")) == (error.exit_code, "", 1)  # type: ignore[attr-defined]
    assert not (tmp_path / "builds").exists()
