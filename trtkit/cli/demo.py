"""`trtkit demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtkit.cli.common import JsonFlag, emit, note, progress_bars

Output = Annotated[Path, typer.Option("--output-dir", "-o", help="Records and report.md, .html and .json go here.")]
Engines = Annotated[Path, typer.Option(help="Directory that the engines go to.")]
Protocol = Annotated[str, typer.Option(help="A protocol's name, or a TOML file.")]
Prices = Annotated[Path | None, typer.Option(help="Your prices (TOML), laid over the built-in table.")]
Again = Annotated[bool, typer.Option("--force", help="Build and measure again, whatever an earlier run finished.")]


def command(
    *,
    output_dir: Output = Path("results/demo"),
    engines_dir: Engines = Path("builds"),
    protocol: Protocol = "demo",
    prices: Prices = None,
    force: Again = False,
    as_json: JsonFlag = False,
) -> None:
    """Run the whole job on the shipped tiny model, on this CPU, in about five minutes.

    Builds four engines (32-bit and INT8, each with the full KV cache and with H2O at half of it), benchmarks each in
    a fresh process with the demo protocol, scores held-out text, prices the throughput, prints the comparison and
    writes it as Markdown, HTML and JSON. What an earlier run finished is kept. An engine that cannot be built here is
    left out, and the report says why.
    """
    from trtkit.audit.records import check_result
    from trtkit.cli.demo_run import DemoSettings, run_demo
    from trtkit.plan.prices import load_prices
    from trtkit.report.write import render

    with progress_bars(quiet=as_json) as progress:
        settings = DemoSettings(
            output_dir=output_dir,
            engines_dir=engines_dir,
            protocol=protocol,
            prices=load_prices(prices),
            again=force,
            judge=check_result,
            progress=progress,
            note=lambda text: note(text, as_json=as_json),
        )
        demo = run_demo(settings)
    written = "\n".join(str(path) for path in demo.files)
    emit(demo, f"{render(demo.report, 'console')}\n\n{demo.seconds:.0f} s. Written:\n{written}", as_json=as_json)
