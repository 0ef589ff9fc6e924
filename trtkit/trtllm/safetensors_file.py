"""The safetensors format: headers checked before anything is believed, and files laid out before they are written.

A file is eight bytes of header length (little endian), a JSON header of that length, then the tensors without gaps.
Reading and writing tensors is then plain positional I/O at known offsets, in any order, by any number of threads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from trtkit.spec.checkpoint import CheckpointTensor
from trtkit.spec.errors import InputError

MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorEntry:
    """Where a tensor lies: `offset` counts from the beginning of the file; `dtype` is safetensors' spelling."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Every tensor of a file, after checking that the file really holds what its header promises.

    Raises:
        InputError: missing, truncated, not safetensors, or an entry that contradicts the file; names file and tensor.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, MAX_HEADER_BYTES):
                raise InputError(f"{path}: not a safetensors file, or cut off in its header ({size} bytes)")
            text = handle.read(length)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        header = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise InputError(f"{path}: not a safetensors file (its header is not JSON)") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: not a safetensors file (its header is not an object)")
    header.pop("__metadata__", None)
    base = _LENGTH_BYTES + length
    return {name: _entry(path, name, raw, base=base, size=size) for name, raw in header.items()}


def _entry(path: Path, name: str, raw: Any, *, base: int, size: int) -> TensorEntry:  # noqa: ANN401 - parsed JSON
    where = f"{path}: tensor {name!r}"
    try:
        dtype, shape = raw["dtype"], tuple(raw["shape"])
        start, end = raw["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise InputError(f"{where}: damaged header entry") from None
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, end)):
        raise InputError(f"{where}: damaged header entry")
    if dtype not in _ITEM_BYTES:
        raise InputError(f"{where}: unknown element type {dtype!r}")
    expected = prod(shape) * _ITEM_BYTES[dtype]
    if end - start != expected:
        raise InputError(f"{where}: shape {list(shape)} of {dtype} is {expected} bytes, the header says {end - start}")
    if base + end > size:
        raise InputError(f"{where}: the file is truncated: {size} bytes, this tensor ends at {base + end}")
    return TensorEntry(name=name, dtype=dtype, shape=shape, offset=base + start, num_bytes=expected)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileLayout:
    """A safetensors file that is still to be written: its first bytes, where each tensor goes, its size."""

    header: bytes
    entries: Mapping[str, TensorEntry]
    num_bytes: int


def lay_out(tensors: Iterable[CheckpointTensor]) -> FileLayout:
    """Place tensors one behind the other; wide types first, so that each starts at a multiple of its item size.

    Readers view slices of the mapped file as tensors, which fails at odd offsets; the order inside a width is kept.
    """
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.bits)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in ordered:
        end = position + tensor.num_bytes
        header[tensor.name] = {
            "dtype": tensor.dtype.safetensors_name,
            "shape": list(tensor.stored_shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    base = _LENGTH_BYTES + len(text)
    entries = {
        tensor.name: TensorEntry(
            name=tensor.name,
            dtype=tensor.dtype.safetensors_name,
            shape=tensor.stored_shape,
            offset=base + header[tensor.name]["data_offsets"][0],
            num_bytes=tensor.num_bytes,
        )
        for tensor in ordered
    }
    return FileLayout(
        header=len(text).to_bytes(_LENGTH_BYTES, "little") + text, entries=entries, num_bytes=base + position
    )
