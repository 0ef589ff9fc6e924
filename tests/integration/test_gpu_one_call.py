"""The shell around the GPU stages, with a stand-in for python: signals, caches and what is kept. No torch, no stage."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench/gpu/one_call.sh"
PYTHON = """#!/bin/sh
case "$1" in
  *sources.py) echo /nowhere ;;
  -c) sleep "${FAKE_IMPORT_S:-0}" ;;
  *summary.py) sleep 0.3; echo "the table" ;;
  *recompute.py) echo "7 numbers compared, 0 differ" ;;
  *llama70b.py) echo "cache: $TRITON_CACHE_DIR"; : >"$3/.llama70b.json.1.tmp"; exec sleep "${FAKE_STAGE_S:-0}" ;;
esac
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "python3"
    stand_in.write_text(PYTHON)
    stand_in.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "TRTKIT"))}
    return kept | {"PATH": f"{stand_in.parent}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(tmp_path)}


def command(out: Path, *more: str) -> list[str]:
    return ["bash", str(SCRIPT), str(out), "--limit-s", "100", "--stages", "core", *more]


def called(out: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(command(out), capture_output=True, text=True, check=False, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout + (out / "one_call.log").read_text()


def test_compiled_kernels_stay_where_the_caller_says(tmp_path: Path, environment: dict[str, str]) -> None:
    cache = tmp_path / "made" / "cache"
    assert f"cache: {cache}\n" in called(tmp_path / "out", environment | {"TRITON_CACHE_DIR": str(cache)})
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("cache", ["", "bin/python3/below"])
def test_without_a_folder_to_write_compiled_kernels_go_to_a_temporary_one(
    tmp_path: Path, environment: dict[str, str], cache: str
) -> None:
    told = called(tmp_path / "out", environment | {"TRITON_CACHE_DIR": str(tmp_path / cache) if cache else ""})
    (used,) = [line.removeprefix("cache: ") for line in told.splitlines() if line.startswith("cache: ")]
    assert used.startswith(f"{tmp_path}/tmp.")
    assert not Path(used).exists()
    assert ("cannot be written" in told) == bool(cache)


def test_a_signal_before_the_stage_is_waited_for_ends_it_all_the_same(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    """The moment between the start of a stage and the next command, made certain by a trap before every command."""
    hook = tmp_path / "hook.sh"
    hook.write_text("""set -T
hook() { case "$1" in wait\\ \\"* | child=\\$!) trap - DEBUG; kill -TERM $$ ;; esac; }
trap 'hook "$BASH_COMMAND"' DEBUG
""")
    out, seconds = tmp_path / "out", f"77.{os.getpid()}"
    done = subprocess.run(
        command(out), capture_output=True, text=True, check=False, timeout=60,
        env=environment | {"BASH_ENV": str(hook), "FAKE_IMPORT_S": seconds, "FAKE_STAGE_S": seconds},
    )  # fmt: skip
    assert "the table" in done.stdout
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert f"sleep {seconds}" not in running


def test_two_signals_to_everybody_lose_neither_table_nor_log_and_leave_nothing_behind(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    """As `timeout bash one_call.sh` does: one signal to the shell, another to its whole group."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(out),
        stdout=subprocess.PIPE,
        text=True,
        env=environment | {"FAKE_STAGE_S": "60"},
        start_new_session=True,
    )
    log, temporary = out / "one_call.log", out / ".llama70b.json.1.tmp"
    deadline_s = time.monotonic() + 30
    while not temporary.exists() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.15)
    os.killpg(process.pid, signal.SIGTERM)
    told, _ = process.communicate(timeout=60)
    assert "the table\n7 numbers compared, 0 differ\nstages, exit codes: core ended by a signal; (" in told
    assert process.returncode == 0
    assert "0 differ" in log.read_text()
    assert sorted(path.name for path in out.iterdir()) == ["one_call.log", "summary.txt"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("tmp.")] == []


def test_the_time_of_a_cold_import_is_taken_from_every_stage(tmp_path: Path, environment: dict[str, str]) -> None:
    told = called(tmp_path / "out", environment | {"FAKE_IMPORT_S": "2"})
    (seconds,) = [int(line.split()[2]) for line in told.splitlines() if line.startswith("== imports:")][:1]
    assert seconds >= 2
    (share,) = [int(line.split()[4]) for line in told.splitlines() if line.startswith("== core: at most")][:1]
    assert share <= 100 - 5 - seconds
