"""`trtkit build`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trtkit.cli.common import ForceFlag, JsonFlag, emit, note, progress_bars

if TYPE_CHECKING:
    from trtkit.backends.model_source import ModelSource
    from trtkit.backends.recipe import BuildOptions
    from trtkit.spec.plan import BuildPlan

_Limit = int | None
Recipe = Annotated[str | None, typer.Argument(help="Recipe: a TOML file, or a name from builds/recipes/.")]
Model = Annotated[
    str | None,
    typer.Option(help="Model directory, catalog preset or hub id; for a GPU the default is Llama 3 70B Instruct."),
]
Name = Annotated[str | None, typer.Option(help="Engine name (default: the recipe's, or made from the options).")]
Precision = Annotated[
    str | None,
    typer.Option(help="fp32, fp16 (default), bf16, int8, int8-gptq, int4, fp8-rowwise, fp8, int4-awq or int8-sq."),
]
GroupSize = Annotated[
    _Limit, typer.Option("--group-size", help="Inputs that share a scale in int4: 128 (default), 64 or 32.")
]
Compute = Annotated[
    str | None, typer.Option("--dtype", help="Compute type beside int8 or int4 weights (default fp16).")
]
Gpu = Annotated[str | None, typer.Option(help="Device it is for: cpu (default) or a catalog entry, such as h100.")]
Tp = Annotated[int | None, typer.Option(help="Tensor-parallel ranks (default 1).")]
Pp = Annotated[int | None, typer.Option(help="Pipeline-parallel ranks (default 1).")]
Kv = Annotated[str | None, typer.Option(help="KV policy: full (default), h2o:50%, h2o:2048, window:1024, ...")]
Target = Annotated[str | None, typer.Option(help="auto (default), embedded, tensorrt or pytorch.")]
MaxBatch = Annotated[_Limit, typer.Option("--max-batch-size", help="Requests in flight at once (default 32).")]
MaxTokens = Annotated[_Limit, typer.Option("--max-num-tokens", help="Tokens of one step (default 8192).")]
MaxSeq = Annotated[_Limit, typer.Option("--max-seq-len", help="Prompt plus output of one request (default 8192).")]
KvMemory = Annotated[str | None, typer.Option(help="KV pool per device, such as 12GiB (default: 90% of what is free).")]
Output = Annotated[Path, typer.Option("--output", help="Directory that engines go to.")]
Approximate = Annotated[
    bool, typer.Option("--allow-approximate", help="Accept a KV policy that the target only approximates.")
]
Calib = Annotated[
    str | None, typer.Option(help="Text file for what is calibrated: fp8, int4-awq, int8-sq, an int8 KV cache.")
]
LoadFormat = Annotated[
    str | None, typer.Option(help="auto (default), or dummy: random weights of the true shape, no checkpoint.")
]
KvDtype = Annotated[str | None, typer.Option(help="Type of the KV cache: fp8 or int8 (default: the compute type).")]
ReusePrefix = Annotated[
    bool | None,
    typer.Option(
        "--reuse-prefix/--no-reuse-prefix", help="Do not compute the beginning of a prompt again (default: off)."
    ),
]
Speculate = Annotated[
    str | None,
    typer.Option(
        help="Guess that many next tokens from the text so far and check them together: ngram:4, or off (default)."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print plan, sizes and steps; write nothing.")]


def command(
    recipe: Recipe = None,
    model: Model = None,
    name: Name = None,
    precision: Precision = None,
    dtype: Compute = None,
    group_size: GroupSize = None,
    gpu: Gpu = None,
    tp: Tp = None,
    pp: Pp = None,
    kv: Kv = None,
    target: Target = None,
    max_batch_size: MaxBatch = None,
    max_num_tokens: MaxTokens = None,
    max_seq_len: MaxSeq = None,
    kv_memory: KvMemory = None,
    allow_approximate: Approximate = False,
    calib_text: Calib = None,
    load_format: LoadFormat = None,
    kv_dtype: KvDtype = None,
    reuse_prefix: ReusePrefix = None,
    speculate: Speculate = None,
    output: Output = Path("builds"),
    dry_run: DryRun = False,
    force: ForceFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Build an engine from a recipe, from options, or from a recipe with options on top. A killed build resumes."""
    from trtkit.backends.outline import outline, render
    from trtkit.backends.recipe import BuildOptions, load_recipe, make_plan, resolve_target

    given = BuildOptions(
        model=model, name=name, precision=precision, dtype=dtype, gpu=gpu, tp=tp, pp=pp, kv=kv, target=target,
        max_batch_size=max_batch_size, max_num_tokens=max_num_tokens, max_seq_len=max_seq_len, kv_memory=kv_memory,
        allow_approximate=allow_approximate or None, calib_text=calib_text, load_format=load_format, kv_dtype=kv_dtype,
        reuse_prefix=reuse_prefix, speculate=speculate, group_size=group_size,
    )  # fmt: skip
    options = given.over(load_recipe(recipe)) if recipe else given
    plan, source = make_plan(options, dry_run=dry_run)
    if reason := resolve_target(options)[1]:
        note(f"target {plan.target}: {reason}", as_json=as_json)
    if dry_run:
        outlined = outline(plan, output, allow_approximate=bool(options.allow_approximate))
        emit(outlined, render(outlined), as_json=as_json)
        return
    _build(plan, source, output, options, force=force, as_json=as_json)


def _build(
    plan: BuildPlan, source: ModelSource, output: Path, options: BuildOptions, *, force: bool, as_json: bool
) -> None:
    from trtkit.backends.build import build_engine
    from trtkit.backends.outline import summary

    text = Path(options.calib_text) if options.calib_text else None
    approximate = bool(options.allow_approximate)
    with progress_bars(quiet=as_json) as progress:
        bundle = build_engine(
            plan, source, output, progress=progress, force=force, allow_approximate=approximate, calib_text=text
        )
    made = {"path": str(bundle.path), "digest": bundle.manifest.digest, "manifest": bundle.manifest}
    emit(made, summary(bundle), as_json=as_json)
