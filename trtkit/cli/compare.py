"""`trtkit compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtkit.cli.common import JsonFlag, emit, note
from trtkit.spec.errors import UsageError

Sides = Annotated[list[str], typer.Argument(help="Reference first: engines, record files, directories, or names.")]
Results = Annotated[Path, typer.Option(help="Where the records of engines are looked up.")]
Format = Annotated[str, typer.Option("--format", help="console, md or html.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Write there instead of printing.")]
Prices = Annotated[Path | None, typer.Option(help="Your own prices (TOML), on top of the shipped ones.")]


def command(
    sides: Sides,
    results: Results = Path("results"),
    fmt: Format = "console",
    output: Output = None,
    prices: Prices = None,
    as_json: JsonFlag = False,
) -> None:
    """Put configurations side by side: speed, memory, cost and quality, each difference with a verdict."""
    from trtkit.quality.compare import compare_sides
    from trtkit.report.compare import FORMATS, render_comparisons
    from trtkit.report.compare_cost import cost_blocks
    from trtkit.report.sides import load_sides
    from trtkit.spec.atomic import write_text

    if fmt not in FORMATS:
        raise UsageError(f"unknown format {fmt!r}: allowed are {', '.join(FORMATS)}")
    found = load_sides(sides, results)
    comparisons = compare_sides(found)
    text = render_comparisons(comparisons, cost_blocks(found, prices), fmt)
    if output is not None:
        write_text(output, text)
        note(f"written: {output}", as_json=as_json)
    emit({"comparisons": comparisons}, text if output is None else str(output), as_json=as_json)
