"""Building for TensorRT-LLM's PyTorch backend: a unified checkpoint and the arguments it is opened with. No compiler.

The bundle's `checkpoint/` is a Hugging Face directory, so `trtllm-serve checkpoint --config llm_args.json` serves it too.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trtkit.backends.build import BuildJob, copy_tokenizer
from trtkit.backends.calibrated import ALGOS, Stored, check_steps
from trtkit.backends.reference import (
    linear_rounding,
    plain_source,
    probe_tokens,
    reference,
    reference_and_rounded,
    rounding_to,
    write_model,
)
from trtkit.backends.verify import judged, layers_to_run, taken_over
from trtkit.spec.atomic import output_errors, write_text
from trtkit.spec.directory import check_space
from trtkit.spec.model import ModelSpec
from trtkit.spec.quant import GPTQ_INT8, QuantSpec
from trtkit.spec.units import GIB
from trtkit.trtllm.layout import is_linear, source_shapes
from trtkit.trtllm.lower import llm_arguments
from trtkit.trtllm.modelopt import CALIBRATED, SCALES, dequantised, read_windows, write_quantised
from trtkit.trtllm.unified import write_unified

if TYPE_CHECKING:
    from torch import Tensor

LLM_ARGUMENTS = "llm_args.json"
_WRITING = "checkpoint.writing"
_SPARE_BYTES = GIB // 64


def build_pytorch(job: BuildJob) -> None:
    """Fill the job's directory with a unified checkpoint, a tokenizer and the arguments.

    Raises:
        InputError: the source is damaged, or what was written does not compute what the source does.
        OutputError: the disk is full or too small.
    """
    plan, checkpoint = job.plan, job.directory / "checkpoint"
    if not checkpoint.is_dir():
        with job.phase("convert"):
            writing = job.directory / _WRITING
            check_space(job.directory, _bytes_needed(plan.model, plan.quant))
            with output_errors(writing):
                shutil.rmtree(writing, ignore_errors=True)
                writing.mkdir()
            # The tokenizer first: its files include the source's config.json, which the checkpoint's own replaces.
            copy_tokenizer(job.source_dir, writing)
            _write_weights(job, writing)
            with output_errors(checkpoint):
                writing.rename(checkpoint)
    copy_tokenizer(job.source_dir, job.directory / "tokenizer")
    with job.phase("verify"):
        job.verification.update(verify_unified(plan.model, plan.quant, job.source_dir, checkpoint))
    write_text(job.directory / LLM_ARGUMENTS, json.dumps(llm_arguments(plan), indent=2) + "\n")


def _write_weights(job: BuildJob, writing: Path) -> None:
    quant = job.plan.quant
    if quant.algo not in CALIBRATED:
        write_unified(job.source_dir, writing, quant, progress=job.progress)
        return
    assert job.calib_text is not None
    write_quantised(job.source_dir, writing, quant, read_windows(job.source_dir, job.calib_text))


def verify_unified(model: ModelSpec, quant: QuantSpec, source_dir: Path, checkpoint_dir: Path) -> dict[str, float]:
    """Multiply the scales back in and hold the result against the source, both run by transformers in float32.

    Raises:
        InputError: the two differ by more than the precision explains.
    """
    layers = layers_to_run(model)
    prompt, tokens = probe_tokens(model.vocab_size)
    with plain_source(source_dir, layers) as source, tempfile.TemporaryDirectory(prefix="trtkit-verify-") as name:
        twin = Path(name)
        stored = _dequantised(model, checkpoint_dir, layers)
        write_model(twin, stored, checkpoint_dir, layers)
        ours = reference(twin, layers, prompt, tokens)
        extra: dict[str, float] = {}
        if quant.algo in ALGOS:
            # Its scales cannot be foreseen, so the rows are held against the source, and the rest with its own config.
            steps = _dequantised(model, checkpoint_dir, layers, ones=True)
            matrices = {n: Stored(values=stored[n], steps=steps[n]) for n in stored if is_linear(n)}
            plainly = _dequantised(model, source, layers)
            extra["worst_half_steps"] = check_steps(matrices, stored, plainly, quant, str(checkpoint_dir))
            write_model(twin, stored, source, layers)
            plain, rounded = (reference(folder, layers, prompt, tokens) for folder in (source, twin))
        else:
            held = linear_rounding(replace(quant, algo=GPTQ_INT8) if taken_over(quant, source_dir) else quant)
            roundings = (lambda _: held, rounding_to(quant.compute))
            plain, rounded = reference_and_rounded(source, layers, prompt, tokens, roundings)
    return extra | judged(ours, rounded, plain, layers, quant, checkpoint_dir)


def _dequantised(model: ModelSpec, directory: Path, layers: int, *, ones: bool = False) -> dict[str, Tensor]:
    """The tensors of the first layers in float32, read from the files with safetensors' own reader.

    With `ones` every quantised number is taken to be 1, which gives the worth of a step at its place.
    """
    import torch
    from safetensors import safe_open

    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as handle:
            stored = set(handle.keys())
            for name in stored & set(source_shapes(model)):
                if _layer_of(name) < layers:
                    beside = {s: handle.get_tensor(n) for s in SCALES if (n := _sibling(name, s)) in stored}
                    weight = handle.get_tensor(name)
                    if ones and beside:
                        weight = torch.full_like(weight, 0x11 if weight.dtype is torch.uint8 else 1)
                    tensors[name] = dequantised(weight, beside).to(torch.float32).contiguous()
    return tensors


def _sibling(name: str, suffix: str) -> str:
    return f"{name.removesuffix('weight')}{suffix}"


def _layer_of(name: str) -> int:
    """The block a tensor belongs to; -1 outside of all."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else -1


def _bytes_needed(model: ModelSpec, quant: QuantSpec) -> int:
    linear = model.num_layers * model.linear_params_per_layer
    return linear * quant.weights.bits // 8 + (model.num_params - linear) * quant.compute.bits // 8 + _SPARE_BYTES
