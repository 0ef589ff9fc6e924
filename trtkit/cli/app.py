"""The `trtkit` command: commands are imported when they are called, and errors become one line here."""

from __future__ import annotations

import functools
import importlib
import sys
import traceback
from collections.abc import Callable
from typing import Annotated

import typer

from trtkit.spec.errors import EXIT_BUG, EXIT_CODES, EXIT_INTERRUPTED, TrtkitError
from trtkit.version import __version__

COMMANDS: dict[str, tuple[str, str]] = {
    "build": ("trtkit.cli.build", "Build an engine from a checkpoint."),
    "convert": ("trtkit.cli.convert", "Convert a Hugging Face checkpoint to a TensorRT-LLM checkpoint."),
    "doctor": ("trtkit.cli.doctor", "What this machine can build and run, and why not the rest."),
    "generate": ("trtkit.cli.generate", "Generate from token ids or text with an engine."),
    "chat": ("trtkit.cli.chat", "Talk to an engine."),
    "bench": ("trtkit.cli.bench", "Benchmark engines with one protocol."),
    "eval": ("trtkit.cli.eval", "Judge quality on tasks and on your own prompts."),
    "compare": ("trtkit.cli.compare", "Put configurations side by side, with verdicts."),
    "gate": ("trtkit.cli.gate", "Pass or fail a configuration by rules; for CI."),
    "plan": ("trtkit.cli.plan", "What fits, how fast it can be and what it costs, before renting."),
    "audit": ("trtkit.cli.audit", "Hold claimed numbers against physics and against each other."),
    "audit-report": ("trtkit.cli.audit_report", "Write down what to change, what it saves and what not to do."),
    "cost": ("trtkit.cli.cost", "Price throughput per million tokens."),
    "report": ("trtkit.cli.report", "Render records as Markdown, HTML, CSV or JSON."),
    "demo": ("trtkit.cli.demo", "Run the whole job on the shipped tiny model."),
}
"""Command -> (module with a function `command`, one-line help)."""

_EPILOG = "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES) + "."


def bordered(function: Callable[..., None]) -> Callable[..., None]:
    """Run a command; its `TrtkitError` becomes one line and an exit code, anything else a traceback and EXIT_BUG."""

    @functools.wraps(function)
    def run(*args: object, **kwargs: object) -> None:
        try:
            function(*args, **kwargs)
        except TrtkitError as error:
            print(f"trtkit: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            print("trtkit: interrupted; finished work is kept", file=sys.stderr)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            sys.stderr.close()
            raise typer.Exit(0) from None
        except typer.Exit:
            raise
        except Exception:  # noqa: BLE001 - the border: a bug keeps its traceback and gets its own exit code
            traceback.print_exc()
            raise typer.Exit(EXIT_BUG) from None

    return run


def build_app(requested: set[str] | None = None) -> typer.Typer:
    """The app with the `requested` commands imported and the rest as names with help (None: all imported)."""
    app = typer.Typer(
        name="trtkit",
        help="Make serving Llama-class models on TensorRT-LLM cheap, and prove it.",
        epilog=_EPILOG,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_root)
    for name, (module, summary) in COMMANDS.items():
        if requested is None or name in requested:
            command = importlib.import_module(module).command
            app.command(name, short_help=summary)(bordered(command))
        else:
            app.command(name, help=summary)(_not_imported)
    return app


def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def _not_imported() -> None:
    raise AssertionError("only listed for --help")


def main() -> None:
    """Entry point of the console script."""
    build_app(requested=set(sys.argv[1:]) & set(COMMANDS))()
