"""Building for TensorRT-LLM's engine backend: convert, verify on a CPU, then `trtllm-build`.

Each phase leaves a directory that the next run of a killed build finds and keeps: `checkpoint/`, then `engine/`.
"""

from __future__ import annotations

import json

from trtkit.backends.build import BuildJob, copy_tokenizer
from trtkit.backends.verify import verify
from trtkit.spec.atomic import write_text
from trtkit.spec.checkpoint import CONFIG_NAME, checkpoint_tensors
from trtkit.spec.directory import check_space
from trtkit.spec.errors import UnsupportedError
from trtkit.trtllm.convert import convert, stored_quant
from trtkit.trtllm.engine_build import ENGINE_DIR, run_trtllm_build, timing_cache
from trtkit.trtllm.installed import installation
from trtkit.trtllm.lower import llm_arguments

LLM_ARGUMENTS = "llm_args.json"


def build_tensorrt(job: BuildJob) -> None:
    """Fill the job's directory with checkpoint, tokenizer and engine.

    Raises:
        CapacityError: the build ran out of GPU memory.
        EngineError: `trtllm-build` failed; a later run continues with it.
        InputError: the source is damaged, or the checkpoint does not compute what the source does.
        OutputError: the disk is full or too small.
        UnsupportedError: the precision needs a quantiser that this target has no converter for yet.
    """
    plan, checkpoint = job.plan, job.directory / "checkpoint"
    if plan.quant.algo not in (None, "W8A16"):
        raise UnsupportedError(
            f"{plan.name}: trtkit builds engines of fp16, bf16 and int8 (weight-only) weights; {plan.quant.precision} needs a "
            "checkpoint quantised elsewhere (see docs/tensorrt-llm.md)"
        )
    if not (checkpoint / CONFIG_NAME).is_file():
        with job.phase("convert"):
            check_space(job.directory, _bytes_needed(job))
            convert(
                job.source_dir,
                checkpoint,
                quant=plan.quant,
                parallel=plan.parallel,
                target="tensorrt",
                name=plan.model.name,
                progress=job.progress,
            )
    copy_tokenizer(job.source_dir, job.directory / "tokenizer")
    if not (job.directory / ENGINE_DIR).is_dir():
        with job.phase("verify"):
            job.verification.update(verify(plan.model, plan.quant, job.source_dir, checkpoint))
        with job.phase("trtllm-build"):
            _compile(job)
    write_text(job.directory / LLM_ARGUMENTS, json.dumps(llm_arguments(plan), indent=2) + "\n")


def _compile(job: BuildJob) -> None:
    version = job.plan.target_version or installation().version or "unknown"
    cache = timing_cache(job.directory, job.plan, version)
    peak = run_trtllm_build(job.plan, job.directory, cache, progress=job.progress)
    if peak is not None:
        job.peaks_bytes["trtllm-build"] = peak


def _bytes_needed(job: BuildJob) -> int:
    """Checkpoint and engine together; the engine's weights are its plan's, the checkpoint's are 16-bit."""
    plan = job.plan
    return sum(
        tensor.num_bytes
        for quant in (stored_quant(plan.quant, "tensorrt"), plan.quant)
        for rank in range(plan.parallel.world_size)
        for tensor in checkpoint_tensors(plan.model, quant, plan.parallel, pp_rank=rank // plan.parallel.tp)
    )
