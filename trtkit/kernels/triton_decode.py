# ruff: noqa: ANN001, ANN202, PLR0913, PLR0917
# mypy: disable-error-code="no-untyped-def"
"""Decode attention over a paged cache; `trtkit.kernels.paged` says what it computes, and its twin defines it.

Imported only where Triton is. A program owns all query heads of one KV head and a part of one sequence, so keys and
values are read once. The number of parts is fixed by the launch; what a part is follows from the length on the
device. The last program of a sequence adds the parts up, always in their order, so results repeat.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtkit.kernels.arguments import check_workspace, side_by_side
from trtkit.kernels.dispatch import num_multiprocessors
from trtkit.kernels.paged_batch import DecodeWorkspace, PagedBatch, decode_splits
from trtkit.kernels.triton_tiles import (
    LOG2_E,
    MIN_DOT,
    as_product,
    autotuned,
    key_offsets,
    padded,
    product_type,
    readable,
)


def paged_decode_attention(
    queries_BHD: Tensor,
    batch: PagedBatch,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    splits: int | None = None,
    workspace: DecodeWorkspace | None = None,
    ring_lse: Tensor | None = None,
    ring_index_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `trtkit.kernels.paged.paged_decode_attention`."""
    rows, query_heads, dim = queries_BHD.shape
    _, _, kv_heads, block, _ = batch.cache.shape
    device = queries_BHD.device
    queries = queries_BHD.contiguous()
    out = torch.empty_like(queries) if out is None else out
    lse = torch.empty(rows, query_heads, dtype=torch.float32, device=device) if lse is None else lse
    if rows == 0:
        return out, lse
    splits = decode_splits(rows, kv_heads, num_multiprocessors(device)) if splits is None else splits
    if splits > 1 and workspace is None:
        workspace = DecodeWorkspace.empty(rows, query_heads, dim, splits, device)
    if workspace is not None and splits > 1:
        check_workspace(workspace, rows, query_heads, dim, splits)
    partial, partial_lse, arrived = (
        (lse, lse, batch.lengths_B) if workspace is None else (workspace.partial, workspace.lse, workspace.arrived)
    )
    group = query_heads // kv_heads
    shape = (device, queries.dtype, batch.cache.dtype, kv_heads, group, dim, block)
    if shape not in _tuned() and _tunes(device):
        _tuned().add(shape)
        _tune(queries, batch, splits)
    tables = side_by_side(batch.blocks_BM)
    _decode[(splits, kv_heads, rows)](
        queries, readable(batch.cache), tables, batch.lengths_B.contiguous(), out, lse, partial, partial_lse, arrived,
        lse if ring_lse is None else ring_lse, tables if ring_index_B is None else ring_index_B.contiguous(),
        tables.stride(0), LOG2_E / math.sqrt(dim),
        HEADS=kv_heads, GROUP=group, LANES=max(MIN_DOT, triton.next_power_of_2(group)),
        GROUP_PAD=triton.next_power_of_2(group), DIM=dim, DIM_PAD=padded(dim), BLOCK=block, SIDES=2,
        SPLITS=splits, SPLITS_PAD=triton.next_power_of_2(splits), HAS_RING=ring_lse is not None,
        DOT=product_type(queries.dtype, batch.cache.dtype),
    )  # fmt: skip
    return out, lse


_CONFIGS = [
    triton.Config({"TILE": 64}, num_warps=4, num_stages=5),
    triton.Config({"TILE": 64}, num_warps=4, num_stages=7),
    triton.Config({"TILE": 32}, num_warps=4, num_stages=7),
    triton.Config({"TILE": 128}, num_warps=8, num_stages=5),
]
_SPARE = [
    triton.Config({"TILE": 32}, num_warps=4, num_stages=3),
    triton.Config({"TILE": 16}, num_warps=4, num_stages=3),
]
_ANYWHERE = ["tables", "lengths", "lse", "partial_lse", "arrived", "ring_lse", "ring_index"]
"""Small tensors, often views into packed ones: kernels must not be compiled again for where they happen to begin."""
_TUNED_LENGTH = 2048


def _tunes(device: torch.device) -> bool:
    return device.type == "cuda"


def _tune(queries: Tensor, batch: PagedBatch, splits: int) -> None:
    """Choose the tile on long sequences in this very cache: the launch that asks may have nothing but padding.

    Nothing is written but what is allocated here.
    """
    blocks, block = batch.cache.shape[0], batch.tokens_per_block
    rows, columns = queries.shape[0], triton.cdiv(_TUNED_LENGTH, block)
    tables = torch.arange(rows * columns, dtype=torch.int32, device=queries.device).remainder(blocks)
    lengths = torch.full((rows,), columns * block, dtype=torch.int32, device=queries.device)
    long = PagedBatch(cache=batch.cache, blocks_BM=tables.view(rows, columns), lengths_B=lengths)
    paged_decode_attention(queries, long, splits=splits)


@cache
def _tuned() -> set[Hashable]:
    """Shapes whose tile is chosen. The number of parts is not in them: what a program does with its part is the same."""
    return set()


@autotuned(_CONFIGS, spare=_SPARE, key=["HEADS", "GROUP", "DIM", "BLOCK"])
@triton.jit(do_not_specialize=["stride_table"], do_not_specialize_on_alignment=_ANYWHERE)
def _decode(
    queries, cache, tables, lengths, out, lse, partial, partial_lse, arrived, ring_lse, ring_index,
    stride_table, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr, SIDES: tl.constexpr,
    SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr, HAS_RING: tl.constexpr, DOT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    length = tl.load(lengths + sequence)
    tiles = tl.cdiv(length, TILE)
    share = tl.cdiv(tiles, SPLITS) * TILE
    begin = split * share
    if (begin < length) | (split == 0):
        end = tl.minimum(begin + share, length)
        row = (sequence * HEADS + head) * GROUP
        best, total, weighted = _part(
            queries + row * DIM, cache, tables + sequence * stride_table, begin, end, head, scale,
            HEADS, GROUP, LANES, DIM, DIM_PAD, BLOCK, DOT, TILE,
        )  # fmt: skip
        # A sequence of no length has neither mass nor maximum: zeros, and -inf as its log-sum-exp. NaN stays NaN.
        total = tl.where(total == 0, 1.0, total)
        result = weighted / total[:, None]
        found = best + tl.log2(total)
        lane = tl.arange(0, LANES)
        dim = tl.arange(0, DIM_PAD)
        inside = (lane < GROUP)[:, None] & (dim < DIM)[None, :]
        place = lane[:, None] * DIM + dim[None, :]
        if share >= length:
            tl.store(out + row * DIM + place, result.to(out.dtype.element_ty), mask=inside)
            _store_lse(lse, ring_lse, ring_index, sequence, head, found, lane, HEADS, GROUP, HAS_RING)
        else:
            slot = (sequence * HEADS + head) * SPLITS + split
            tl.store(partial + slot * (GROUP * DIM) + place, result, mask=inside, cache_modifier=".cg")
            tl.store(partial_lse + slot * GROUP + lane, found, mask=lane < GROUP, cache_modifier=".cg")
            # Every thread's stores come before the count, whose release makes them visible to whoever counts last.
            tl.debug_barrier()
            parts = tl.cdiv(length, share)
            if tl.atomic_add(arrived + sequence * HEADS + head, 1, sem="acq_rel", scope="gpu") == parts - 1:
                tl.debug_barrier()
                tl.store(arrived + sequence * HEADS + head, 0)
                _combine(
                    partial, partial_lse, out, lse, ring_lse, ring_index, sequence, head, parts,
                    HEADS, GROUP, GROUP_PAD, DIM, DIM_PAD, SPLITS, SPLITS_PAD, HAS_RING,
                )  # fmt: skip


@triton.jit
def _part(
    queries, cache, table, begin, end, head, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    BLOCK: tl.constexpr, DOT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Online softmax over the slots from `begin` to `end`: maximum (base 2), mass and weighted values per lane."""
    lane = tl.arange(0, LANES)
    dim = tl.arange(0, DIM_PAD)
    inside = (lane < GROUP)[:, None] & (dim < DIM)[None, :]
    query = tl.load(queries + lane[:, None] * DIM + dim[None, :], mask=inside, other=0.0).to(DOT)
    best = tl.full([LANES], float("-inf"), tl.float32)
    mass = tl.zeros([LANES, TILE], tl.float32)
    weighted = tl.zeros([LANES, DIM_PAD], tl.float32)
    for first in range(begin, end, TILE):
        live = first + tl.arange(0, TILE) < end
        at = cache + key_offsets(table, first, end, head, HEADS, BLOCK, DIM, TILE)[:, None] + dim[None, :]
        readable = live[:, None] & (dim < DIM)[None, :]
        key = tl.load(at, mask=readable, other=0.0)
        value = tl.load(at + HEADS * BLOCK * DIM, mask=readable, other=0.0)
        logits = tl.dot(query, tl.trans(as_product(key, DOT)), input_precision="tf32x3") * scale
        logits = tl.where(live[None, :], logits, float("-inf"))
        higher = tl.maximum(best, tl.max(logits, 1))
        shrink = tl.exp2(best - higher)
        weight = tl.exp2(logits - higher[:, None])
        # Mass is added up slot by slot and summed once at the end: a reduction across warps less per tile.
        mass = mass * shrink[:, None] + weight
        weighted = tl.dot(weight.to(DOT), as_product(value, DOT), weighted * shrink[:, None], input_precision="tf32x3")
        best = higher
    return best, tl.sum(mass, 1), weighted


@triton.jit
def _combine(
    partial, partial_lse, out, lse, ring_lse, ring_index, sequence, head, parts,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr,
    SPLITS: tl.constexpr, SPLITS_PAD: tl.constexpr, HAS_RING: tl.constexpr,
):  # fmt: skip
    """Add up the parts of one sequence and KV head. Loads bypass L1, which may hold what an earlier launch left.

    All parts of a stretch of the head dim are asked for at once, the first stretch together with the weights: one trip
    to L2 instead of one for each part.
    """
    lane = tl.arange(0, GROUP_PAD)
    part = tl.arange(0, SPLITS_PAD)
    slot = (sequence * HEADS + head) * SPLITS
    present = (part < parts)[:, None] & (lane < GROUP)[None, :]
    at = (slot + part)[:, None] * GROUP + lane[None, :]
    stretch: tl.constexpr = min(DIM_PAD, max(16, 16384 // (SPLITS_PAD * GROUP_PAD)))
    every = tl.load(partial_lse + at, mask=present, other=float("-inf"), cache_modifier=".cg")
    value = _stretch(partial, at, present, 0, DIM, stretch)
    # Lanes past the group have no parts at all; 0 and 1 keep them from becoming NaN.
    best = tl.where(lane < GROUP, tl.max(every, 0), 0.0)
    weight = tl.exp2(every - best[None, :])
    total = tl.where(lane < GROUP, tl.sum(weight, 0), 1.0)
    share = weight / total[None, :]
    row = (sequence * HEADS + head) * GROUP
    for first in tl.static_range(0, DIM_PAD, stretch):
        result = tl.sum(value * share[:, :, None], 0)
        dim = first + tl.arange(0, stretch)
        inside = (lane < GROUP)[:, None] & (dim < DIM)[None, :]
        tl.store(out + (row + lane)[:, None] * DIM + dim[None, :], result.to(out.dtype.element_ty), mask=inside)
        if first + stretch < DIM_PAD:
            value = _stretch(partial, at, present, first + stretch, DIM, stretch)
    _store_lse(lse, ring_lse, ring_index, sequence, head, best + tl.log2(total), lane, HEADS, GROUP, HAS_RING)


@triton.jit
def _stretch(partial, at, present, first, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Some columns of all parts, [SPLITS_PAD, GROUP_PAD, WIDTH]."""
    dim = first + tl.arange(0, WIDTH)
    mask = present[:, :, None] & (dim < DIM)[None, None, :]
    return tl.load(partial + at[:, :, None] * DIM + dim[None, None, :], mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def _store_lse(
    lse, ring_lse, ring_index, sequence, head, found, lane,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HAS_RING: tl.constexpr,
):  # fmt: skip
    """Write log-sum-exps given in base 2, in base e, and to the ring where the row is watched."""
    natural = found * 0.6931471805599453
    column = head * GROUP + lane
    tl.store(lse + sequence * HEADS * GROUP + column, natural, mask=lane < GROUP)
    if HAS_RING:
        place = tl.load(ring_index + sequence).to(tl.int64)
        tl.store(ring_lse + place * (HEADS * GROUP) + column, natural, mask=(lane < GROUP) & (lane * 0 + place >= 0))
