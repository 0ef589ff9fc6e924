"""A Hugging Face model directory: its config and where each of its tensors lies, single file or sharded.

GPTQ, AWQ and compressed-tensors checkpoints are read too: each matrix then stands for a few tensors
(`trtkit.trtllm.packed_matrix`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np

from trtkit.spec.errors import InputError, UnsupportedError
from trtkit.spec.hf import load_model_spec
from trtkit.spec.model import ModelSpec
from trtkit.trtllm.layout import is_linear, source_shapes
from trtkit.trtllm.packed import Packing, read_packing
from trtkit.trtllm.packed_matrix import PackedMatrix, packed_matrix
from trtkit.trtllm.safetensors_file import TensorEntry, read_header

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
READABLE_DTYPES = ("F32", "F16", "BF16")
_DERIVED_SUFFIXES = (".rotary_emb.inv_freq", ".rotary_emb.original_inv_freq")
"""Buffers that old checkpoints carry and every loader recomputes from the config."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceTensor:
    """One tensor of the source and the file it is in.

    Of a quantised matrix `packed` has the numbers; `entry` then describes the float32 matrix it stands for.
    """

    path: Path
    entry: TensorEntry
    packed: PackedMatrix | None = None

    @property
    def paths(self) -> frozenset[Path]:
        """Every file it is in."""
        return frozenset({self.path}) if self.packed is None else self.packed.paths

    @property
    def num_bytes(self) -> int:
        """Bytes in the files."""
        return self.entry.num_bytes if self.packed is None else self.packed.num_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceCheckpoint:
    """A checkpoint whose headers have been checked against its config; no weights are read yet."""

    directory: Path
    model: ModelSpec
    tensors: Mapping[str, SourceTensor]
    packing: Packing | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def scale_dtypes(self) -> frozenset[str]:
        """Types of a quantised source's scales, in safetensors' spelling."""
        packed = [tensor.packed for tensor in self.tensors.values() if tensor.packed is not None]
        return frozenset(entry.dtype for m in packed for suffix, (_, entry) in m.parts.items() if "scale" in suffix)

    @property
    def fingerprint(self) -> list[tuple[str, int, int]]:
        """Name, size and change time of each file: what a resumed conversion must find unchanged."""
        files = sorted({path for tensor in self.tensors.values() for path in tensor.paths})
        return [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files]


def open_source(directory: Path, *, name: str | None = None) -> SourceCheckpoint:
    """Read and check a model directory; `name` replaces the model's name, which is otherwise the directory's.

    Raises:
        InputError: a file, shard or tensor is missing, surplus, truncated or of the wrong shape.
        UnsupportedError: the architecture, or weights in a form that is neither safetensors of 16 or 32 bits nor
            quantised as `trtkit.trtllm.packed` knows.
    """
    model = load_model_spec(directory)
    model = replace(model, name=name or model.name)
    found: dict[str, SourceTensor] = {}
    for path in _weight_files(directory):
        for key, entry in read_header(path).items():
            if key in found:
                raise InputError(f"{path}: tensor {key!r} is already in {found[key].path.name}")
            found[key] = SourceTensor(path=path, entry=entry)
    packing = read_packing(directory)
    if packing is not None:
        found = _unpacked(directory, model, found, packing)
    tensors = _checked(directory, model, found)
    return SourceCheckpoint(directory=directory, model=model, tensors=tensors, packing=packing)


def _unpacked(
    directory: Path, model: ModelSpec, found: Mapping[str, SourceTensor], config: Packing
) -> dict[str, SourceTensor]:
    """The tensors by the names of an unquantised model: a packed matrix for each weight inside the blocks."""
    parts = {name: (tensor.path, tensor.entry) for name, tensor in found.items()}
    result = dict(found)
    for name, shape in source_shapes(model).items():
        if not is_linear(name):
            continue
        matrix = packed_matrix(name, shape, parts, config, directory)
        for _, part in matrix.parts.values():
            del result[part.name]
        entry = TensorEntry(name=name, dtype="F32", shape=shape, offset=0, num_bytes=4 * prod(shape))
        result[name] = SourceTensor(path=next(iter(matrix.parts.values()))[0], entry=entry, packed=matrix)
    return result


def _weight_files(directory: Path) -> list[Path]:
    if (directory / SINGLE_NAME).is_file():
        return [directory / SINGLE_NAME]
    index = directory / INDEX_NAME
    if index.is_file():
        return _shards(index)
    if any(directory.glob("*.bin")) or any(directory.glob("*.pth")):
        raise UnsupportedError(
            f"{directory}: only pickled weights (*.bin, *.pth), which trtkit never opens; "
            "save the model again with save_pretrained(..., safe_serialization=True)"
        )
    raise InputError(f"{directory}: no weights: neither {SINGLE_NAME} nor {INDEX_NAME}")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise InputError(f"{index}: damaged: expected an object with a 'weight_map' of tensor to file name") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{index}: {name!r} is not a plain file name")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise InputError(
            f"{index.parent}: {len(missing)} of {len(names)} shards are missing, first {missing[0]}; "
            "finish the download and run again"
        )
    return [index.parent / name for name in names]


def _checked(directory: Path, model: ModelSpec, found: dict[str, SourceTensor]) -> dict[str, SourceTensor]:
    wanted = source_shapes(model)
    for name, shape in wanted.items():
        if name not in found:
            raise InputError(f"{directory}: tensor {name!r} is missing (shape {list(shape)} by config.json)")
        _check_tensor(found[name], shape)
    ignored = {"lm_head.weight"} if model.tie_embeddings else set()
    for name, tensor in found.items():
        if name not in wanted and name not in ignored and not name.endswith(_DERIVED_SUFFIXES):
            raise InputError(
                f"{tensor.path}: tensor {name!r} is not part of a {model.architecture} with this config.json; "
                "is it the right config, or an adapter or a quantised model?"
            )
    return {name: found[name] for name in wanted}


def _check_tensor(tensor: SourceTensor, shape: tuple[int, ...]) -> None:
    where = f"{tensor.path}: tensor {tensor.entry.name!r}"
    if tensor.entry.dtype not in READABLE_DTYPES:
        raise UnsupportedError(
            f"{where} is {tensor.entry.dtype}; trtkit converts {', '.join(READABLE_DTYPES)}: give it the unquantised model"
        )
    if tensor.entry.shape != shape:
        raise InputError(f"{where} has shape {list(tensor.entry.shape)}, config.json asks for {list(shape)}")


def check_orders(source: SourceCheckpoint) -> None:
    """Refuse orders of inputs that differ between matrices which the engine multiplies as one.

    Raises:
        UnsupportedError: names the first of them.
    """
    for layer in range(source.model.num_layers):
        for module, names in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            first, *others = (f"model.layers.{layer}.{module}.{name}_proj.weight" for name in names)
            for other in others:
                one, two = (packed.order for name in (first, other) if (packed := source.tensors[name].packed))
                if one is None or two is None or not np.array_equal(one, two):
                    raise UnsupportedError(
                        f"{source.directory}: {first} and {other} order their common inputs differently; use --precision int8, "
                        "or GPTQ with desc_act False"
                    )
