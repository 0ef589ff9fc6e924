"""`trtkit plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtkit.cli.common import ForceFlag, JsonFlag

Option = typer.Option


def command(
    recipes: Annotated[list[str] | None, typer.Argument(help="Recipes: names or TOML files.")] = None,
    model: Annotated[str | None, Option("--model", "-m", help="Preset, hub id, or a directory.")] = None,
    gpu: Annotated[str | None, Option(help="GPU of the catalog; several with commas in a search.")] = None,
    precision: Annotated[str, Option(help="fp16, bf16, fp8, int8, int8-sq, int4, int4-awq, ...")] = "fp16",
    kv: Annotated[str, Option(help="KV policy, e.g. full, h2o:50%.")] = "full",
    kv_dtype: Annotated[str, Option(help="Cache type; by default what the engine would use.")] = "",
    tp: Annotated[int, Option(min=1, help="Tensor-parallel ranks.")] = 1,
    pp: Annotated[int, Option(min=1, help="Pipeline stages.")] = 1,
    isl: Annotated[str, Option(help="Prompt tokens, e.g. 512,4096.")] = "512,4096",
    osl: Annotated[int, Option(min=1, help="Output tokens.")] = 256,
    concurrency: Annotated[str, Option(help="Requests in flight, e.g. 1,8,32,max.")] = "1,8,32",
    request_rate: Annotated[float | None, Option(help="Arrivals per second instead.")] = None,
    max_num_tokens: Annotated[int, Option(min=1, help="Tokens of one step.")] = 8192,
    target: Annotated[str, Option(help="Whose memory: tensorrt, pytorch, embedded.")] = "tensorrt",
    traffic: Annotated[str | None, Option(help="Search for output tokens a month, e.g. 200M/month.")] = None,
    ttft_p99: Annotated[str | None, Option(help="Search limit, e.g. 500ms.")] = None,
    tpot: Annotated[str | None, Option(help="Search limit, e.g. 50ms.")] = None,
    max_mmlu_drop: Annotated[float | None, Option(min=0, help="Search limit in points.")] = None,
    pareto: Annotated[Path | None, Option(help="Plot the search here (.png or .svg).")] = None,
    table: Annotated[Path | None, Option(help="Forecast every row of this CSV.")] = None,
    output: Annotated[Path | None, Option("--output", "-o", help="Where --table writes.")] = None,
    prices: Annotated[Path | None, Option(help="Your own prices (TOML).")] = None,
    catalog: Annotated[list[Path] | None, Option(help="Your own GPUs and models (TOML).")] = None,
    force: ForceFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """What fits, the floor and the forecast beside it, cost; a table of rows; or a search for a traffic."""
    from trtkit.cli.plan_run import PlanFlags, run

    run(PlanFlags(**{name: value for name, value in locals().items() if name in PlanFlags.__dataclass_fields__}))
