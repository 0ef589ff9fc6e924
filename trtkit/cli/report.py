"""`trtkit report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtkit.cli.common import ForceFlag, JsonFlag, emit, note
from trtkit.plan.prices import load_prices
from trtkit.report.assemble import assemble
from trtkit.report.records import load_records
from trtkit.report.write import render, targets, write
from trtkit.spec.errors import InputError

_FORMAT = "console, md, html, csv or json; several separated by commas. Default: console, or by the suffix of --output."


def command(
    results: Annotated[list[Path], typer.Argument(help="Record files, or directories that are searched for them.")],
    *,
    formats: Annotated[str, typer.Option("--format", "-f", help=_FORMAT)] = "",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A file, or a directory for report.md, .html, .csv and .json."),
    ] = None,
    prices: Annotated[Path | None, typer.Option(help="Your prices (TOML), laid over the built-in table.")] = None,
    title: Annotated[str, typer.Option(help="The report's heading.")] = "trtkit comparison",
    force: ForceFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Render benchmark and quality records as one comparison, from the records alone.

    Configurations are columns. An invalid cell is shown as invalid with its reason. A damaged record is named and
    left out; the rest is still reported, and the exit code says so (3).
    """
    chosen = [name.strip() for name in formats.split(",") if name.strip()]
    files = None if output is None else targets(output, chosen)
    records = load_records(results)
    report = assemble(records, load_prices(prices), title=title)
    if files is not None:
        written = [str(path) for path in write(report, files, force=force)]
        emit({"written": written, "problems": report.problems}, "\n".join(written), as_json=as_json)
    else:
        for name in ["json"] if as_json else chosen or ["console"]:
            print(render(report, name).rstrip("\n"))
    for problem in report.problems:
        note(f"trtkit: left out: {problem}", as_json=as_json)
    if report.problems:
        raise typer.Exit(InputError.exit_code)
