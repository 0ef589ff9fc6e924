"""Which formats there are, and how a report reaches the disk: whole, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from trtkit.report import console, csv, html, json, markdown
from trtkit.report.model import Report
from trtkit.spec.atomic import output_errors, write_text
from trtkit.spec.errors import OutputError, UsageError

FORMATS: dict[str, Callable[[Report], str]] = {
    "console": console.render,
    "md": markdown.render,
    "html": html.render,
    "csv": csv.render,
    "json": json.render,
}
"""`--format` name -> renderer; the name is also the file's suffix (console: txt)."""
DEFAULT_FILES = ("md", "html", "csv", "json")


def render(report: Report, fmt: str) -> str:
    """The report in one format.

    Raises:
        UsageError: there is no such format; the message lists those there are.
    """
    if fmt not in FORMATS:
        raise UsageError(f"unknown report format {fmt!r}: allowed are {', '.join(FORMATS)}")
    return FORMATS[fmt](report)


def targets(output: Path, formats: Sequence[str]) -> dict[Path, str]:
    """Which file gets which format. `output` is a file if its suffix is a format's, else a directory.

    Raises:
        UsageError: an unknown format, or several formats for one file.
    """
    for fmt in formats:
        if fmt not in FORMATS:
            raise UsageError(f"unknown report format {fmt!r}: allowed are {', '.join(FORMATS)}")
    by_suffix = {_suffix(fmt): fmt for fmt in FORMATS}
    if output.is_dir() or output.suffix not in by_suffix:
        return {output / f"report{_suffix(fmt)}": fmt for fmt in formats or DEFAULT_FILES}
    if len(formats) > 1:
        raise UsageError(f"{output} is one file and {len(formats)} formats were asked for; give a directory")
    return {output: formats[0] if formats else by_suffix[output.suffix]}


def _suffix(fmt: str) -> str:
    return ".txt" if fmt == "console" else f".{fmt}"


def write(report: Report, files: dict[Path, str], *, force: bool = False) -> tuple[Path, ...]:
    """Render everything first, then write each file atomically.

    Raises:
        OutputError: a file exists and `force` is not set, or cannot be written. Nothing is replaced then.
    """
    for path in files:
        with output_errors(path):
            taken = path.exists()
        if taken and not force:
            raise OutputError(f"{path} exists; choose another --output, or --force to replace it")
    texts = {path: render(report, fmt) for path, fmt in files.items()}
    for path, text in texts.items():
        write_text(path, text if text.endswith("\n") else text + "\n")
    return tuple(texts)
