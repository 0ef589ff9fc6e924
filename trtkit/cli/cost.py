"""`trtkit cost`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtkit.cli.common import JsonFlag, emit

Option = typer.Option


def command(
    records: Annotated[list[Path] | None, typer.Argument(help="Benchmark records to price.")] = None,
    tps: Annotated[float | None, Option(help="Output tokens per second, instead of records.")] = None,
    tps_low: Annotated[float | None, Option(help="Lower end of its interval.")] = None,
    tps_high: Annotated[float | None, Option(help="Upper end of its interval.")] = None,
    input_tps: Annotated[float | None, Option(help="Prompt tokens per second at the same load.")] = None,
    slo_tps: Annotated[float | None, Option(help="Output tokens per second that still keep the SLO.")] = None,
    gpu: Annotated[str, Option(help="GPU of the price list.")] = "h100",
    num_gpus: Annotated[int, Option(min=1, help="How many.")] = 1,
    kind: Annotated[str, Option(help="cloud, reserved or onprem.")] = "cloud",
    price_name: Annotated[str | None, Option(help="One vendor of the price list.")] = None,
    usd_per_gpu_h: Annotated[float | None, Option(help="Price instead of the list's.")] = None,
    utilisation: Annotated[float | None, Option(help="Share of the time the machine works, in (0, 1].")] = None,
    tokens_per_month: Annotated[str | None, Option(help="Output tokens served a month, e.g. 200M.")] = None,
    prices: Annotated[Path | None, Option(help="Your own prices (TOML).")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Price throughput per million tokens: every definition named, the arithmetic shown, break-even against APIs."""
    from trtkit.plan.cost_report import CostQuestion, answer_cost, cost_text, loads

    question = CostQuestion(
        gpu=gpu,
        num_gpus=num_gpus,
        kind=kind,
        price_name=price_name,
        usd_per_gpu_h=usd_per_gpu_h,
        utilisation=utilisation,
        tokens_per_month=tokens_per_month,
        prices=prices,
    )
    report = answer_cost(question, loads(records or (), (tps, tps_low, tps_high), input_tps, slo_tps))
    emit(report, cost_text(report), as_json=as_json)
