"""Packing GPTQ's INT8 weights into the layout of TensorRT-LLM's mixed GEMM, by TensorRT-LLM's own function.

`trtllm-build` packs what it quantises itself and takes GPTQ weights as packed already. The layout depends on the GPU and is
nobody's interface, so nothing is imitated: `python -m trtkit.trtllm.pack PLAIN PACKED` runs on the machine that builds,
with the installed `preprocess_weights_for_mixed_gemm`, one matrix at a time.

Relies on (read in releases 0.20 to 1.2): `postprocess_weight_only_groupwise` passes int8 [in, out] less its zero point,
`torch.int8` and `torch.float16`, and views the result as the model's 16-bit type, [in, out / 2].
"""

from __future__ import annotations

import importlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trtkit.spec.atomic import output_errors
from trtkit.spec.checkpoint import CONFIG_NAME, CheckpointTensor, rank_file
from trtkit.spec.checkpoint_config import read_checkpoint_config
from trtkit.spec.dtype import DType
from trtkit.spec.progress import Progress, no_progress
from trtkit.trtllm.engine_build import run_logged
from trtkit.trtllm.safetensors_file import TensorEntry, lay_out, read_header

PACKING_SUFFIX = ".packing"
_MODULE = "tensorrt_llm.quantization.functional"
_FUNCTION = "preprocess_weights_for_mixed_gemm"


def pack_checkpoint(plain: Path, packed: Path, log_path: Path, *, progress: Progress = no_progress) -> None:
    """Write `packed` from the checkpoint `plain` in a process of its own; all or nothing.

    Raises:
        EngineError: TensorRT-LLM has no such function, or it failed; the log's tail is in the message.
        OutputError: it cannot be written.
    """
    writing = packed.with_name(packed.name + PACKING_SUFFIX)
    with output_errors(writing):
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir()
    argv = [sys.executable, "-m", "trtkit.trtllm.pack", str(plain), str(writing)]
    run_logged(argv, log_path, name="packing GPTQ weights", progress=progress)
    with output_errors(packed):
        writing.rename(packed)


def main(plain: Path, packed: Path) -> None:
    """Pack every rank; in the child, where TensorRT-LLM is imported."""
    import torch

    function = getattr(importlib.import_module(_MODULE), _FUNCTION, None)
    if function is None:
        sys.exit(f"{_MODULE} has no {_FUNCTION}; GPTQ engines are known to work with TensorRT-LLM 1.2.x")
    _, stored, parallel = read_checkpoint_config(plain)
    packed.mkdir(exist_ok=True)

    def pack(values: Any) -> Any:  # noqa: ANN401 - arrays
        result = function(torch.from_numpy(values), torch.int8, torch.float16)
        return result.contiguous().view(torch.uint8).cpu().numpy()

    for rank in range(parallel.world_size):
        _pack_rank(plain / rank_file(rank), packed / rank_file(rank), stored.compute, pack)
        sys.stdout.write(f"packed rank {rank} of {parallel.world_size}\n")
    shutil.copyfile(plain / CONFIG_NAME, packed / CONFIG_NAME)


def _pack_rank(source: Path, target: Path, compute: DType, pack: Any) -> None:  # noqa: ANN401 - a function
    entries = read_header(source)
    layout = lay_out(_declared(entry, compute) for entry in entries.values())
    with target.open("wb") as handle:
        handle.write(layout.header)
        handle.truncate(layout.num_bytes)
        for name, place in layout.entries.items():
            entry = entries[name]
            data = np.memmap(source, dtype=np.uint8, mode="r", offset=entry.offset, shape=(entry.num_bytes,))
            values = pack(np.array(data).view(np.int8).reshape(entry.shape)) if entry.dtype == "I8" else data
            handle.seek(place.offset)
            handle.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def _declared(entry: TensorEntry, compute: DType) -> CheckpointTensor:
    """A tensor as the packed file declares it: two int8 to a number of the compute type."""
    tensor = CheckpointTensor(name=entry.name, shape=entry.shape, dtype=DType.parse(entry.dtype), group="")
    if tensor.dtype is not DType.INT8:
        return tensor
    *outer, last = entry.shape
    return replace(tensor, shape=(*outer, last // 2), dtype=compute)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m trtkit.trtllm.pack PLAIN PACKED")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
