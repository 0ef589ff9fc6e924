"""`trtkit bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtkit.cli.common import JsonFlag

Engines = Annotated[list[str], typer.Argument(help="Engine directories, e.g. builds/*.engine.", show_default=False)]
Option = typer.Option


def command(
    engines: Engines,
    protocol: Annotated[str, Option(help="A protocol's name, or a TOML file.")] = "token-tax",
    concurrency: Annotated[str | None, Option(help="Requests in flight, e.g. 1,8,32.")] = None,
    isl: Annotated[str | None, Option("--isl", "--input-len", help="Prompt tokens, e.g. 512,4096.")] = None,
    osl: Annotated[str | None, Option("--osl", "--output-len", help="Output tokens of each request.")] = None,
    num_requests: Annotated[int | None, Option(min=1, help="Measured requests per repeat.")] = None,
    warmup: Annotated[int | None, Option(min=0, help="Warm-up requests (at least the concurrency).")] = None,
    request_rate: Annotated[str | None, Option(help="Poisson arrivals per second, e.g. 2,4,inf.")] = None,
    dataset: Annotated[str | None, Option(help="synthetic, sharegpt, sharegpt:FILE or FILE.jsonl.")] = None,
    repeats: Annotated[int | None, Option(min=1, help="Repeats of each cell; intervals need 3.")] = None,
    seed: Annotated[int | None, Option(min=0, help="Seed of prompts and arrivals.")] = None,
    shared_prefix: Annotated[int | None, Option(min=0, help="Tokens that all prompts of a cell begin with.")] = None,
    slo: Annotated[str | None, Option("--slo", "--goodput", help="Limits in ms: ttft:200,tpot:50,e2el:5000.")] = None,
    output_dir: Annotated[Path | None, Option("--output-dir", "-o", help="Records go here.")] = None,
    label: Annotated[list[str] | None, Option(help="ENGINE=TEXT, or TEXT for a single engine.")] = None,
    kv: Annotated[str | None, Option(help="KV policy instead of the engine's, e.g. h2o:50%.")] = None,
    max_batch_size: Annotated[int | None, Option(min=1, help="Limit instead of the engine's.")] = None,
    max_num_tokens: Annotated[int | None, Option(min=1, help="Limit instead of the engine's.")] = None,
    max_seq_len: Annotated[int | None, Option(min=1, help="Limit instead of the engine's.")] = None,
    kv_memory: Annotated[str | None, Option(help="KV pool per rank, e.g. 4GiB.")] = None,
    reuse_prefix: Annotated[
        bool | None, Option("--reuse-prefix/--no-reuse-prefix", help="Reuse blocks of earlier prompts, or do not.")
    ] = None,
    speculate: Annotated[str | None, Option(help="Speculation instead of the engine's: ngram:4, or off.")] = None,
    device: Annotated[str | None, Option(help="Device instead of the engine's: cpu or cuda.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Show the cells and run nothing.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Benchmark engines with one protocol, each in a fresh process, and print one table.

    Finished cells are kept in the output directory: the same command continues after an interruption.
    """
    from trtkit.cli.bench_run import BenchFlags, run

    run(BenchFlags(**{name: value for name, value in locals().items() if name in BenchFlags.__dataclass_fields__}))
