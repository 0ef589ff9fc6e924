"""`trtkit convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trtkit.cli.common import ForceFlag, JsonFlag, emit, progress_bars
from trtkit.spec.dtype import DType
from trtkit.spec.errors import UsageError
from trtkit.spec.plan import Parallelism
from trtkit.spec.quant import quant_for
from trtkit.spec.units import format_gib


def command(
    source: Annotated[Path, typer.Argument(help="Hugging Face model directory (safetensors, single or sharded).")],
    output: Annotated[Path, typer.Argument(help="Checkpoint directory to create.")],
    precision: Annotated[
        str, typer.Option(help="fp32, fp16, bf16, int8 (weight-only), int8-gptq, int4 or fp8-rowwise.")
    ] = "fp16",
    dtype: Annotated[
        str | None, typer.Option(help="Compute type beside int8 or int4 weights: fp16 (default), bf16 or fp32.")
    ] = None,
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks.")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline-parallel ranks.")] = 1,
    target: Annotated[
        str,
        typer.Option(help="embedded, or tensorrt (int8 stays 16-bit, int8-gptq unpacked; TensorRT-LLM does the rest)."),
    ] = "embedded",
    force: ForceFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Convert a Hugging Face checkpoint to a TensorRT-LLM checkpoint; a killed run continues where it stopped."""
    from trtkit.trtllm.convert import convert

    quant = quant_for(precision, compute=DType.parse(dtype) if dtype else None)
    if dtype and quant.compute is not DType.parse(dtype):
        raise UsageError(f"--dtype {dtype} with --precision {precision}: --dtype is for int8 and int4, leave it out")
    parallel = Parallelism(tp=tp, pp=pp)
    with progress_bars(quiet=as_json) as progress:
        result = convert(source, output, quant=quant, parallel=parallel, target=target, force=force, progress=progress)
    resumed = f", {result.resumed_pieces} of {result.pieces} pieces kept from before" if result.resumed_pieces else ""
    emit(
        result,
        f"{result.output}: {result.model} as {precision}, {format_gib(result.output_bytes)} in "
        f"{parallel.world_size} rank(s), {result.seconds:.1f} s{resumed}",
        as_json=as_json,
    )
