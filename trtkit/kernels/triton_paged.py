# ruff: noqa: ANN001, ANN202, PLR0913, PLR0917
# mypy: disable-error-code="no-untyped-def"
"""Scores and named moves in one layer of several sequences; `trtkit.kernels.paged` says what they are.

Imported only where Triton is. A program owns all query heads of one KV head, so keys are read once.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtkit.kernels.arguments import side_by_side
from trtkit.kernels.paged_batch import PagedBatch, PagedQueries
from trtkit.kernels.triton_tiles import as_product, padded, product_type, readable

_TILES = {True: (64, 32, 3), False: (16, 16, 2)}
"""Keys, queries and stages of a program, where a key takes at most 256 bytes and where it takes more."""


def score_paged(
    queries: PagedQueries, lse_RH: Tensor, weights_R: Tensor, batch: PagedBatch, positions: Tensor
) -> Tensor:
    """See `trtkit.kernels.paged.score_paged`."""
    _, query_heads, dim = queries.heads_RHD.shape
    sequences, kv_heads, longest = positions.shape
    mass = torch.zeros(positions.shape, dtype=torch.float32, device=lse_RH.device)
    if longest == 0:
        return mass
    dot = product_type(queries.heads_RHD.dtype, batch.cache.dtype)
    keys, rows, stages = _TILES[padded(dim) * (4 if dot == tl.float32 else 2) <= 256]
    tables = side_by_side(batch.blocks_BM)
    _score[(triton.cdiv(longest, keys), kv_heads, sequences)](
        queries.heads_RHD.contiguous(), lse_RH.contiguous(), weights_R.contiguous(), queries.starts_B1.contiguous(),
        queries.positions_R.contiguous(), readable(batch.cache), tables, batch.lengths_B.contiguous(),
        positions.contiguous(), mass, batch.cache.stride(0), batch.cache.stride(2), batch.cache.stride(3),
        tables.stride(0), longest, 1 / math.sqrt(dim),
        HEADS=kv_heads, GROUP=query_heads // kv_heads,
        DIM=dim, DIM_PAD=padded(dim), BLOCK=batch.tokens_per_block,
        DOT=dot, KEY_TILE=keys, QUERY_TILE=rows, num_stages=stages,
    )  # fmt: skip
    return mass


def compact_paged(cache: Tensor, blocks_BM: Tensor, moves_M4: Tensor) -> None:
    """See `trtkit.kernels.paged.compact_paged`."""
    if moves_M4.shape[0] == 0:
        return
    dim = cache.shape[4]
    stored, tables = readable(cache), side_by_side(blocks_BM)
    _compact[(moves_M4.shape[0], 2)](
        stored, tables, moves_M4.contiguous(),
        cache.stride(0), cache.stride(1), cache.stride(2), cache.stride(3), tables.stride(0),
        DIM=dim, DIM_PAD=triton.next_power_of_2(dim), BLOCK=cache.shape[3],
    )  # fmt: skip


@triton.jit
def _score(
    queries, lse, weights, starts, query_positions, cache, tables, lengths, key_positions, mass,
    stride_block, stride_head, stride_slot, stride_table, longest, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr,
    DOT: tl.constexpr, KEY_TILE: tl.constexpr, QUERY_TILE: tl.constexpr,
):  # fmt: skip
    # One program owns a tile of keys and walks the queries: no atomics, so the sum is the same every time.
    sequence = tl.program_id(2)
    head = tl.program_id(1)
    slot = tl.program_id(0) * KEY_TILE + tl.arange(0, KEY_TILE)
    live = slot < tl.load(lengths + sequence)
    dim = tl.arange(0, DIM_PAD)
    block = tl.load(tables + sequence * stride_table + slot // BLOCK, mask=live, other=0).to(tl.int64)
    at = block * stride_block + head * stride_head + (slot % BLOCK) * stride_slot
    key = tl.load(cache + at[:, None] + dim[None, :], mask=live[:, None] & (dim < DIM)[None, :], other=0.0)
    key = as_product(key, DOT)
    place = (sequence * HEADS + head).to(tl.int64) * longest + slot
    position = tl.load(key_positions + place, mask=live, other=0)
    received = tl.zeros([KEY_TILE], tl.float32)
    start = tl.load(starts + sequence)
    end = tl.load(starts + sequence + 1)
    # Rows run over (query, head of the group) together, so that a group shares the key tile.
    for first in range(start * GROUP, end * GROUP, QUERY_TILE):
        row = first + tl.arange(0, QUERY_TILE)
        valid = row < end * GROUP
        query_index = row // GROUP
        flat = query_index * HEADS * GROUP + head * GROUP + row % GROUP
        query = tl.load(
            queries + flat.to(tl.int64)[:, None] * DIM + dim[None, :],
            mask=valid[:, None] & (dim < DIM)[None, :],
            other=0.0,
        ).to(DOT)
        logits = tl.dot(query, tl.trans(key), input_precision="tf32x3") * scale
        normal = tl.load(lse + flat, mask=valid, other=0.0)
        weight = tl.load(weights + query_index, mask=valid, other=0.0)
        seen_from = tl.load(query_positions + query_index, mask=valid, other=-1)
        visible = valid[:, None] & live[None, :] & (position[None, :] <= seen_from[:, None])
        share = tl.where(visible, tl.exp(logits - normal[:, None]), 0.0)
        received += tl.sum(share * weight[:, None], 0)
    tl.store(mass + place, received, mask=live)


@triton.jit
def _compact(
    cache, tables, moves, stride_block, stride_kv, stride_head, stride_slot, stride_table,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    move = tl.program_id(0)
    sequence = tl.load(moves + move * 4)
    head = tl.load(moves + move * 4 + 1)
    source = tl.load(moves + move * 4 + 2)
    target = tl.load(moves + move * 4 + 3)
    table = tables + sequence * stride_table
    from_block = tl.load(table + source // BLOCK).to(tl.int64)
    to_block = tl.load(table + target // BLOCK).to(tl.int64)
    dim = tl.arange(0, DIM_PAD)
    half = cache + tl.program_id(1) * stride_kv + head * stride_head + dim
    row = tl.load(half + from_block * stride_block + (source % BLOCK) * stride_slot, mask=dim < DIM)
    tl.store(half + to_block * stride_block + (target % BLOCK) * stride_slot, row, mask=dim < DIM)
