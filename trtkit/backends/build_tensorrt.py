"""Building for TensorRT-LLM's engine backend: convert, verify on a CPU, pack where GPTQ needs it, then `trtllm-build`.

Each phase leaves a directory that the next run of a killed build finds and keeps: `checkpoint/`, then `engine/`. GPTQ's
weights are converted to `checkpoint.plain/`, verified there, and packed by TensorRT-LLM into `checkpoint/`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from trtkit.backends.build import BuildJob, copy_tokenizer, is_calibrated
from trtkit.backends.calibrated import ALGOS
from trtkit.backends.verify import verify
from trtkit.spec.atomic import output_errors, write_text
from trtkit.spec.checkpoint import CONFIG_NAME
from trtkit.spec.directory import check_space
from trtkit.spec.dtype import DType
from trtkit.spec.errors import UnsupportedError
from trtkit.spec.quant import GPTQ_INT8
from trtkit.trtllm.convert import convert
from trtkit.trtllm.engine_build import ENGINE_DIR, LOG_NAME, run_trtllm_build, timing_cache
from trtkit.trtllm.installed import installation
from trtkit.trtllm.lower import llm_arguments
from trtkit.trtllm.modelopt import cache_scales, read_windows, write_engine_checkpoint
from trtkit.trtllm.pack import pack_checkpoint
from trtkit.trtllm.packed import read_packing
from trtkit.trtllm.stored import stored_quant, stored_tensors

LLM_ARGUMENTS = "llm_args.json"
_PLAIN = "checkpoint.plain"
_WRITING = "checkpoint.writing"
_VERIFIED = ".verified.json"


def build_tensorrt(job: BuildJob) -> None:
    """Fill the job's directory with checkpoint, tokenizer and engine.

    Raises:
        CapacityError: the build ran out of GPU memory.
        EngineError: `trtllm-build` failed; a later run continues with it.
        InputError: the source is damaged, or the checkpoint does not compute what the source does.
        OutputError: the disk is full or too small.
        UnsupportedError: an int8 KV cache for GPTQ weights, or a model that ModelOpt cannot write.
    """
    plan, checkpoint = job.plan, job.directory / "checkpoint"
    if not (checkpoint / CONFIG_NAME).is_file():
        _make_checkpoint(job, checkpoint)
    copy_tokenizer(job.source_dir, job.directory / "tokenizer")
    _verify_once(job, checkpoint)
    if not (job.directory / ENGINE_DIR).is_dir():
        with job.phase("trtllm-build"):
            _compile(job)
    write_text(job.directory / LLM_ARGUMENTS, json.dumps(llm_arguments(plan), indent=2) + "\n")


def _make_checkpoint(job: BuildJob, checkpoint: Path) -> None:
    plan = job.plan
    first = job.directory / _PLAIN if plan.quant.algo == GPTQ_INT8 else checkpoint
    if not (first / CONFIG_NAME).is_file():
        with job.phase("convert"):
            check_space(job.directory, _bytes_needed(job))
            _write_weights(job, first)
    if first is checkpoint:
        return
    _verify_once(job, first)
    with job.phase("pack"):
        pack_checkpoint(first, checkpoint, job.directory / LOG_NAME, progress=job.progress)
        shutil.rmtree(first)


def _write_weights(job: BuildJob, output: Path) -> None:
    plan = job.plan
    windows = []
    if is_calibrated(plan):
        assert job.calib_text is not None
        windows = read_windows(job.source_dir, job.calib_text)
    kv_scale = None
    if plan.quant.kv is DType.INT8:
        if read_packing(job.source_dir) is not None:
            raise UnsupportedError(
                f"{plan.name}: an int8 KV cache is calibrated with transformers on 16-bit weights, this model is quantised; "
                "use --kv-dtype fp8 or a 16-bit KV cache"
            )
        kv_scale = cache_scales(job.source_dir, windows)
    if plan.quant.algo not in ALGOS:
        convert(
            job.source_dir,
            output,
            quant=plan.quant,
            parallel=plan.parallel,
            target="tensorrt",
            name=plan.model.name,
            kv_scale=kv_scale,
            progress=job.progress,
        )
        return
    writing = job.directory / _WRITING
    with output_errors(writing):
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir()
    write_engine_checkpoint(job.source_dir, writing, plan, windows, kv_scale)
    with output_errors(output):
        writing.rename(output)


def _verify_once(job: BuildJob, checkpoint: Path) -> None:
    """Verify, or take over what an earlier run of this build found: packed weights cannot be looked at again."""
    note = job.directory / _VERIFIED
    if note.is_file():
        job.verification.update(json.loads(note.read_text(encoding="utf-8")))
        return
    with job.phase("verify"):
        job.verification.update(verify(job.plan.model, job.plan.quant, job.source_dir, checkpoint))
    write_text(note, json.dumps(dict(job.verification)))


def _compile(job: BuildJob) -> None:
    version = job.plan.target_version or installation().version or "unknown"
    cache = timing_cache(job.directory, job.plan, version)
    peak = run_trtllm_build(job.plan, job.directory, cache, progress=job.progress)
    if peak is not None:
        job.peaks_bytes["trtllm-build"] = peak


def _bytes_needed(job: BuildJob) -> int:
    """Checkpoint and engine together (GPTQ's checkpoint twice, plain and packed); the engine's weights are its plan's."""
    plan = job.plan
    gptq = plan.quant.algo == GPTQ_INT8
    stored = stored_quant(plan.quant, "tensorrt") if plan.quant.algo not in ALGOS else plan.quant
    kept = (stored, stored, stored) if gptq else (stored, plan.quant)
    return sum(
        tensor.num_bytes
        for quant in kept
        for rank in range(plan.parallel.world_size)
        for tensor in stored_tensors(plan.model, quant, plan.parallel, pp_rank=rank // plan.parallel.tp)
    )
