# ruff: noqa: ANN001, ANN202, PLR0913, PLR0917
# mypy: disable-error-code="no-untyped-def"
"""Scores over all layers of one sequence; `trtkit.kernels.paged` says what they are, and a twin defines them.

Imported only where Triton is. A program owns a tile of keys of one (layer, KV head) and walks the queries: keys are
read once, nothing is added atomically, and the sum is the same every time.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtkit.kernels.triton_tiles import LOG2_E, as_product, autotuned, key_offsets, padded, product_type, readable


def score_layers(
    queries_LRHD: Tensor,
    lse_LRH: Tensor,
    weights_R: Tensor,
    storage: Tensor,
    table_M: Tensor,
    length: int,
    positions_LHN: Tensor,
    query_positions_R: Tensor,
    *,
    out: Tensor | None = None,
    carry: float = 0.0,
) -> Tensor:
    """See `trtkit.kernels.paged.score_layers`; `storage` holds the chosen layers only."""
    layers, blocks, _, kv_heads, block, dim = storage.shape
    count, query_heads = queries_LRHD.shape[1:3]
    if out is None:
        out, carry = torch.empty(layers, kv_heads, length, dtype=torch.float32, device=storage.device), 0.0
    if layers == 0 or length == 0:
        return out
    queries = _layers_apart(queries_LRHD, query_heads * dim)
    normal = _layers_apart(lse_LRH, query_heads)

    def grid(chosen):
        return triton.cdiv(length, chosen["TILE"]), kv_heads, layers

    _score[grid](
        queries, normal, weights_R.contiguous(), query_positions_R.contiguous(), readable(storage),
        table_M.contiguous(), positions_LHN, out, count, length, carry, LOG2_E / math.sqrt(dim),
        queries.stride(0) // (query_heads * dim), normal.stride(0) // query_heads, blocks,
        positions_LHN.stride(0), positions_LHN.stride(1), out.stride(0), out.stride(1),
        HEADS=kv_heads, GROUP=query_heads // kv_heads, DIM=dim, DIM_PAD=padded(dim), BLOCK=block,
        SIDES=1, CARRY=carry != 0.0, SKIP=count >= _SKIP_FROM, DOT=product_type(queries_LRHD.dtype, storage.dtype),
    )  # fmt: skip
    return out


def _layers_apart(of_queries: Tensor, width: int) -> Tensor:
    """[L, R, ...] of which only layers lie apart, by whole queries of `width` elements, as in a ring; else a copy."""
    whole = of_queries.shape[0] <= 1 or of_queries.stride(0) % width == 0
    return of_queries if whole and of_queries[0].is_contiguous() else of_queries.contiguous()


_CONFIGS = [
    triton.Config({"TILE": 128, "QUERIES": 64}, num_warps=4, num_stages=3),
    triton.Config({"TILE": 64, "QUERIES": 16}, num_warps=4, num_stages=4),
]
"""One for Hopper, and one where products need registers (older GPUs, fp32): a round of eviction waits for no tuning."""
_SPARE = [
    triton.Config({"TILE": 32, "QUERIES": 16}, num_warps=4, num_stages=3),
    triton.Config({"TILE": 16, "QUERIES": 16}, num_warps=4, num_stages=2),
]
_SKIP_FROM = 128
"""Queries from which it pays to look for the first that sees a tile of keys: pieces of prompts, not rings."""
_FREE = [
    "count", "length", "carry", "places", "lse_places", "blocks", "stride_position", "stride_position_head", "stride_out",
    "stride_out_head",
]  # fmt: skip

_ANYWHERE = ["lse", "weights", "asked", "table", "positions", "out"]


# Tuning runs the kernel often; what it adds to must be as it was each time.
@autotuned(_CONFIGS, spare=_SPARE, key=["HEADS", "GROUP", "DIM", "BLOCK"], restore_value=["out"])
@triton.jit(do_not_specialize=_FREE, do_not_specialize_on_alignment=_ANYWHERE)
def _score(
    queries, lse, weights, asked, cache, table, positions, out,
    count, length, carry, scale,
    places, lse_places, blocks, stride_position, stride_position_head, stride_out, stride_out_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr,
    SIDES: tl.constexpr, CARRY: tl.constexpr, SKIP: tl.constexpr, DOT: tl.constexpr,
    TILE: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * TILE
    head = tl.program_id(1)
    layer = tl.program_id(2).to(tl.int64)
    slot = first + tl.arange(0, TILE)
    live = slot < length
    dim = tl.arange(0, DIM_PAD)
    at = layer * blocks * (2 * HEADS * BLOCK * DIM) + key_offsets(table, first, length, head, HEADS, BLOCK, DIM, TILE)
    key = tl.load(cache + at[:, None] + dim[None, :], mask=live[:, None] & (dim < DIM)[None, :], other=0.0)
    key = tl.trans(as_product(key, DOT))
    position = tl.load(
        positions + layer * stride_position + head * stride_position_head + slot, mask=live, other=1 << 30
    )
    first_index = _first_that_sees(asked, count, tl.min(position, 0)) if SKIP else 0
    received = tl.zeros([QUERIES, TILE], tl.float32)
    # Rows run over (query, head of the group) together, so that a group shares the tile of keys.
    for first_row in range(first_index * GROUP // QUERIES * QUERIES, count * GROUP, QUERIES):
        row = first_row + tl.arange(0, QUERIES)
        valid = row < count * GROUP
        index = row // GROUP
        column = index * (HEADS * GROUP) + head * GROUP + row % GROUP
        query = tl.load(
            queries + layer * places * (HEADS * GROUP * DIM) + (column.to(tl.int64) * DIM)[:, None] + dim[None, :],
            mask=valid[:, None] & (dim < DIM)[None, :], other=0.0,
        ).to(DOT)  # fmt: skip
        normal = tl.load(lse + layer * lse_places * (HEADS * GROUP) + column, mask=valid, other=0.0)
        weight = tl.load(weights + index, mask=valid, other=0.0)  # a row that is not there counts nothing
        seen = tl.load(asked + index, mask=valid, other=0)
        logits = tl.dot(query, key, input_precision="tf32x3")
        share = tl.exp2(logits * scale - (normal * 1.4426950408889634)[:, None])
        received += tl.where(position[None, :] <= seen[:, None], share, 0.0) * weight[:, None]
    mass = tl.sum(received, 0)
    place = out + layer * stride_out + head * stride_out_head + slot
    if CARRY:
        mass += carry * tl.load(place, mask=live, other=0.0)
    tl.store(place, mass, mask=live)


@triton.jit
def _first_that_sees(asked, count, oldest):
    """Index of the first query at position `oldest` or later; `count` if there is none.

    In a prompt that nothing was evicted from half of the tiles lie in the past of their keys altogether.
    """
    first = count
    for start in range(0, count, 1024):
        index = start + tl.arange(0, 1024)
        sees = (index < count) & (tl.load(asked + index, mask=index < count, other=0) >= oldest)
        first = tl.minimum(first, tl.min(tl.where(sees, index, count), 0))
    return first
