"""INT8 GPTQ checkpoints as AutoGPTQ and its successors write them, read in place.

A matrix [out, in] is four tensors: `qweight` int32 [in / 4, out], four rows of [in, out] to a number, the first in the low
byte, each a weight plus its zero point; `scales` 16-bit [groups, out]; `qzeros` int32 [groups, out / 4], four columns to a
number, each the zero point (128 where weights are symmetric) less one, except in the format "gptq_v2"; `g_idx` int32 [in],
the group of each input. So weight[o, i] = (q[i, o] - zero) * scale[g_idx[i], o].
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError, UnsupportedError
from trtkit.trtllm.cast import cast, check_finite, storage_dtype
from trtkit.trtllm.safetensors_file import TensorEntry

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
_PER_WORD = 4
_ZERO = 128
_OTHER_CONFIGS = ("quantize_config.json", "quant_config.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class GptqConfig:
    """What a checkpoint says of itself. `group_size` is 0 where each row has one scale; `stored_zero` is the byte that
    stands for the zero point 128."""

    group_size: int
    stored_zero: int


@dataclass(frozen=True, kw_only=True)
class GptqMatrix:
    """One matrix [rows, cols] in its four tensors, each with the file it is in."""

    rows: int
    cols: int
    config: GptqConfig
    parts: Mapping[str, tuple[Path, TensorEntry]]

    @property
    def paths(self) -> frozenset[Path]:
        """The files it is in."""
        return frozenset(path for path, _ in self.parts.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all four tensors."""
        return sum(entry.num_bytes for _, entry in self.parts.values())

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.config.group_size or self.cols

    @cached_property
    def scales(self) -> NDArray[np.float32]:
        """[groups, rows].

        Raises:
            InputError: one is not finite.
        """
        path, entry = self.parts["scales"]
        dtype = DType.parse(entry.dtype)
        values = np.ascontiguousarray(_mapped(path, entry, storage_dtype(dtype)))
        where = f"{path}: tensor {entry.name!r}"
        check_finite(values, dtype, where)
        wide: NDArray[np.float32] = cast(values, dtype, DType.FP32, where)
        return wide

    def numbers(self, row: int, count: int) -> NDArray[np.int8]:
        """Rows [row, row + count) as int8 [count, cols], less the zero point."""
        block = self._words[:, row : row + count]
        unsigned = np.ascontiguousarray(block.T).view(np.uint8)
        numbers: NDArray[np.int8] = (unsigned ^ np.uint8(_ZERO)).view(np.int8)
        return numbers

    def transposed(self, row: int, count: int) -> NDArray[np.int8]:
        """The same as int8 [cols, count], which is nearly how they lie in the file."""
        block = np.ascontiguousarray(self._words[:, row : row + count]).view(np.uint8).reshape(-1, count, _PER_WORD)
        unsigned = np.empty((block.shape[0], _PER_WORD, count), dtype=np.uint8)
        for place in range(_PER_WORD):
            np.bitwise_xor(block[:, :, place], np.uint8(_ZERO), out=unsigned[:, place])
        numbers: NDArray[np.int8] = unsigned.reshape(self.cols, count).view(np.int8)
        return numbers

    def values(self, row: int, count: int) -> NDArray[np.float32]:
        """The same multiplied with their scales, float32 [count, cols]; exact."""
        wide = self.numbers(row, count).astype(np.float32)
        scales = self.scales[:, row : row + count].T
        grouped = wide.reshape(count, -1, self.group_size)
        grouped *= scales[:, :, None]
        return wide

    @cached_property
    def _words(self) -> NDArray[np.uint32]:
        path, entry = self.parts["qweight"]
        words: NDArray[np.uint32] = _mapped(path, entry, np.dtype(np.uint32))
        return words

    def check(self) -> None:
        """Look at every group's zero points and every input's group; reads the small tensors only.

        Raises:
            InputError: a shape or an element type that GPTQ does not have.
            UnsupportedError: weights that are not symmetric, or groups that do not follow the inputs (desc_act).
        """
        groups = self.cols // self.group_size
        words = self.rows // _PER_WORD
        shapes = {
            "qweight": (self.cols // _PER_WORD, self.rows),
            "qzeros": (groups, words),
            "scales": (groups, self.rows),
            "g_idx": (self.cols,),
        }
        for suffix, shape in shapes.items():
            path, entry = self.parts[suffix]
            kinds = ("F16", "BF16", "F32") if suffix == "scales" else ("I32",)
            if entry.shape != shape or entry.dtype not in kinds:
                raise InputError(
                    f"{path}: tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}, INT8 GPTQ with group size "
                    f"{self.group_size} has {'/'.join(kinds)} {list(shape)}"
                )
        path, entry = self.parts["qzeros"]
        zeros = _mapped(path, entry, np.dtype(np.uint8))
        if (zeros != self.config.stored_zero).any():
            raise UnsupportedError(
                f"{path}: tensor {entry.name!r} has zero points other than {_ZERO}; trtkit converts symmetric GPTQ (sym: true)"
            )
        path, entry = self.parts["g_idx"]
        if (_mapped(path, entry, np.dtype(np.int32)) != np.arange(self.cols) // self.group_size).any():
            raise UnsupportedError(
                f"{path}: tensor {entry.name!r} orders the inputs by activation; trtkit converts GPTQ with desc_act: false"
            )


def taken_over(config: GptqConfig, *, rows: bool) -> str:
    """What becomes of the weights, for the manifest; `rows` says that the target has one scale a row."""
    if not config.group_size:
        return "INT8 GPTQ with one scale for each of its rows, taken over as they are"
    if rows:
        return f"INT8 GPTQ in groups of {config.group_size}, rounded again to one scale a row"
    return f"INT8 GPTQ in groups of {config.group_size}, taken over as they are"


def read_gptq_config(directory: Path) -> GptqConfig | None:
    """How a directory's weights are quantised; None where they are not.

    Raises:
        UnsupportedError: another method, or GPTQ other than 8 bits, symmetric, without activation order.
    """
    found = _quantisation(directory)
    if found is None:
        return None
    path, settings = found
    method = settings.get("quant_method", "gptq")
    if method != "gptq":
        raise UnsupportedError(
            f"{path}: quantised with {str(method)[:40]}; trtkit converts 16-bit weights and INT8 GPTQ"
        )
    for key, wanted, default in (("bits", 8, None), ("sym", True, True), ("desc_act", False, False)):
        if settings.get(key, default) != wanted:
            raise UnsupportedError(
                f"{path}: {key} is {settings.get(key, default)!r}; trtkit converts GPTQ with {key} {wanted!r} "
                "(or the unquantised model)"
            )
    group = settings.get("group_size", -1)
    if not isinstance(group, int) or isinstance(group, bool) or (group != -1 and group < _PER_WORD):
        raise InputError(f"{path}: group_size is {group!r}, expected -1 or a number such as 128")
    stored_zero = _ZERO if settings.get("checkpoint_format") == "gptq_v2" else _ZERO - 1
    return GptqConfig(group_size=max(group, 0), stored_zero=stored_zero)


def _quantisation(directory: Path) -> tuple[Path, Mapping[str, Any]] | None:
    path = directory / "config.json"
    config = _json(path)
    if config.get("quantization_config"):
        return path, config["quantization_config"]
    for name in _OTHER_CONFIGS:
        if (directory / name).is_file():
            return directory / name, _json(directory / name)
    return None


def _json(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected an object")
    return data


def gptq_matrix(
    name: str, shape: tuple[int, ...], found: Mapping[str, tuple[Path, TensorEntry]], config: GptqConfig, where: Path
) -> GptqMatrix:
    """The four tensors behind a weight, checked.

    Args:
        name: the weight's name in an unquantised model.
        shape: [rows, cols] by the config.
        found: every tensor of the checkpoint by name.
        config: how it is quantised.
        where: the directory, for errors.

    Raises:
        InputError: one is missing or misshapen.
        UnsupportedError: not symmetric, or ordered by activation.
    """
    rows, cols = shape
    prefix = name.removesuffix("weight")
    missing = [suffix for suffix in SUFFIXES if f"{prefix}{suffix}" not in found]
    if missing:
        raise InputError(f"{where}: tensor '{prefix}{missing[0]}' is missing; INT8 GPTQ has {', '.join(SUFFIXES)}")
    group = config.group_size or cols
    if cols % group or cols % _PER_WORD or rows % _PER_WORD:
        raise InputError(f"{where}: {name} is {rows} x {cols}, which groups of {group} do not divide")
    parts = {suffix: found[f"{prefix}{suffix}"] for suffix in SUFFIXES}
    matrix = GptqMatrix(rows=rows, cols=cols, config=config, parts=parts)
    matrix.check()
    return matrix


def _mapped(path: Path, entry: TensorEntry, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A tensor's file bytes as an array of its shape; bytes themselves for uint8."""
    count = entry.num_bytes // dtype.itemsize
    shape = (count,) if dtype == np.uint8 else entry.shape
    return np.memmap(path, dtype=dtype, mode="r", offset=entry.offset, shape=shape)
