"""One piece of a conversion: read rows of a source tensor, cast or quantise, write them to every rank that wants them."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trtkit.spec.atomic import output_errors
from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError
from trtkit.trtllm.cast import cast, check_finite, quantise_rows, torch_dtype
from trtkit.trtllm.layout import Slab, Target
from trtkit.trtllm.safetensors_file import FileLayout
from trtkit.trtllm.source import SourceCheckpoint, SourceTensor

if TYPE_CHECKING:
    import torch

SCALE_SUFFIX = "per_channel_scale"


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFile:
    """An output file being filled: where each tensor goes, and the descriptor to write to."""

    path: Path
    layout: FileLayout
    descriptor: int

    def write(self, name: str, row: int, values: torch.Tensor) -> None:
        """Put `values` [rows, cols] at rows [row, row + rows) of tensor `name`.

        Raises:
            OutputError: the disk is full or refuses.
        """
        import torch

        entry = self.layout.entries[name]
        dtype = torch_dtype(DType.parse(entry.dtype))
        row_bytes = entry.num_bytes // entry.shape[0]
        data = values.to(dtype).contiguous().view(torch.uint8).numpy().reshape(-1)
        assert row_bytes * values.shape[0] == data.nbytes
        position, view = entry.offset + row * row_bytes, data.data
        with output_errors(self.path):
            while view:
                written = os.pwrite(self.descriptor, view, position)
                position, view = position + written, view[written:]


class PieceWorker:
    """Moves pieces; any number of threads may call `move`, each with a read buffer of its own."""

    def __init__(self, source: SourceCheckpoint, ranks: Sequence[RankFile], descriptors: Mapping[Path, int]) -> None:
        """Use files that `opened` has opened."""
        self._source = source
        self._ranks = ranks
        self._descriptors = descriptors
        self._local = threading.local()

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls, source: SourceCheckpoint, paths: Sequence[Path], layouts: Sequence[FileLayout]
    ) -> Iterator[PieceWorker]:
        """Open the source's files for reading and the existing rank files for writing."""
        with contextlib.ExitStack() as stack:
            descriptors = {}
            for path in sorted({tensor.path for tensor in source.tensors.values()}):
                try:
                    descriptors[path] = stack.enter_context(path.open("rb", buffering=0)).fileno()
                except OSError as error:
                    raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
            ranks = []
            for path, layout in zip(paths, layouts, strict=True):
                with output_errors(path):
                    handle = stack.enter_context(path.open("rb+", buffering=0))
                ranks.append(RankFile(path=path, layout=layout, descriptor=handle.fileno()))
            yield cls(source, ranks, descriptors)

    def move(self, piece: Slab) -> None:
        """Read, cast or quantise, check and write one piece.

        Raises:
            InputError: the source is shorter than its header said, not finite, or overflows the target type.
            OutputError: the disk is full or refuses.
        """
        tensor = self._source.tensors[piece.source]
        where = f"{tensor.path}: tensor {piece.source!r}"
        values = self._read(tensor, piece)
        dtype = DType.parse(self._stored_dtype(piece.targets[0]))
        if dtype is DType.INT8:
            check_finite(values, where, piece.row)
            values, scales = quantise_rows(values)
            for target in piece.targets:
                name = f"{target.name.removesuffix('weight')}{SCALE_SUFFIX}"
                self._ranks[target.rank].write(name, target.row, scales[:, None])
        else:
            values = cast(values, torch_dtype(dtype), where, piece.row)
        for target in piece.targets:
            self._ranks[target.rank].write(target.name, target.row, values[:, target.col : target.col + target.cols])

    def _stored_dtype(self, target: Target) -> str:
        return self._ranks[target.rank].layout.entries[target.name].dtype

    def _read(self, tensor: SourceTensor, piece: Slab) -> torch.Tensor:
        """Rows of the piece as [rows, cols], in this thread's buffer (valid until its next read)."""
        import torch

        entry = tensor.entry
        row_bytes = entry.num_bytes // entry.shape[0]
        num_bytes = piece.rows * row_bytes
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or buffer.numel() < num_bytes:
            buffer = self._local.buffer = torch.empty(num_bytes, dtype=torch.uint8)
        position, view = entry.offset + piece.row * row_bytes, buffer.numpy().data[:num_bytes]
        try:
            while view:
                count = os.preadv(self._descriptors[tensor.path], [view], position)
                if count == 0:
                    raise InputError(f"{tensor.path}: tensor {entry.name!r}: the file became shorter while it was read")
                position, view = position + count, view[count:]
        except OSError as error:
            raise InputError(f"{tensor.path}: cannot be read ({error.strerror or error})") from None
        dtype = torch_dtype(DType.parse(entry.dtype))
        return buffer[:num_bytes].view(dtype).view(piece.rows, piece.cols)
