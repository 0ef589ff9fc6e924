"""The command line's border: listing, exit codes, error lines, and what it costs to ask for help."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from trtkit.cli.app import COMMANDS, bordered, build_app
from trtkit.spec.errors import EXIT_BUG, EXIT_CODES, EXIT_INTERRUPTED, CapacityError, TrtkitError

HEAVY = ("torch", "transformers", "pandas", "numpy", "lm_eval", "matplotlib", "tensorrt_llm", "triton")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_help_lists_every_command() -> None:
    result = CliRunner().invoke(build_app(requested=set()), ["--help"])
    assert result.exit_code == 0
    assert [name for name in COMMANDS if name not in result.output] == []


def test_help_imports_no_framework() -> None:
    code = (
        "import sys; sys.argv = ['trtkit', '--help']\n"
        "from trtkit.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    assert run_python(code).stderr.strip() == "[]"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_of_a_command_imports_no_torch(name: str) -> None:
    code = (
        f"import sys; sys.argv = ['trtkit', {name!r}, '--help']\n"
        "from trtkit.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "print([m for m in ('torch', 'transformers', 'lm_eval') if m in sys.modules], file=sys.stderr)"
    )
    run = run_python(code)
    assert (run.returncode, run.stderr.strip()) == (0, "[]")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_takes_json(name: str) -> None:
    result = CliRunner().invoke(build_app(requested={name}), [name, "--help"])
    assert "--json" in result.output


def app_of(function: object) -> typer.Typer:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(bordered(function))  # type: ignore[arg-type]
    return app


def test_a_trtkit_error_is_one_line_and_its_exit_code() -> None:
    def command() -> None:
        raise CapacityError("needs 3 GiB more")

    result = CliRunner().invoke(app_of(command), [])
    assert result.exit_code == CapacityError.exit_code
    assert result.stderr == "trtkit: needs 3 GiB more\n"
    assert result.stdout == ""


def test_a_bug_keeps_its_traceback() -> None:
    def command() -> None:
        raise ZeroDivisionError("planted")

    result = CliRunner().invoke(app_of(command), [])
    assert result.exit_code == EXIT_BUG
    assert "Traceback" in result.stderr
    assert "planted" in result.stderr


def test_ctrl_c_says_that_finished_work_is_kept() -> None:
    def command() -> None:
        raise KeyboardInterrupt

    result = CliRunner().invoke(app_of(command), [])
    assert result.exit_code == EXIT_INTERRUPTED
    assert result.stderr == "trtkit: interrupted; finished work is kept\n"


def test_an_unknown_command_is_a_usage_error() -> None:
    assert CliRunner().invoke(build_app(requested=set()), ["nope"]).exit_code == 2


def test_exit_codes_are_distinct_and_cover_every_error() -> None:
    codes = [code for code, _ in EXIT_CODES]
    assert len(codes) == len(set(codes))
    assert {cls.exit_code for cls in TrtkitError.__subclasses__()} <= set(codes)


def test_version_is_printed() -> None:
    from trtkit import __version__

    result = CliRunner().invoke(build_app(requested=set()), ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"{__version__}\n")
