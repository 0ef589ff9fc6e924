"""Matrices of quantised Hugging Face checkpoints, read in place, number by number.

Every number of b bits is unsigned in the file: the weight plus its zero point, `weight = (number - zero) * scale`. 32 / b of
them lie in an int32, the first in the lowest bits. [out, in] is stored as

* GPTQ: `qweight` [in / n, out] packed along the inputs; `scales` [groups, out]; `qzeros` [groups, out / n] packed along the
  outputs, in the format "gptq" less one; `g_idx` [in], the group of each input.
* AWQ (GEMM): `qweight` [in, out / 8] and `qzeros` [groups, out / 8], both packed along the outputs, eight at a time in the
  order 0 2 4 6 1 3 5 7; `scales` [groups, out].
* compressed-tensors (pack-quantized): `weight_packed` [out, in / n] packed along the inputs; `weight_scale` [out, groups];
  `weight_zero_point` [out / n, groups] packed along the outputs, where weights are not symmetric; `weight_shape` [2].

Here numbers and zero points count from the middle of their range, so that symmetric weights have zero points of 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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
from trtkit.trtllm.packed import AWQ, COMPRESSED, GPTQ, Packing
from trtkit.trtllm.safetensors_file import TensorEntry

_WORD_BITS = 32
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The nibble in which each of eight outputs lies."""
_LEAST_LESS_ONE = 15
"""A zero point of 0, less one, in four bits: what GPTQ's first format cannot store."""
_FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True, kw_only=True)
class PackedMatrix(ABC):
    """One matrix [rows, cols] in its tensors, each with the file it is in."""

    name: str
    rows: int
    cols: int
    config: Packing
    parts: Mapping[str, tuple[Path, TensorEntry]]

    @property
    def paths(self) -> frozenset[Path]:
        """The files it is in."""
        return frozenset(path for path, _ in self.parts.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(entry.num_bytes for _, entry in self.parts.values())

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.config.group_size or self.cols

    @property
    def num_groups(self) -> int:
        """Groups of a row."""
        return self.cols // self.group_size

    @property
    def per_word(self) -> int:
        """Numbers in an int32."""
        return _WORD_BITS // self.config.bits

    @property
    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor."""

    @abstractmethod
    def numbers(self, row: int, count: int) -> NDArray[np.int8]:
        """Rows [row, row + count) as int8 [count, cols]."""

    def transposed(self, row: int, count: int) -> NDArray[np.int8]:
        """The same as int8 [cols, count]."""
        return np.ascontiguousarray(self.numbers(row, count).T)

    @abstractmethod
    def _stored_zeros(self) -> NDArray[np.uint8] | None:
        """Zero points as stored, [groups, rows]; None where the format has none for these weights."""

    @cached_property
    def scales(self) -> NDArray[np.float32]:
        """[groups, rows].

        Raises:
            InputError: one is not finite.
        """
        return self._floats("scales")

    @cached_property
    def zeros(self) -> NDArray[np.float32] | None:
        """Zero points [groups, rows], None where weights are symmetric."""
        stored = None if self.config.symmetric else self._stored_zeros()
        if stored is None:
            return None
        zeros = stored.astype(np.float32)
        zeros += self.config.zero_less - self.config.middle
        return zeros

    def values(self, row: int, count: int) -> NDArray[np.float32]:
        """Rows [row, row + count) multiplied with their scales, float32 [count, cols]; exact."""
        wide = self.in_groups(self.numbers(row, count)).astype(np.float32)
        grouped, rows = wide.reshape(count, -1, self.group_size), slice(row, row + count)
        if self.zeros is not None:
            grouped -= self.zeros[:, rows].T[:, :, None]
        grouped *= self.scales[:, rows].T[:, :, None]
        if self.order is None:
            return wide
        result = np.empty_like(wide)
        result[:, self.order] = wide
        return result

    @cached_property
    def order(self) -> NDArray[np.int32] | None:
        """The inputs, group by group; None where groups are of neighbours."""
        return None

    def in_groups(self, numbers: NDArray[np.int8]) -> NDArray[np.int8]:
        """Numbers [rows, cols] with the inputs of a group beside each other."""
        return numbers if self.order is None else np.ascontiguousarray(numbers[:, self.order])

    def check(self) -> None:
        """Look at shapes and types, every group's zero points and every input's group; reads the small tensors only.

        Raises:
            InputError: a shape or an element type that the format does not have.
            UnsupportedError: weights that are not symmetric though their config says so, groups that do not follow
                the inputs (desc_act), or zero points that readers take differently.
        """
        for suffix, shape in self.shapes.items():
            path, entry = self.parts[suffix]
            kinds = _FLOATS if "scale" in suffix else ("I64", "I32") if suffix == "weight_shape" else ("I32",)
            if entry.shape != shape or entry.dtype not in kinds:
                raise InputError(
                    f"{path}: tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}, {self.config.name} with group "
                    f"size {self.group_size} has {'/'.join(kinds)} {list(shape)}"
                )
        stored = self._stored_zeros() if self.config.symmetric else None
        if stored is not None and (stored != self.config.middle - self.config.zero_less).any():
            path, entry = self.parts["qzeros"]
            raise UnsupportedError(
                f"{path}: tensor {entry.name!r} has zero points other than {self.config.middle}, and the config says symmetric"
            )

    def _floats(self, suffix: str) -> NDArray[np.float32]:
        path, entry = self.parts[suffix]
        dtype = DType.parse(entry.dtype)
        values = np.ascontiguousarray(_mapped(path, entry, storage_dtype(dtype)))
        where = f"{path}: tensor {entry.name!r}"
        check_finite(values, dtype, where)
        wide: NDArray[np.float32] = cast(values, dtype, DType.FP32, where)
        return wide

    def _words(self, suffix: str) -> NDArray[np.uint32]:
        path, entry = self.parts[suffix]
        words: NDArray[np.uint32] = _mapped(path, entry, np.dtype(np.uint32))
        return words

    def _unpacked(self, words: NDArray[np.uint32]) -> NDArray[np.uint8]:
        """Numbers as stored, along the last axis."""
        codes = np.ascontiguousarray(words).view(np.uint8)
        if self.config.bits == 8:
            return codes
        numbers = np.empty((*codes.shape[:-1], 2 * codes.shape[-1]), dtype=np.uint8)
        np.bitwise_and(codes, 15, out=numbers[..., 0::2])
        np.right_shift(codes, 4, out=numbers[..., 1::2])
        return numbers

    def _centred(self, unsigned: NDArray[np.uint8]) -> NDArray[np.int8]:
        """Less the middle of the range; modulo 256 both widths come out right."""
        numbers: NDArray[np.int8] = (unsigned - np.uint8(self.config.middle)).view(np.int8)
        return numbers


class GptqMatrix(PackedMatrix):
    """`qweight`, `qzeros`, `scales`, `g_idx`."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor."""
        return {
            "qweight": (self.cols // self.per_word, self.rows),
            "qzeros": (self.num_groups, self.rows // self.per_word),
            "scales": (self.num_groups, self.rows),
            "g_idx": (self.cols,),
        }

    def check(self) -> None:
        """See `PackedMatrix.check`."""
        super().check()
        (path, entry), groups = self.parts["g_idx"], np.arange(self.cols) // self.group_size
        if self.config.reordered and (np.sort(self._groups) != groups).any():
            raise InputError(f"{path}: tensor {entry.name!r} has no groups of {self.group_size} inputs each")
        if not self.config.reordered and (self._groups != groups).any():
            raise UnsupportedError(
                f"{path}: tensor {entry.name!r} orders the inputs by activation, and the config says desc_act: false"
            )
        if not self.config.symmetric and self.config.zero_less and (self._stored_zeros() == _LEAST_LESS_ONE).any():
            path, entry = self.parts["qzeros"]
            raise UnsupportedError(
                f"{path}: tensor {entry.name!r} holds 15, which some readers of the format gptq take for a zero point of 16 and "
                "others for 0; save it as gptq_v2, or give the unquantised model"
            )

    @cached_property
    def order(self) -> NDArray[np.int32] | None:
        """The inputs, group by group."""
        return np.argsort(self._groups, kind="stable").astype(np.int32) if self.config.reordered else None

    @property
    def _groups(self) -> NDArray[np.int32]:
        groups: NDArray[np.int32] = _mapped(*self.parts["g_idx"], np.dtype(np.int32))
        return groups

    def numbers(self, row: int, count: int) -> NDArray[np.int8]:
        """Rows [row, row + count) as int8 [count, cols]."""
        return self._centred(self._unpacked(self._words("qweight")[:, row : row + count].T))

    def transposed(self, row: int, count: int) -> NDArray[np.int8]:
        """The same as int8 [cols, count]; 8 bits lie nearly so in the file."""
        if self.config.bits != 8:
            return super().transposed(row, count)
        words = np.ascontiguousarray(self._words("qweight")[:, row : row + count])
        block = words.view(np.uint8).reshape(-1, count, self.per_word)
        unsigned = np.empty((block.shape[0], self.per_word, count), dtype=np.uint8)
        for place in range(self.per_word):
            unsigned[:, place] = block[:, :, place]
        return self._centred(unsigned).reshape(self.cols, count)

    def _stored_zeros(self) -> NDArray[np.uint8]:
        return self._unpacked(self._words("qzeros"))


class AwqMatrix(PackedMatrix):
    """`qweight`, `qzeros`, `scales`, in the layout that AutoAWQ calls GEMM."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor."""
        words = self.rows // self.per_word
        return {
            "qweight": (self.cols, words),
            "qzeros": (self.num_groups, words),
            "scales": (self.num_groups, self.rows),
        }

    def numbers(self, row: int, count: int) -> NDArray[np.int8]:
        """Rows [row, row + count) as int8 [count, cols]."""
        first, last = row // self.per_word, -(-(row + count) // self.per_word)
        wide = self._in_order(self._words("qweight")[:, first:last])
        start = row - first * self.per_word
        return self._centred(np.ascontiguousarray(wide[:, start : start + count].T))

    def _stored_zeros(self) -> NDArray[np.uint8]:
        return self._in_order(self._words("qzeros"))

    def _in_order(self, words: NDArray[np.uint32]) -> NDArray[np.uint8]:
        eights = self._unpacked(words).reshape(words.shape[0], -1, self.per_word)
        ordered: NDArray[np.uint8] = eights[:, :, list(_AWQ_PLACES)].reshape(words.shape[0], -1)
        return ordered


class CompressedMatrix(PackedMatrix):
    """`weight_packed`, `weight_scale`, `weight_shape`, perhaps `weight_zero_point`."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor."""
        shapes: dict[str, tuple[int, ...]] = {
            "weight_packed": (self.rows, self.cols // self.per_word),
            "weight_scale": (self.rows, self.num_groups),
            "weight_shape": (2,),
        }
        if not self.config.symmetric:
            shapes["weight_zero_point"] = (self.rows // self.per_word, self.num_groups)
        return shapes

    @cached_property
    def scales(self) -> NDArray[np.float32]:
        """[groups, rows].

        Raises:
            InputError: one is not finite.
        """
        return np.ascontiguousarray(self._floats("weight_scale").T)

    def numbers(self, row: int, count: int) -> NDArray[np.int8]:
        """Rows [row, row + count) as int8 [count, cols]."""
        return self._centred(self._unpacked(self._words("weight_packed")[row : row + count]))

    def _stored_zeros(self) -> NDArray[np.uint8] | None:
        return None if self.config.symmetric else self._unpacked(self._words("weight_zero_point").T)


_KINDS: dict[str, type[PackedMatrix]] = {GPTQ: GptqMatrix, AWQ: AwqMatrix, COMPRESSED: CompressedMatrix}


def packed_matrix(
    name: str, shape: tuple[int, ...], found: Mapping[str, tuple[Path, TensorEntry]], config: Packing, where: Path
) -> PackedMatrix:
    """The tensors behind a weight, checked.

    Args:
        name: the weight's name in an unquantised model.
        shape: [rows, cols] by the config.
        found: every tensor of the checkpoint by name.
        config: how it is quantised.
        where: the directory, for errors.

    Raises:
        InputError: one is missing or misshapen.
        UnsupportedError: not symmetric against its config, or ordered by activation.
    """
    rows, cols = shape
    prefix, group = name.removesuffix("weight"), config.group_size or cols
    matrix = _KINDS[config.method](name=name, rows=rows, cols=cols, config=config, parts={})
    if cols % group or cols % matrix.per_word or rows % matrix.per_word:
        raise InputError(f"{where}: {name} is {rows} x {cols}, which groups of {group} do not divide")
    suffixes = tuple(matrix.shapes)
    missing = [suffix for suffix in suffixes if f"{prefix}{suffix}" not in found]
    if missing:
        raise InputError(f"{where}: tensor '{prefix}{missing[0]}' is missing; {config.name} has {', '.join(suffixes)}")
    parts = {suffix: found[f"{prefix}{suffix}"] for suffix in suffixes}
    matrix = _KINDS[config.method](name=name, rows=rows, cols=cols, config=config, parts=parts)
    matrix.check()
    return matrix


def _mapped(path: Path, entry: TensorEntry, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A tensor's file bytes as an array of its shape."""
    return np.memmap(path, dtype=dtype, mode="r", offset=entry.offset, shape=entry.shape)
