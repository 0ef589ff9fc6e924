"""`PagedCache`: keys and values in TensorRT-LLM's block layout, and the index arithmetic over it.

Axes in names: B blocks, H KV heads, T slots (tokens), D head dimension, L layers, R rows of D elements.
One layer is `[B, 2, H, tokens_per_block, D]` (HND: heads outside tokens); index 1 of the second axis is the values.
Keys are stored rotated. One block more than the pool hands out, `pad_block`, is always zero: short block tables
are padded with it, so that a batched gather never reads another sequence's data. All layers are one tensor, so that
a kernel can work on every layer in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trtkit.kernels.fused import to_cache_type
from trtkit.spec.dtype import DType
from trtkit.spec.model import ModelSpec


def torch_dtype(dtype: DType) -> torch.dtype:
    """torch's object for an element type; bytes of two for INT4."""
    result = torch.uint8 if dtype is DType.INT4 else getattr(torch, dtype.trtllm_name)
    assert isinstance(result, torch.dtype)
    return result


def block_bytes(model: ModelSpec, tokens_per_block: int, dtype: DType) -> int:
    """Bytes of one block over all layers, keys and values."""
    return model.kv_bytes_per_token(dtype) * tokens_per_block


class PagedCache:
    """The memory behind a `BlockPool` of `num_blocks` blocks."""

    def __init__(self, model: ModelSpec, num_blocks: int, tokens_per_block: int, dtype: DType, device: str) -> None:
        """Reserve the pool; pages the system maps lazily are not touched before their first use."""
        self.num_blocks = num_blocks
        self.pad_block = num_blocks
        self.tokens_per_block = tokens_per_block
        self.num_kv_heads = model.num_kv_heads
        self.head_dim = model.head_dim
        shape = (model.num_layers, num_blocks + 1, 2, model.num_kv_heads, tokens_per_block, model.head_dim)
        self.storage = torch.empty(shape, dtype=torch_dtype(dtype), device=device)
        self.layers = list(self.storage)
        self.device = torch.device(device)
        self.clear([self.pad_block])

    @property
    def num_bytes(self) -> int:
        """Bytes reserved, the pad block left out."""
        return self.storage[:, : self.num_blocks].numel() * self.storage.element_size()

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero blocks about to be handed out: a previous owner's NaN must not reach the next through a masked slot."""
        if blocks:
            index = torch.tensor(blocks, device=self.device)
            for layer in self.layers:
                _indexable(layer).index_fill_(0, index, 0)

    def clear_slots(self, block_table: Sequence[int], first: int, end: int) -> None:
        """Zero a sequence's slots from `first` up to `end`, which lie in a block or two."""
        size = self.tokens_per_block
        for place in range(first // size, -(-end // size)):
            start = place * size
            inside = slice(max(first - start, 0), min(end - start, size))
            _indexable(self.storage)[:, block_table[place], :, :, inside] = 0

    def put(self, layer: int, index: Tensor, rows_RD: Tensor) -> None:
        """Store rows [R, D] at `index` into `rows(layer)`; an 8-bit cache saturates."""
        stored = self.rows(layer)
        values = rows_RD if rows_RD.dtype is stored.dtype else to_cache_type(rows_RD, stored.dtype)
        _indexable(stored).index_copy_(0, index, _indexable(values))

    def release(self) -> None:
        """Give the memory back; nothing else may be called afterwards."""
        self.layers.clear()
        self.storage = self.storage.new_empty(0)

    def write_rows(self, blocks: np.ndarray, offsets: np.ndarray) -> Tensor:
        """Rows of D elements where tokens go: for each token its H key rows, then its H value rows.

        Args:
            blocks: block of each token, [T].
            offsets: slot inside that block, [T].

        Returns:
            Index [T * 2 * H] into `rows(layer)`.
        """
        heads = np.arange(2 * self.num_kv_heads)
        rows = (blocks[:, None] * (2 * self.num_kv_heads) + heads) * self.tokens_per_block + offsets[:, None]
        return self._index(rows)

    def gather_rows(self, tables: np.ndarray) -> Tensor:
        """Rows of tokens_per_block * D elements that hold the sequences' keys, then their values.

        Args:
            tables: padded block tables, [B, N].

        Returns:
            Index [2 * B * H * N] into `block_rows(layer)`; what it selects views as [2, B, H, N * tokens_per_block, D].
        """
        sides = np.arange(2)[:, None, None, None]
        heads = np.arange(self.num_kv_heads)[None, None, :, None]
        return self._index((tables[None, :, None, :] * 2 + sides) * self.num_kv_heads + heads)

    def rows(self, layer: int) -> Tensor:
        """One layer as rows of one slot of one head, [R, D]."""
        stored: Tensor = self.storage[layer]
        return stored.view(-1, self.head_dim)

    def block_rows(self, layer: int) -> Tensor:
        """One layer as rows of one head of one block, [R, tokens_per_block * D]."""
        stored: Tensor = self.storage[layer]
        return stored.view(-1, self.tokens_per_block * self.head_dim)

    def padded_tables(self, tables: Sequence[Sequence[int]]) -> np.ndarray:
        """Block tables as one array [B, N], short ones filled up with the pad block."""
        width = max(map(len, tables))
        padded = np.full((len(tables), width), self.pad_block, dtype=np.int64)
        for row, table in zip(padded, tables, strict=True):
            row[: len(table)] = table
        return padded

    def read(self, layer: int, block_table: Sequence[int], length: int) -> tuple[Tensor, Tensor]:
        """A copy of one sequence's live keys and values of a layer, each [H, length, D]."""
        index = self.gather_rows(np.asarray([block_table], dtype=np.int64))
        kv = self.block_rows(layer).index_select(0, index)
        keys, values = kv.view(2, self.num_kv_heads, -1, self.head_dim)[:, :, :length]
        return keys, values

    def _index(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows.reshape(-1).astype(np.int64, copy=False)).to(self.device)


def _indexable(stored: Tensor) -> Tensor:
    """`stored` for indexed writes: torch has none for 8-bit floats on a CPU, so those are bytes there."""
    return stored.view(torch.uint8) if stored.dtype is torch.float8_e4m3fn else stored
