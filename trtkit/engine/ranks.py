"""Reading `rank{N}.safetensors` and undoing the tensor- and pipeline-parallel split, one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtkit.spec.checkpoint import (
    GROUP_SCALE,
    GROUP_ZERO,
    INPUT_ORDER,
    INPUT_SCALE,
    LM_HEAD,
    VOCAB_EMBEDDING,
    rank_file,
)
from trtkit.spec.errors import InputError, UnsupportedError
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Parallelism

_LAYER = re.compile(r"^(transformer\.layers\.)(\d+)(\..+)$")
_ALONG_INPUTS = ("weight", GROUP_SCALE, GROUP_ZERO, "weights_scaling_factor")
"""What has the inputs, or groups of them, in its last dimension."""
_INPUT_VECTORS = (INPUT_SCALE, INPUT_ORDER, "prequant_scaling_factor")


class RankReader:
    """All rank files of a checkpoint, open; a context manager."""

    def __init__(self, directory: Path, model: ModelSpec, parallel: Parallelism) -> None:
        """Open every rank's file.

        Raises:
            InputError: a file is missing, truncated or not safetensors.
        """
        self._model, self._parallel = model, parallel
        self._paths = [directory / rank_file(rank) for rank in range(parallel.world_size)]
        self._handles = [_open(path) for path in self._paths]
        self._names = [frozenset(handle.keys()) for handle in self._handles]

    def __enter__(self) -> RankReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._handles.clear()

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a tensor, by its first rank."""
        stage, local = self._locate(name)
        return local in self._names[stage * self._parallel.tp]

    def tensor(self, name: str) -> Tensor:
        """One tensor of the unsplit model; `name` counts layers from 0 over the whole model.

        Raises:
            InputError: a rank lacks it, or ranks disagree where they must not.
        """
        stage, local = self._locate(name)
        tp = self._parallel.tp
        parts = [self._read(stage * tp + rank, local) for rank in range(tp)]
        merged = parts[0] if tp == 1 else _merger(name, self._model, tp)(parts, name)
        return merged[: self._model.vocab_size] if name in (VOCAB_EMBEDDING, LM_HEAD) else merged

    def _locate(self, name: str) -> tuple[int, str]:
        """Pipeline stage that holds a tensor, and its name there."""
        pp = self._parallel.pp
        match = _LAYER.match(name)
        if match is None:
            return (0 if name == VOCAB_EMBEDDING else pp - 1), name
        per_stage = self._model.num_layers // pp
        stage, local = divmod(int(match[2]), per_stage)
        return stage, f"{match[1]}{local}{match[3]}"

    def _read(self, rank: int, name: str) -> Tensor:
        from safetensors import SafetensorError

        try:
            tensor = self._handles[rank].get_tensor(name)
        except SafetensorError as error:
            raise InputError(f"{self._paths[rank]}: no usable tensor {name} ({error}); convert again") from None
        assert isinstance(tensor, Tensor)
        return tensor


Merger = Callable[[list[Tensor], str], Tensor]


def _merger(name: str, model: ModelSpec, tp: int) -> Merger:
    """How the ranks' parts of a tensor go together, by its name."""
    if ".attention.qkv." in name:
        return lambda parts, _: _merge_qkv(parts, model, tp)
    module, _, what = name.rpartition(".")
    if module.endswith((".attention.dense", ".mlp.proj")):
        if what in _ALONG_INPUTS:
            return lambda parts, _: torch.cat(parts, dim=1)
        return (lambda parts, _: torch.cat(parts)) if what in _INPUT_VECTORS else _same_everywhere
    if what in _INPUT_VECTORS:
        return _same_everywhere
    if ".mlp.fc." in name or ".mlp.gate." in name or name in (VOCAB_EMBEDDING, LM_HEAD):
        return lambda parts, _: torch.cat(parts, dim=0)
    return _same_everywhere


def _merge_qkv(parts: list[Tensor], model: ModelSpec, tp: int) -> Tensor:
    """Each rank stacks its q, k and v rows; KV heads are repeated over ranks when there are more ranks than heads."""
    q_rows = model.num_heads // tp * model.head_dim
    kv_rows = max(1, model.num_kv_heads // tp) * model.head_dim
    repeat = max(1, tp // model.num_kv_heads)
    split = [torch.split(part, [q_rows, kv_rows, kv_rows]) for part in parts]
    owners = split[::repeat]
    return torch.cat([s[0] for s in split] + [s[1] for s in owners] + [s[2] for s in owners])


def _same_everywhere(parts: list[Tensor], name: str) -> Tensor:
    if any(not torch.equal(parts[0], part) for part in parts[1:]):
        if name.endswith("per_channel_scale"):
            raise UnsupportedError(
                f"{name}: each rank has its own scales, so the INT8 ranks cannot be merged; convert with trtkit"
            )
        raise InputError(f"{name}: differs between ranks; the checkpoint mixes two conversions")
    return parts[0]


def _open(path: Path) -> Any:  # noqa: ANN401 - safetensors ships no types
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="pt")
    except FileNotFoundError:
        raise InputError(f"{path}: missing from the checkpoint; convert again") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated or not safetensors ({error}); convert again") from None
