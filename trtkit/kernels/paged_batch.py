"""What the operations on a paged KV cache take: where the live tokens lie, and which queries ask.

Shapes: B sequences, R queries of all sequences together, Hq query heads, H KV heads, D head dim, M table columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_SPLITS = 16
"""The last program of a sequence adds up this many results at most: 64 KiB for 8 heads of 128, under 1 us (modeled)."""


@dataclass(frozen=True, kw_only=True)
class PagedBatch:
    """Where the live tokens of B sequences lie in one layer's cache.

    `cache` is [blocks, 2, H, tokens_per_block, D], contiguous. `blocks_BM` (int32) are block tables, `lengths_B`
    (int32) live slots; a table's columns past a sequence's last block are never read.
    """

    cache: Tensor
    blocks_BM: Tensor
    lengths_B: Tensor

    @property
    def tokens_per_block(self) -> int:
        """Slots of a block."""
        return int(self.cache.shape[3])


@dataclass(frozen=True, kw_only=True)
class PagedQueries:
    """Queries of B sequences back to back: `heads_RHD` [R, Hq, D] after rotation, sequence b's in `starts_B1[b:b+2]`.

    `positions_R` (int32) are their positions in the sequence: a query sees the keys at its own position and before.
    """

    heads_RHD: Tensor
    starts_B1: Tensor
    positions_R: Tensor


@dataclass(frozen=True, kw_only=True)
class DecodeWorkspace:
    """What the programs that share a sequence leave for the last of them, who adds it up.

    `partial` fp32 and `lse` fp32 hold one result per (sequence, query head, split); `arrived` (int32, one per
    sequence and KV head) counts and is zero between launches. One workspace serves one stream.
    """

    partial: Tensor
    lse: Tensor
    arrived: Tensor

    @staticmethod
    def empty(rows: int, query_heads: int, head_dim: int, splits: int, device: torch.device) -> DecodeWorkspace:
        """A workspace for at most `rows` sequences in `splits` parts, or any with no larger product of the two."""
        return DecodeWorkspace(
            partial=torch.empty(rows * splits * query_heads * head_dim, dtype=torch.float32, device=device),
            lse=torch.empty(rows * splits * query_heads, dtype=torch.float32, device=device),
            arrived=torch.zeros(rows * splits * query_heads, dtype=torch.int32, device=device),
        )


def decode_splits(rows: int, kv_heads: int, multiprocessors: int) -> int:
    """Parts that decode attention cuts each of `rows` sequences into, so that every multiprocessor has work.

    Four programs a multiprocessor let short and long sequences even out; a power of two keeps compiled variants few.
    """
    wanted = max(1, 4 * multiprocessors // max(1, rows * kv_heads))
    return int(min(MAX_SPLITS, 1 << (wanted.bit_length() - 1)))


def gather_sequence(batch: PagedBatch, index: int) -> Tensor:
    """Keys and values of one sequence in slot order, a copy [2, H, length, D]."""
    length = int(batch.lengths_B[index])
    blocks = batch.blocks_BM[index, : math.ceil(length / batch.tokens_per_block)].to(torch.int64)
    return batch.cache[blocks].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
