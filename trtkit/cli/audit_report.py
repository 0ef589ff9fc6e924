"""`trtkit audit-report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtkit.cli.common import JsonFlag, emit, note

Sides = Annotated[list[str], typer.Argument(help="What runs today, then the levers: engines, records or names.")]
Traffic = Annotated[str, typer.Option(help="Output tokens a month, such as 200M or 200M/month, or 5M/day.")]
Spend = Annotated[str | None, typer.Option(help="The bill, in USD a month, such as 47000 or 47K.")]
Busy = Annotated[float, typer.Option(help="Share of the month the machines do useful work (assumed, unless you know).")]
Results = Annotated[Path, typer.Option(help="Where the records of engines are looked up.")]
Prices = Annotated[Path | None, typer.Option(help="Your own prices (TOML), on top of the shipped ones.")]
Planned = Annotated[Path | None, typer.Option(help="Levers that were only planned: JSON, see docs/quality.md.")]
Format = Annotated[str, typer.Option("--format", help="md or html.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Write there instead of printing.")]


def command(
    sides: Sides,
    traffic: Traffic,
    spend: Spend = None,
    busy: Busy = 0.5,
    results: Results = Path("results"),
    prices: Prices = None,
    planned: Planned = None,
    fmt: Format = "md",
    output: Output = None,
    as_json: JsonFlag = False,
) -> None:
    """Write the read: what traffic costs today, levers ranked by saving and friction, what to do on Monday."""
    from trtkit.plan.prices import load_prices
    from trtkit.quality.advice import Situation, advise
    from trtkit.quality.amounts import tokens_per_month, usd_per_month
    from trtkit.quality.planned import read_planned
    from trtkit.report.advice import render_advice
    from trtkit.report.sides import load_sides
    from trtkit.spec.atomic import write_text

    situation = Situation(
        tokens_month=tokens_per_month(traffic),
        spend_usd_month=None if spend is None else usd_per_month(spend),
        busy=busy,
    )
    advice = advise(situation, load_sides(sides, results), load_prices(prices), read_planned(planned))
    text = render_advice(advice, fmt)
    if output is not None:
        write_text(output, text)
        note(f"written: {output}", as_json=as_json)
    emit(advice, text if output is None else str(output), as_json=as_json)
