"""What commands share: the --json flag, printing, and progress bars that stay silent in a pipe."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from trtkit.spec.codec import to_plain
from trtkit.spec.progress import Progress, no_progress

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output and nothing else.")]
ForceFlag = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]


def emit(payload: object, text: str, *, as_json: bool) -> None:
    """Print `payload` as one JSON line, or `text` for people."""
    print(json.dumps(to_plain(payload), sort_keys=True) if as_json else text)


def note(text: str, *, as_json: bool = False) -> None:
    """A remark for people, on standard error; silent with --json."""
    if not as_json:
        print(text, file=sys.stderr)


@contextlib.contextmanager
def progress_bars(*, quiet: bool = False) -> Iterator[Progress]:
    """A `Progress` that draws bars on a terminal's standard error and does nothing in a pipe."""
    if quiet or not sys.stderr.isatty():
        yield no_progress
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with RichProgress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def report(phase: str, done: float, total: float) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield report
