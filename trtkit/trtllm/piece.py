"""One piece of a conversion: read rows of a source tensor, cast or quantise, write them to every rank that wants them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from trtkit.spec.atomic import output_errors
from trtkit.spec.checkpoint import GROUP_SCALE, GROUP_ZERO, INPUT_ORDER, ROW_SCALE
from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError, OutputError
from trtkit.trtllm.cast import Array, cast, check_finite, quantise_fp8_rows, quantise_rows, storage_dtype
from trtkit.trtllm.groups import pack_groups, quantise_groups
from trtkit.trtllm.layout import Slab
from trtkit.trtllm.packed_matrix import PackedMatrix
from trtkit.trtllm.safetensors_file import FileLayout
from trtkit.trtllm.source import SourceCheckpoint, SourceTensor
from trtkit.trtllm.stored import SCALING_FACTOR

FLUSH_BYTES = 256 << 20
"""Written data is handed to the disk this often, so that the flush at the end finds little left to do."""


class LostWriteError(OutputError):
    """The disk refused data it had taken before, so nothing written so far is known to be there."""


class RankFile:
    """An output file being filled; any number of threads may write."""

    def __init__(self, path: Path, layout: FileLayout, descriptor: int, flusher: ThreadPoolExecutor) -> None:
        """Write to `descriptor`, which is `path` at its full size; `flusher` waits for the disk meanwhile."""
        self.layout = layout
        self._path, self._descriptor = path, descriptor
        self._flusher = flusher
        self._flushing: Future[None] | None = None
        self._unflushed = 0
        self._mutex = threading.Lock()

    def dtype(self, name: str) -> DType:
        """Element type of a tensor of this file."""
        return DType.parse(self.layout.entries[name].dtype)

    def write(self, name: str, row: int, values: Array) -> None:
        """Put `values` [rows, cols], already in the tensor's type, at rows [row, row + rows) of tensor `name`.

        Raises:
            OutputError: the disk is full or refuses.
        """
        entry = self.layout.entries[name]
        row_bytes = entry.num_bytes // entry.shape[0]
        data = np.ascontiguousarray(values)
        assert data.nbytes == row_bytes * values.shape[0]
        assert data.dtype == storage_dtype(self.dtype(name))
        self._put([(_bytes(data), entry.offset + row * row_bytes)])

    def write_columns(self, name: str, col: int, values: Array) -> None:
        """Put `values` [rows, cols], all rows of tensor `name`, at its columns [col, col + cols).

        Raises:
            OutputError: the disk is full or refuses.
        """
        entry = self.layout.entries[name]
        data = np.ascontiguousarray(values)
        assert data.shape[0] == entry.shape[0]
        assert data.dtype == storage_dtype(self.dtype(name))
        if data.shape[1] == entry.shape[1]:
            self._put([(_bytes(data), entry.offset)])
            return
        row_bytes, first = entry.num_bytes // entry.shape[0], entry.offset + col * data.dtype.itemsize
        view, width = _bytes(data), data.shape[1] * data.dtype.itemsize
        self._put(
            [(view[index * width : (index + 1) * width], first + index * row_bytes) for index in range(data.shape[0])]
        )

    def _put(self, parts: Sequence[tuple[memoryview, int]]) -> None:
        # One writer a file: the kernel lets no more in, and its waiters spin.
        with output_errors(self._path), self._mutex:
            for view, position in parts:
                self._write(view, position)
                self._unflushed += view.nbytes
            if self._unflushed >= FLUSH_BYTES and (self._flushing is None or self._flushing.done()):
                self._settle()
                self._unflushed = 0
                self._flushing = self._flusher.submit(os.fsync, self._descriptor)

    def finish(self) -> None:
        """Wait for a flush under way.

        Raises:
            LostWriteError: the disk was full or refused.
        """
        self._settle()

    def _settle(self) -> None:
        """Raise what the last flush met: the kernel tells of a failed write only once."""
        flushing, self._flushing = self._flushing, None
        if flushing is None:
            return
        try:
            with output_errors(self._path):
                flushing.result()
        except OutputError as error:
            raise LostWriteError(str(error)) from error

    def _write(self, view: memoryview, position: int) -> None:
        while view:
            written = os.pwrite(self._descriptor, view, position)
            position, view = position + written, view[written:]


def _beside(name: str) -> str:
    """What names of the tensors beside a weight begin with."""
    return name.removesuffix("weight")


def _bytes(data: Array) -> memoryview:
    return data.reshape(-1).view(np.uint8).data


class PieceWorker:
    """Moves pieces; any number of threads may call `move`, each with a read buffer of its own."""

    def __init__(
        self,
        source: SourceCheckpoint,
        ranks: Sequence[RankFile],
        descriptors: Mapping[Path, int],
        scale_suffix: str = ROW_SCALE,
    ) -> None:
        """Use files that `opened` has opened; scales are named like their weight, with `scale_suffix` at the end."""
        self._source = source
        self._ranks = ranks
        self._descriptors = descriptors
        self._scale_suffix = scale_suffix
        self._local = threading.local()

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls,
        source: SourceCheckpoint,
        paths: Sequence[Path],
        layouts: Sequence[FileLayout],
        *,
        scale_suffix: str = ROW_SCALE,
    ) -> Iterator[PieceWorker]:
        """Open the source's files for reading and the existing rank files for writing."""
        with contextlib.ExitStack() as stack:
            descriptors = {}
            for path in sorted({path for tensor in source.tensors.values() for path in tensor.paths}):
                try:
                    descriptors[path] = stack.enter_context(path.open("rb", buffering=0)).fileno()
                except OSError as error:
                    raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
            ranks = []
            flusher = ThreadPoolExecutor(max_workers=1)
            for path, layout in zip(paths, layouts, strict=True):
                with output_errors(path):
                    handle = stack.enter_context(path.open("rb+", buffering=0))
                ranks.append(RankFile(path, layout, handle.fileno(), flusher))
            stack.enter_context(flusher)
            yield cls(source, ranks, descriptors, scale_suffix)
            for rank in ranks:
                rank.finish()

    def move(self, piece: Slab) -> None:
        """Read, cast or quantise, check and write one piece.

        Raises:
            InputError: the source is shorter than its header said, not finite, or overflows the target type.
            OutputError: the disk is full or refuses.
        """
        tensor, first = self._source.tensors[piece.source], piece.targets[0]
        where = f"{tensor.path}: tensor {piece.source!r}"
        source = DType.parse(tensor.entry.dtype)
        stored = self._ranks[first.rank].dtype(first.name)
        if f"{_beside(first.name)}{GROUP_SCALE}" in self._ranks[first.rank].layout.entries:
            self._move_own_groups(piece, tensor, source, where)
            return
        if tensor.packed is not None and tensor.packed.config.bits == 8 and stored is DType.INT8:
            if f"{_beside(first.name)}{SCALING_FACTOR}" in self._ranks[first.rank].layout.entries:
                self._move_groups(piece, tensor.packed, where)
                return
            if not tensor.packed.config.group_size:
                self._write_scales(piece, tensor.packed.scales[0, piece.row : piece.row + piece.rows], where)
                self._write(piece, tensor.packed.numbers(piece.row, piece.rows))
                return
        values = self._read(tensor, piece, source)
        if stored in (DType.INT8, DType.FP8):
            check_finite(values, source, where, piece.row)
            quantise = quantise_rows if stored is DType.INT8 else quantise_fp8_rows
            values, scales = quantise(values, source)
            self._write_scales(piece, scales, where)
        else:
            values = cast(values, source, stored, where, piece.row)
        self._write(piece, values)

    def _write(self, piece: Slab, values: Array) -> None:
        for target in piece.targets:
            self._ranks[target.rank].write(target.name, target.row, values[:, target.col : target.col + target.cols])

    def _move_own_groups(self, piece: Slab, tensor: SourceTensor, source: DType, where: str) -> None:
        """Into the embedded engine's form: a packed source's numbers as they are where they have that width, else rounded."""
        first = self._ranks[piece.targets[0].rank].layout
        name, scale_name = piece.targets[0].name, f"{_beside(piece.targets[0].name)}{GROUP_SCALE}"
        stored, compute = DType.parse(first.entries[name].dtype), DType.parse(first.entries[scale_name].dtype)
        size = piece.targets[0].cols // first.entries[scale_name].shape[1]
        rows, beside = slice(piece.row, piece.row + piece.rows), {}
        if tensor.packed is not None and tensor.packed.config.bits == stored.bits:
            numbers = tensor.packed.in_groups(tensor.packed.numbers(piece.row, piece.rows))
            self._write_order(piece, tensor.packed)
            group = np.arange(0, piece.cols, size) // tensor.packed.group_size
            for suffix, values in ((GROUP_SCALE, tensor.packed.scales), (GROUP_ZERO, tensor.packed.zeros)):
                if values is not None:
                    wide = np.ascontiguousarray(values[:, rows].T[:, group])
                    beside[suffix] = cast(wide, DType.FP32, compute, f"{where}: scale", piece.row)
        else:
            values = self._read(tensor, piece, source)
            numbers, beside[GROUP_SCALE] = quantise_groups(values, source, size, compute, where, piece.row)
        self._write_groups(piece, pack_groups(numbers, size) if stored is DType.INT4 else numbers, beside)

    def _write_order(self, piece: Slab, packed: PackedMatrix) -> None:
        """The same for every row; q, k and v share one (`convert` has looked)."""
        for target in piece.targets if packed.order is not None else ():
            rank, name = self._ranks[target.rank], f"{_beside(target.name)}{INPUT_ORDER}"
            if name in rank.layout.entries:
                assert packed.order is not None
                rank.write(name, 0, packed.order[target.col : target.col + target.cols, None])

    def _write_groups(self, piece: Slab, numbers: Array, beside: Mapping[str, Array]) -> None:
        """Every rank's columns of a matrix and of what lies beside it, which have fewer columns each."""
        for target in piece.targets:
            rank, prefix = self._ranks[target.rank], _beside(target.name)
            for name, values in ((target.name, numbers), *((f"{prefix}{s}", v) for s, v in beside.items())):
                width = piece.cols // values.shape[1]
                rank.write(name, target.row, values[:, target.col // width : (target.col + target.cols) // width])

    def _move_groups(self, piece: Slab, packed: PackedMatrix, where: str) -> None:
        """GPTQ's numbers and scales as they are, transposed: a source's rows are an engine's columns."""
        numbers = packed.transposed(piece.row, piece.rows)
        scales = packed.scales[:, piece.row : piece.row + piece.rows]
        for target in piece.targets:
            rank, name = self._ranks[target.rank], f"{_beside(target.name)}{SCALING_FACTOR}"
            inputs = slice(target.col, target.col + target.cols)
            rank.write_columns(target.name, target.row, numbers[inputs])
            size = target.cols // rank.layout.entries[name].shape[0]
            groups = scales[np.arange(inputs.start, inputs.stop, size) // packed.group_size]
            stored = cast(groups, DType.FP32, rank.dtype(name), f"{where}: scale")
            rank.write_columns(name, target.row, stored)

    def _write_scales(self, piece: Slab, scales: Array, where: str) -> None:
        """Columns of a row share its scale, so ranks that split columns all get it."""
        for target in piece.targets:
            rank = self._ranks[target.rank]
            name = f"{_beside(target.name)}{self._scale_suffix}"
            stored = cast(scales[:, None], DType.FP32, rank.dtype(name), f"{where}: scale", piece.row)
            rank.write(name, target.row, stored)

    def _read(self, tensor: SourceTensor, piece: Slab, dtype: DType) -> Array:
        """Rows of the piece as [rows, cols], in this thread's buffer (valid until its next read)."""
        if tensor.packed is not None:
            return tensor.packed.values(piece.row, piece.rows)
        entry = tensor.entry
        row_bytes = entry.num_bytes // entry.shape[0]
        num_bytes = piece.rows * row_bytes
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or buffer.nbytes < num_bytes:
            buffer = self._local.buffer = np.empty(num_bytes, dtype=np.uint8)
        position, view = entry.offset + piece.row * row_bytes, buffer.data[:num_bytes]
        try:
            while view:
                count = os.preadv(self._descriptors[tensor.path], [view], position)
                if count == 0:
                    raise InputError(f"{tensor.path}: tensor {entry.name!r}: the file became shorter while it was read")
                position, view = position + count, view[count:]
        except OSError as error:
            raise InputError(f"{tensor.path}: cannot be read ({error.strerror or error})") from None
        values: Array = buffer[:num_bytes].view(storage_dtype(dtype)).reshape(piece.rows, piece.cols)
        return values
