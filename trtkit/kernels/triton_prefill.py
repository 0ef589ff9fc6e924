# ruff: noqa: ANN001, ANN202, PLR0913, PLR0917
# mypy: disable-error-code="no-untyped-def"
"""Prefill attention over a paged cache; `trtkit.kernels.paged` says what it computes, and its twin defines it.

Imported only where Triton is. A program owns a tile of (query, head of the group) rows of one KV head: a group shares
its keys and values, and short pieces of a prompt fill tiles too. Only the tiles of keys that meet the causal diagonal
are masked.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtkit.kernels.arguments import side_by_side
from trtkit.kernels.paged_batch import PagedBatch
from trtkit.kernels.triton_tiles import LOG2_E, as_product, autotuned, key_offsets, padded, product_type, readable


def paged_prefill_attention(
    queries_RHD: Tensor,
    starts_B1: Tensor,
    cached_B: Tensor,
    batch: PagedBatch,
    *,
    max_count: int,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `trtkit.kernels.paged.paged_prefill_attention`."""
    rows, query_heads, dim = queries_RHD.shape
    _, _, kv_heads, block, _ = batch.cache.shape
    queries = queries_RHD.contiguous()
    out = torch.empty_like(queries) if out is None else out
    lse = torch.empty(rows, query_heads, dtype=torch.float32, device=queries.device) if lse is None else lse
    sequences = cached_B.shape[0]
    if rows == 0 or sequences == 0 or max_count == 0:
        return out, lse
    group = query_heads // kv_heads
    tables = side_by_side(batch.blocks_BM)

    def grid(chosen):
        return triton.cdiv(max_count * group, chosen["ROWS"]), kv_heads, sequences

    _prefill[grid](
        queries, readable(batch.cache), tables, starts_B1.contiguous(), cached_B.contiguous(), out, lse,
        tables.stride(0), LOG2_E / math.sqrt(dim),
        HEADS=kv_heads, GROUP=group, DIM=dim, DIM_PAD=padded(dim), BLOCK=block, SIDES=2,
        DOT=product_type(queries.dtype, batch.cache.dtype),
    )  # fmt: skip
    return out, lse


_CONFIGS = [
    triton.Config({"ROWS": 128, "TILE": 64}, num_warps=8, num_stages=5),
    triton.Config({"ROWS": 128, "TILE": 128}, num_warps=8, num_stages=3),
    triton.Config({"ROWS": 64, "TILE": 64}, num_warps=4, num_stages=3),
    triton.Config({"ROWS": 64, "TILE": 32}, num_warps=4, num_stages=3),
    triton.Config({"ROWS": 64, "TILE": 16}, num_warps=4, num_stages=3),
]
_SPARE = [
    triton.Config({"ROWS": 32, "TILE": 32}, num_warps=4, num_stages=3),
    triton.Config({"ROWS": 16, "TILE": 16}, num_warps=4, num_stages=3),
]


@autotuned(_CONFIGS, spare=_SPARE, key=["HEADS", "GROUP", "DIM", "BLOCK"])
@triton.jit(
    do_not_specialize=["stride_table"], do_not_specialize_on_alignment=["tables", "starts", "cached_lengths", "lse"]
)
def _prefill(
    queries, cache, tables, starts, cached_lengths, out, lse, stride_table, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr,
    SIDES: tl.constexpr, DOT: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # Later rows see more keys; they go first, so that the last programs to run are the short ones.
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    start = tl.load(starts + sequence)
    count = tl.load(starts + sequence + 1) - start
    if first_row < count * GROUP:
        cached = tl.load(cached_lengths + sequence)
        row = first_row + tl.arange(0, ROWS)
        index = row // GROUP
        dim = tl.arange(0, DIM_PAD)
        flat = (start + index).to(tl.int64) * (HEADS * GROUP) + head * GROUP + row % GROUP
        inside = (index < count)[:, None] & (dim < DIM)[None, :]
        query = tl.load(queries + flat[:, None] * DIM + dim[None, :], mask=inside, other=0.0).to(DOT)
        # Every row of the tile sees the slots below `open_end`; none sees `end`.
        end = cached + tl.minimum((first_row + ROWS - 1) // GROUP + 1, count)
        open_end = (cached + first_row // GROUP + 1) // TILE * TILE
        best = tl.full([ROWS], float("-inf"), tl.float32)
        mass = tl.zeros([ROWS], tl.float32)
        weighted = tl.zeros([ROWS, DIM_PAD], tl.float32)
        table = tables + sequence * stride_table
        best, mass, weighted = _attend(
            query, cache, table, 0, open_end, cached + index, head, scale, best, mass, weighted,
            False, HEADS, DIM, DIM_PAD, BLOCK, DOT, TILE,
        )  # fmt: skip
        best, mass, weighted = _attend(
            query, cache, table, open_end, end, cached + index, head, scale, best, mass, weighted,
            True, HEADS, DIM, DIM_PAD, BLOCK, DOT, TILE,
        )  # fmt: skip
        result = weighted / mass[:, None]
        tl.store(out + flat[:, None] * DIM + dim[None, :], result.to(out.dtype.element_ty), mask=inside)
        tl.store(lse + flat, (best + tl.log2(mass)) * 0.6931471805599453, mask=index < count)


@triton.jit
def _attend(
    query, cache, table, begin, end, last_seen, head, scale, best, mass, weighted,
    MASKED: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr,
    DOT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Online softmax over the slots from `begin` (a multiple of TILE) to `end`; base 2."""
    dim = tl.arange(0, DIM_PAD)
    for first in range(begin, end, TILE):
        slot = first + tl.arange(0, TILE)
        at = cache + key_offsets(table, first, end, head, HEADS, BLOCK, DIM, TILE)[:, None] + dim[None, :]
        readable = (slot < end)[:, None] & (dim < DIM)[None, :]
        key = tl.load(at, mask=readable, other=0.0)
        value = tl.load(at + HEADS * BLOCK * DIM, mask=readable, other=0.0)
        logits = tl.dot(query, tl.trans(as_product(key, DOT)), input_precision="tf32x3")
        if MASKED:
            logits = tl.where(slot[None, :] <= last_seen[:, None], logits, float("-inf"))
        higher = tl.maximum(best, tl.max(logits, 1) * scale)
        shrink = tl.exp2(best - higher)
        weight = tl.exp2(logits * scale - higher[:, None])
        mass = mass * shrink + tl.sum(weight, 1)
        weighted = tl.dot(weight.to(DOT), as_product(value, DOT), weighted * shrink[:, None], input_precision="tf32x3")
        best = higher
    return best, mass, weighted
