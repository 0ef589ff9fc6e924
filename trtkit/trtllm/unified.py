"""A unified Hugging Face checkpoint for TensorRT-LLM's PyTorch backend: the source's names, in the plan's types.

INT8 weight-only becomes int8 `weight` [out, in] with a `weight_scale` [out] beside it and `hf_quant_config.json`, which
is what the backend's weight-only linear layer loads; FP8 by rows becomes float8_e4m3fn `weight` with a float32
`weight_scale` [out], which its row-wise layer loads. INT8 names, values and JSON are those of ModelOpt's own INT8 weight-only
export (a test holds them equal), which needs the whole model in memory; this streams in pieces like `convert`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from trtkit.spec.atomic import output_errors, write_text
from trtkit.spec.checkpoint import CheckpointTensor
from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError, UnsupportedError
from trtkit.spec.progress import Progress, no_progress
from trtkit.spec.quant import FP8_ROWWISE, GPTQ_INT8, QuantSpec
from trtkit.spec.units import GIB
from trtkit.trtllm.layout import Slab, Target, is_linear, source_shapes
from trtkit.trtllm.piece import PieceWorker
from trtkit.trtllm.safetensors_file import FileLayout, lay_out
from trtkit.trtllm.source import INDEX_NAME, SINGLE_NAME, SourceCheckpoint, open_source
from trtkit.trtllm.stored import STREAMED
from trtkit.trtllm.threads import in_parallel
from trtkit.version import __version__

QUANT_CONFIG_NAME = "hf_quant_config.json"
SCALE_NAME = "weight_scale"
SHARD_BYTES = 4 * GIB
PIECE_BYTES = 1 << 20
PACKED_PIECES = 16


def write_unified(
    source_dir: Path, output_dir: Path, quant: QuantSpec, *, progress: Progress = no_progress
) -> list[str]:
    """Write the weights and configs; `output_dir` exists and is ours. `config.json` comes last.

    Returns:
        Names of the weight files.

    Raises:
        InputError: the source is damaged, incomplete or not finite, or overflows the target type.
        OutputError: the output cannot be written, or the disk is full.
        UnsupportedError: a scheme that needs calibration, or GPTQ with more than one scale a row.
    """
    if quant.algo not in STREAMED:
        raise UnsupportedError(
            f"precision {quant.precision!r} needs calibration; this writes fp16, bf16, int8 (weight-only), int8-gptq and fp8-rowwise"
        )
    source = open_source(source_dir)
    if quant.algo == GPTQ_INT8:
        check_one_scale(source)
        quant = replace(quant, algo="W8A16", group_size=0)
    shards = _shards(source, quant)
    layouts = [lay_out(shard) for shard in shards]
    names = shard_names(len(shards))
    for name, layout in zip(names, layouts, strict=True):
        path = output_dir / name
        with output_errors(path), path.open("wb") as handle:
            handle.write(layout.header)
            handle.truncate(layout.num_bytes)
    _move(source, [output_dir / name for name in names], layouts, progress)
    if len(names) > 1:
        weight_map = {tensor: name for name, layout in zip(names, layouts, strict=True) for tensor in layout.entries}
        size = sum(tensor.num_bytes for shard in shards for tensor in shard)
        _write(output_dir / INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": weight_map})
    if quant.algo is not None:
        _write(output_dir / QUANT_CONFIG_NAME, quant_config(quant))
    _write(output_dir / "config.json", model_config(source_dir, quant))
    return names


def check_one_scale(source: SourceCheckpoint) -> None:
    """Refuse GPTQ groups: the backend's INT8 layer has one scale a row.

    Raises:
        UnsupportedError: groups, or a source that is not GPTQ.
    """
    if source.packing is None:
        raise UnsupportedError(
            f"{source.directory}: precision int8-gptq takes a model that GPTQ quantised; use --precision int8"
        )
    if source.packing.group_size:
        raise UnsupportedError(
            f"{source.directory}: GPTQ groups of {source.packing.group_size}, and TensorRT-LLM's PyTorch backend has one INT8 "
            "scale a row; use --target tensorrt, or --precision int8, which rounds again"
        )


def quant_config(quant: QuantSpec) -> dict[str, Any]:
    """`hf_quant_config.json`, in the form ModelOpt writes; the head stays in the compute type."""
    return {
        "producer": {"name": "trtkit", "version": __version__},
        "quantization": {
            "quant_algo": quant.algo,
            "kv_cache_quant_algo": "FP8" if quant.kv is DType.FP8 else None,
            "exclude_modules": ["lm_head", "model.embed_tokens"],
        },
    }


def shard_names(count: int) -> list[str]:
    """Hugging Face's names for that many files."""
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _shards(source: SourceCheckpoint, quant: QuantSpec) -> list[list[CheckpointTensor]]:
    """Tensors of each file, in the source's order; a file closes when the next tensor would exceed its size."""
    shards: list[list[CheckpointTensor]] = [[]]
    size = 0
    for name, shape in source_shapes(source.model).items():
        tensors = list(_stored(name, shape, quant))
        added = sum(tensor.num_bytes for tensor in tensors)
        if shards[-1] and size + added > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1] += tensors
        size += added
    return shards


def _stored(name: str, shape: tuple[int, ...], quant: QuantSpec) -> Iterator[CheckpointTensor]:
    narrow = quant.algo is not None and is_linear(name)
    yield CheckpointTensor(name=name, shape=shape, dtype=quant.weights if narrow else quant.compute, group="")
    if narrow:
        scale = f"{name.removesuffix('weight')}{SCALE_NAME}"
        dtype = DType.FP32 if quant.algo == FP8_ROWWISE else quant.compute
        yield CheckpointTensor(name=scale, shape=shape[:1], dtype=dtype, group="")


def _move(source: SourceCheckpoint, paths: Sequence[Path], layouts: Sequence[FileLayout], progress: Progress) -> None:
    place = {name: rank for rank, layout in enumerate(layouts) for name in layout.entries}
    pieces = [piece for name in source_shapes(source.model) for piece in _pieces(source, name, place[name])]
    count = itertools.count(1)
    progress("convert", 0, len(pieces))
    with PieceWorker.opened(source, paths, layouts, scale_suffix=SCALE_NAME) as worker:

        def work(index: int) -> None:
            worker.move(pieces[index])
            progress("convert", next(count), len(pieces))

        in_parallel(work, range(len(pieces)))


def _pieces(source: SourceCheckpoint, name: str, rank: int) -> Iterator[Slab]:
    entry = source.tensors[name].entry
    rows, cols = entry.shape[0], prod(entry.shape[1:])
    budget = PIECE_BYTES * (1 if source.tensors[name].packed is None else PACKED_PIECES)
    step = max(1, budget // (entry.num_bytes // rows))
    for row in range(0, rows, step):
        target = Target(rank=rank, name=name, row=row, cols=cols)
        yield Slab(source=name, row=row, rows=min(step, rows - row), cols=cols, targets=(target,))


def model_config(source_dir: Path, quant: QuantSpec) -> dict[str, Any]:
    """The source's config with the compute type in it, under both of its names, and nothing of how it was quantised."""
    path = source_dir / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    config.pop("quantization_config", None)
    return {**config, "torch_dtype": quant.compute.trtllm_name, "dtype": quant.compute.trtllm_name}


def _write(path: Path, data: dict[str, Any]) -> None:
    write_text(path, json.dumps(data, indent=2) + "\n")
