"""`trtkit audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtkit.cli.common import JsonFlag, emit

Option = typer.Option


def command(
    path: Annotated[Path, typer.Argument(help="A record, a CSV or Markdown table of claims, or another tool's JSON.")],
    model: Annotated[str, Option(help="Fills empty model cells.")] = "",
    gpu: Annotated[str, Option(help="Fills empty GPU cells.")] = "",
    num_gpus: Annotated[str, Option(help="Fills empty GPU counts.")] = "",
    precision: Annotated[str, Option(help="Fills empty precisions, e.g. fp16, int8.")] = "",
    kv_dtype: Annotated[str, Option(help="Fills empty cache types, e.g. fp8.")] = "",
    accept_length: Annotated[str, Option(help="Tokens per verified step (speculative decoding).")] = "",
    cached_tokens: Annotated[str, Option(help="Prompt tokens that came from a prefix cache.")] = "",
    sparsity: Annotated[str, Option(help="Declared structured sparsity: 2:4.")] = "",
    catalog: Annotated[list[Path] | None, Option(help="Your own GPUs and models (TOML).")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Hold each claimed number against physics and against the others: possible, implausible, impossible, inconsistent.

    Exit code 0 whatever the verdicts; a wrong row is reported and the rest still audited.
    """
    from trtkit.audit.run import audit_file, findings_text

    given = {
        "model": model,
        "gpu": gpu,
        "num_gpus": num_gpus,
        "precision": precision,
        "kv_dtype": kv_dtype,
        "accept_length": accept_length,
        "cached_tokens": cached_tokens,
        "sparsity": sparsity,
    }
    findings = audit_file(path, defaults={k: v for k, v in given.items() if v}, catalogs=tuple(catalog or ()))
    emit(findings, findings_text(findings), as_json=as_json)
