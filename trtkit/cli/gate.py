"""`trtkit gate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtkit.cli.common import JsonFlag, emit

Side = Annotated[str, typer.Argument(help="An engine, a record file, a directory of one engine's records, or a name.")]
Rules = Annotated[Path | None, typer.Option(help="Rules as TOML, under the flags' names with underscores.")]
MmluDrop = Annotated[str | None, typer.Option("--max-mmlu-drop", help="Points of MMLU that may be lost.")]
Drop = Annotated[list[str] | None, typer.Option("--max-drop", help="TASK=POINTS or TASK/METRIC=VALUE; repeatable.")]
Ttft = Annotated[str | None, typer.Option("--max-ttft-p99", help="Such as 500ms.")]
TtftMedian = Annotated[str | None, typer.Option("--max-ttft-p50", help="Such as 200ms.")]
Tpot = Annotated[str | None, typer.Option("--max-tpot-p99", help="Such as 40ms.")]
Gain = Annotated[str | None, typer.Option("--min-tps-gain", help="Throughput over the reference's, such as 1.3.")]
Vram = Annotated[str | None, typer.Option("--max-vram", help="Such as 78GiB.")]
Kl = Annotated[str | None, typer.Option("--max-kl", help="Nats per token against the reference (eval --reference).")]
Agreement = Annotated[str | None, typer.Option("--min-agreement", help="Share of equal best tokens, such as 98%.")]
Results = Annotated[Path, typer.Option(help="Where the records of engines are looked up.")]
Junit = Annotated[Path | None, typer.Option(help="Write JUnit XML there.")]
Summary = Annotated[
    Path | None, typer.Option("--github-summary", envvar="GITHUB_STEP_SUMMARY", help="Append Markdown there.")
]


def command(
    reference: Side,
    candidate: Side,
    rules: Rules = None,
    max_mmlu_drop: MmluDrop = None,
    max_drop: Drop = None,
    max_ttft_p99: Ttft = None,
    max_ttft_p50: TtftMedian = None,
    max_tpot_p99: Tpot = None,
    min_tps_gain: Gain = None,
    max_vram: Vram = None,
    max_kl: Kl = None,
    min_agreement: Agreement = None,
    results: Results = Path("results"),
    junit: Junit = None,
    github_summary: Summary = None,
    as_json: JsonFlag = False,
) -> None:
    """Hold CANDIDATE against rules and against REFERENCE. Ends with 0 (pass), 1 (fail) or 9 (invalid measurement)."""
    from trtkit.quality.gate import run_gate
    from trtkit.quality.gate_output import gate_text, write_outputs
    from trtkit.quality.rules import gather_rules
    from trtkit.report.sides import load_sides

    flags = {
        "max_mmlu_drop": max_mmlu_drop, "max_ttft_p99": max_ttft_p99, "max_ttft_p50": max_ttft_p50,
        "max_tpot_p99": max_tpot_p99, "min_tps_gain": min_tps_gain, "max_vram": max_vram, "max_kl": max_kl,
        "min_agreement": min_agreement,
    }  # fmt: skip
    wanted = gather_rules(rules, flags, max_drop or ())
    base, other = load_sides([reference, candidate], results)
    result = run_gate(base, other, wanted)
    write_outputs(result, junit=junit, summary=github_summary)
    emit({"gate": result, "status": result.status, "exit_code": result.exit_code}, gate_text(result), as_json=as_json)
    raise typer.Exit(result.exit_code)
