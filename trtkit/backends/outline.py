"""What a build would do, without doing it: `trtkit build --dry-run`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from trtkit.backends.build import engine_path, is_calibrated
from trtkit.backends.build_time import expected_seconds, in_words
from trtkit.backends.fit import Sizes, check_fit, memory_table
from trtkit.spec.bundle import MANIFEST_NAME, EngineBundle
from trtkit.spec.checkpoint import rank_file
from trtkit.spec.directory import partial_directory
from trtkit.spec.kv import KVFidelity
from trtkit.spec.measured import Measured
from trtkit.spec.plan import BuildPlan
from trtkit.spec.quant import GPTQ_INT8
from trtkit.spec.units import format_gib
from trtkit.trtllm.capabilities import broken, check_plan, kv_fidelity
from trtkit.trtllm.engine_build import BUILDING_DIR, TIMING_NAME
from trtkit.trtllm.guesses import guess_handicaps
from trtkit.trtllm.lower import build_argv
from trtkit.trtllm.policies import check_adapter
from trtkit.trtllm.stored import STREAMED, stored_quant, stored_tensors


@dataclass(frozen=True, kw_only=True, slots=True)
class Outline:
    """A plan, where its engine would go, its modeled sizes, the steps in order and the commands that others run.

    `engine_bytes` is the weights' share of what `trtllm-build` would write, None for the other targets; `build_seconds`
    is how long it will take, None where nothing is known.
    """

    plan: BuildPlan
    output: str
    source: str
    sizes: Sizes
    checkpoint_bytes: int
    steps: tuple[str, ...]
    commands: tuple[str, ...] = ()
    engine_bytes: int | None = None
    fidelity: KVFidelity = KVFidelity.EXACT
    adjusted: tuple[str, ...] = ()
    build_seconds: Measured | None = None


def outline(plan: BuildPlan, out_dir: Path, *, allow_approximate: bool = False) -> Outline:
    """Describe a build.

    Raises:
        CapacityError: it would not fit.
        UnsupportedError: the target cannot do it.
    """
    found = check_fit(plan)
    check_plan(plan)
    notes = check_adapter(plan) + (guess_handicaps(plan) if plan.target == "pytorch" else ())
    fidelity = kv_fidelity(plan, allow_approximate=allow_approximate)
    if is_calibrated(plan):
        notes = (*notes, "calibrated on text: the build needs --calib-text FILE")
    if plan.load_format == "dummy":
        return _dummy_outline(plan, out_dir, found, fidelity)
    if plan.target == "pytorch":
        return pytorch_outline(plan, out_dir, found, fidelity, notes)
    streamed = plan.quant.algo in STREAMED
    stored = stored_quant(plan.quant, plan.target) if streamed else plan.quant
    checkpoint_bytes = sum(
        tensor.num_bytes
        for rank in range(plan.parallel.world_size)
        for tensor in stored_tensors(plan.model, stored, plan.parallel, pp_rank=rank // plan.parallel.tp)
    )
    output = engine_path(plan, out_dir)
    files = ", ".join(rank_file(rank) for rank in range(plan.parallel.world_size))
    return Outline(
        plan=plan,
        output=str(output),
        source=plan.model_source,
        sizes=found,
        checkpoint_bytes=checkpoint_bytes,
        steps=(
            f"{'convert' if streamed else 'quantise (ModelOpt)'} {plan.model_source} to checkpoint/ ({files}, "
            f"{format_gib(checkpoint_bytes)})",
            "copy the tokenizer to tokenizer/",
            "verify the checkpoint against transformers on a short prompt",
            *(("pack the GPTQ weights with TensorRT-LLM's own function",) if stored.algo == GPTQ_INT8 else ()),
            *(("build engine/ with trtllm-build",) if plan.target == "tensorrt" else ()),
            f"write {MANIFEST_NAME} and rename to {output.name}",
        ),
        commands=_commands(plan, output),
        engine_bytes=found.weight_bytes * plan.parallel.world_size if plan.target == "tensorrt" else None,
        build_seconds=expected_seconds(plan, out_dir, found.weight_bytes * found.devices),
        fidelity=fidelity,
        adjusted=(*notes, *(f"{rule.says} [{rule.source}]" for rule in broken(plan) if rule.adjusts)),
    )


def pytorch_outline(
    plan: BuildPlan, out_dir: Path, found: Sizes, fidelity: KVFidelity, notes: tuple[str, ...] = ()
) -> Outline:
    """The same for the PyTorch backend, which loads a Hugging Face directory and compiles nothing."""
    output = engine_path(plan, out_dir)
    size = found.weight_bytes * plan.parallel.world_size
    return Outline(
        plan=plan,
        output=str(output),
        source=plan.model_source,
        sizes=found,
        checkpoint_bytes=size,
        steps=(
            f"write {plan.model_source} as a unified {plan.quant.precision} checkpoint to checkpoint/ "
            f"({format_gib(size)})",
            "copy the tokenizer to tokenizer/ and to checkpoint/",
            "verify the checkpoint against the source with transformers on a short prompt",
            "write llm_args.json",
            f"write {MANIFEST_NAME} and rename to {output.name}",
        ),
        build_seconds=expected_seconds(plan, out_dir, size),
        fidelity=fidelity,
        adjusted=notes,
    )


def _dummy_outline(plan: BuildPlan, out_dir: Path, found: Sizes, fidelity: KVFidelity) -> Outline:
    """The same for random weights: nothing but a manifest is written."""
    output = engine_path(plan, out_dir)
    return Outline(
        plan=plan,
        output=str(output),
        source="random weights, made when the engine opens",
        sizes=found,
        checkpoint_bytes=0,
        steps=(f"write {MANIFEST_NAME} and rename to {output.name}",),
        fidelity=fidelity,
    )


def _groups(plan: BuildPlan) -> str:
    return f" in groups of {plan.quant.group_size}" if plan.quant.group_size else ""


def _commands(plan: BuildPlan, output: Path) -> tuple[str, ...]:
    if plan.target != "tensorrt":
        return ()
    partial = partial_directory(output)
    return (shlex.join(build_argv(plan, partial / "checkpoint", partial / BUILDING_DIR, partial / TIMING_NAME)),)


def summary(bundle: EngineBundle) -> str:
    """A finished build in one line."""
    manifest = bundle.manifest
    size = format_gib(sum(entry.size_bytes for entry in manifest.files.values()))
    seconds = sum(manifest.phases_s.values())
    drift, rounding = (manifest.verification.get(name) for name in ("drift", "quantisation_drift"))
    checked = "" if drift is None else f", verified against transformers to {drift:.1g}"
    if rounding:
        checked += f" (what {manifest.plan.quant.precision} itself does: {rounding:.2g})"
    return f"{bundle.path}: {size}, {seconds:.1f} s{checked}, digest {manifest.digest}"


def render(outlined: Outline) -> str:
    """For people."""
    plan, found = outlined.plan, outlined.sizes
    limits = plan.limits
    pool = "sized at start" if found.kv_pool_bytes is None else format_gib(found.kv_pool_bytes)
    lines = [
        f"{outlined.output}",
        f"  model      {plan.model.name} ({plan.model.num_params:,} parameters)",
        f"  precision  {plan.quant.precision}: weights {plan.quant.weights.value}{_groups(plan)}, compute "
        f"{plan.quant.compute.value}, "
        f"KV {plan.quant.kv.value}",
        f"  target     {plan.target} on {plan.gpu}, tp {plan.parallel.tp}, pp {plan.parallel.pp}, KV policy {plan.kv.label}"
        + (f", speculation {plan.speculation.label}" if plan.speculation else ""),
        f"  limits     {limits.max_batch_size} requests, {limits.max_num_tokens} tokens a step, "
        f"{limits.max_seq_len} tokens a request{', prefixes reused' if limits.enable_block_reuse else ''}",
        f"  memory     per device; one longest request's KV {format_gib(found.min_kv_bytes)}, KV pool {pool}",
    ]
    lines += [f"    {line}" for line in memory_table(plan)]
    lines += [f"  {number}. {step}" for number, step in enumerate(outlined.steps, 1)]
    lines += [f"  note       {text}" for text in outlined.adjusted]
    if outlined.fidelity is not KVFidelity.EXACT:
        lines.append(f"  KV policy  carried out as {outlined.fidelity.value}, not as {plan.kv.kind}")
    lines += [f"  $ {command}" for command in outlined.commands]
    if outlined.engine_bytes is not None:
        lines.append(f"  engine     about {format_gib(outlined.engine_bytes)} (modeled)")
    if plan.load_format != "dummy":
        lines.append(f"  time       {in_words(outlined.build_seconds)}")
    return "\n".join(lines)
