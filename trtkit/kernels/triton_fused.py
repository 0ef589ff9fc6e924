# ruff: noqa: ANN001, ANN201, ANN202, PLR0913, PLR0917
# mypy: disable-error-code="no-untyped-def"
"""The Triton kernels behind `trtkit.kernels.fused`; that module says what each computes, and its twins define it.

Imported only where Triton is. All of them move bytes: each input is read once, each result written once, and
intermediate values are rounded where the twins round them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtkit.kernels.arguments import side_by_side
from trtkit.kernels.triton_fp8 import e4m3

_ROW_BLOCK = 8192
"""Elements of a row held in registers at once: Llama 3 70B's hidden size, 16 a thread with 16 warps."""
_SILU_BLOCK = 1024
_EMBED_BLOCK = 2048
_HEAD_TILE = 8


def add_rms_norm(
    delta_TE: Tensor | None, residual_TE: Tensor, weight_E: Tensor, epsilon: float, *, out: Tensor | None = None
) -> Tensor:
    """See `trtkit.kernels.fused.add_rms_norm`."""
    tokens, width = residual_TE.shape
    if out is None:
        out = torch.empty(tokens, width, dtype=residual_TE.dtype, device=residual_TE.device)
    if tokens == 0:
        return out
    if delta_TE is not None and delta_TE.stride(1) != 1:
        delta_TE = delta_TE.contiguous()
    block = min(_ROW_BLOCK, triton.next_power_of_2(width))
    _add_rms_norm[(tokens,)](
        residual_TE if delta_TE is None else delta_TE, residual_TE, weight_E.contiguous(), out,
        0 if delta_TE is None else delta_TE.stride(0), residual_TE.stride(0), out.stride(0), epsilon,
        WIDTH=width, BLOCK=block, HAS_DELTA=delta_TE is not None, num_warps=max(1, min(16, block // 512)),
    )  # fmt: skip
    return out


def silu_mul(gate_up_T2I: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See `trtkit.kernels.fused.silu_mul`."""
    tokens, width = gate_up_T2I.shape[0], gate_up_T2I.shape[1] // 2
    if out is None:
        out = torch.empty(tokens, width, dtype=gate_up_T2I.dtype, device=gate_up_T2I.device)
    if tokens == 0:
        return out
    if gate_up_T2I.stride(1) != 1:
        gate_up_T2I = gate_up_T2I.contiguous()
    _silu_mul[(triton.cdiv(width, _SILU_BLOCK) * tokens,)](
        gate_up_T2I, out, gate_up_T2I.stride(0), out.stride(0), WIDTH=width, BLOCK=_SILU_BLOCK, num_warps=4
    )
    return out


def rope_write(
    qkv_TCD: Tensor,
    positions_T: Tensor,
    cos_PD2: Tensor,
    sin_PD2: Tensor,
    cache_layer: Tensor,
    tables_BM: Tensor,
    rows_T: Tensor | None,
    slots_T: Tensor,
    *,
    num_heads: int,
    q_norm_D: Tensor | None = None,
    k_norm_D: Tensor | None = None,
    epsilon: float = 0.0,
    q_out: Tensor | None = None,
    ring: Tensor | None = None,
    ring_index_T: Tensor | None = None,
) -> Tensor:
    """See `trtkit.kernels.fused.rope_write`."""
    tokens, heads, dim = qkv_TCD.shape
    if q_out is None:
        q_out = torch.empty(tokens, num_heads, dim, dtype=qkv_TCD.dtype, device=qkv_TCD.device)
    if tokens == 0:
        return q_out
    if qkv_TCD.stride(2) != 1 or qkv_TCD.stride(1) != dim:
        qkv_TCD = qkv_TCD.contiguous()
    positions_T, slots_T = positions_T.contiguous(), slots_T.contiguous()
    cos_PD2, sin_PD2, tables_BM = cos_PD2.contiguous(), sin_PD2.contiguous(), side_by_side(tables_BM)
    has_norm = q_norm_D is not None and k_norm_D is not None
    fp8 = cache_layer.dtype is torch.float8_e4m3fn
    if ring is None or ring_index_T is None:
        ring, ring_index_T, has_ring = q_out, slots_T, False
    else:
        has_ring = True
    _rope_write[(tokens, triton.cdiv(heads, _HEAD_TILE))](
        qkv_TCD, positions_T, cos_PD2, sin_PD2, q_out, cache_layer.view(torch.uint8) if fp8 else cache_layer, tables_BM,
        slots_T if rows_T is None else rows_T.contiguous(), slots_T, ring, ring_index_T.contiguous(),
        cos_PD2 if q_norm_D is None else q_norm_D.contiguous(), cos_PD2 if k_norm_D is None else k_norm_D.contiguous(),
        qkv_TCD.stride(0), cache_layer.stride(0), cache_layer.stride(1), cache_layer.stride(2), cache_layer.stride(3),
        tables_BM.stride(0), ring.stride(0), epsilon,
        HEADS=heads, QUERY_HEADS=num_heads, KV_HEADS=cache_layer.shape[2], DIM=dim,
        HALF_PAD=triton.next_power_of_2(dim // 2), SIZE=cache_layer.shape[3], HEAD_TILE=_HEAD_TILE,
        HAS_ROWS=rows_T is not None, HAS_RING=has_ring, HAS_NORM=has_norm,
        FP8=fp8, num_warps=2,
    )  # fmt: skip
    return q_out


def embed(token_ids_T: Tensor, table_VE: Tensor, *, out: Tensor | None = None) -> Tensor:
    """See `trtkit.kernels.fused.embed`."""
    tokens, (vocab_size, width) = token_ids_T.shape[0], table_VE.shape
    if out is None:
        out = torch.empty(tokens, width, dtype=table_VE.dtype, device=table_VE.device)
    if tokens == 0:
        return out
    _embed[(tokens, triton.cdiv(width, _EMBED_BLOCK))](
        token_ids_T.contiguous(),
        table_VE,
        out,
        table_VE.stride(0),
        out.stride(0),
        vocab_size,
        WIDTH=width,
        BLOCK=_EMBED_BLOCK,
    )
    return out


@triton.jit
def _add_rms_norm(
    delta, residual, weight, out, stride_delta, stride_residual, stride_out, epsilon,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, HAS_DELTA: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    kind = residual.dtype.element_ty
    lane = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    row = tl.zeros([BLOCK], tl.float32)
    # Asked for before the sum, so that one trip to memory serves both; a longer row asks for its pieces later.
    gain = tl.load(weight + lane, mask=lane < WIDTH, other=0.0).to(tl.float32)
    for first in tl.static_range(0, WIDTH, BLOCK):
        at = first + lane
        inside = at < WIDTH
        row = tl.load(residual + token * stride_residual + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_DELTA:
            added = tl.load(delta + token * stride_delta + at, mask=inside, other=0.0).to(tl.float32)
            row = rounded(row + added, residual)
            tl.store(residual + token * stride_residual + at, row.to(kind), mask=inside)
        squares += row * row
    scale = tl.math.rsqrt(tl.sum(squares, 0) / WIDTH + epsilon)
    for first in tl.static_range(0, WIDTH, BLOCK):
        at = first + lane
        inside = at < WIDTH
        if WIDTH > BLOCK:  # what did not fit in registers comes back from the cache that was just written
            row = tl.load(residual + token * stride_residual + at, mask=inside, other=0.0).to(tl.float32)
            gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + token * stride_out + at, (rounded(row * scale, residual) * gain).to(kind), mask=inside)


@triton.jit
def _silu_mul(gate_up, out, stride_in, stride_out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    tiles: tl.constexpr = tl.cdiv(WIDTH, BLOCK)
    token = (tl.program_id(0) // tiles).to(tl.int64)
    at = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    gate = tl.load(gate_up + token * stride_in + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * stride_in + WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    active = rounded(gate / (1.0 + tl.exp(-gate)), gate_up)
    tl.store(out + token * stride_out + at, (active * up).to(out.dtype.element_ty), mask=inside)


# A prompt's piece may begin at any token, and steps differ in columns: neither may ask for another compilation.
@triton.jit(
    do_not_specialize=["stride_table"],
    do_not_specialize_on_alignment=["positions", "tables", "rows", "slots", "ring_index"],
)
def _rope_write(
    qkv, positions, cosines, sines, q_out, cache, tables, rows, slots, ring, ring_index, q_norm, k_norm,
    stride_token, stride_block, stride_kv, stride_head, stride_slot, stride_table, stride_ring, epsilon,
    HEADS: tl.constexpr, QUERY_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    HALF_PAD: tl.constexpr, SIZE: tl.constexpr, HEAD_TILE: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_RING: tl.constexpr, HAS_NORM: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    # A program owns a token and a tile of heads of any kind; masks send each head where its kind goes.
    token = tl.program_id(0)
    head = tl.program_id(1) * HEAD_TILE + tl.arange(0, HEAD_TILE)[:, None]
    half = tl.arange(0, HALF_PAD)[None, :]
    inside = (head < HEADS) & (half < DIM // 2)
    source = qkv + token.to(tl.int64) * stride_token + head * DIM + half
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + DIM // 2, mask=inside, other=0.0).to(tl.float32)
    is_query, is_value = head < QUERY_HEADS, head >= QUERY_HEADS + KV_HEADS
    upper, lower = first, second
    if HAS_NORM:
        scale = tl.math.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / DIM + epsilon)[:, None]
        upper = _scaled(first, scale, q_norm, k_norm, is_query, half, DIM // 2, qkv)
        lower = _scaled(second, scale, q_norm + DIM // 2, k_norm + DIM // 2, is_query, half, DIM // 2, qkv)
    angle = tl.load(positions + token).to(tl.int64) * (DIM // 2) + half
    cos = tl.load(cosines + angle, mask=half < DIM // 2, other=0.0).to(tl.float32)
    sin = tl.load(sines + angle, mask=half < DIM // 2, other=0.0).to(tl.float32)
    upper, lower = (
        rounded(rounded(upper * cos, qkv) - lower * sin, qkv),
        rounded(rounded(lower * cos, qkv) + upper * sin, qkv),
    )
    queries = inside & is_query
    _store_halves(q_out + (token.to(tl.int64) * QUERY_HEADS + head) * DIM + half, upper, lower, queries, DIM // 2)
    if HAS_RING:
        place = tl.load(ring_index + token).to(tl.int64) + tl.zeros_like(head)
        target = ring + place * stride_ring + head * DIM + half
        _store_halves(target, upper, lower, queries & (place >= 0), DIM // 2)
    slot = tl.load(slots + token) + tl.zeros_like(head)
    row = token
    if HAS_ROWS:
        row = tl.load(rows + token)
    block = tl.load(tables + row.to(tl.int64) * stride_table + slot // SIZE, mask=slot >= 0, other=0).to(tl.int64)
    side = is_value.to(tl.int32)
    kv_head = head - QUERY_HEADS - side * KV_HEADS
    target = (
        cache + block * stride_block + side * stride_kv + kv_head * stride_head + (slot % SIZE) * stride_slot + half
    )
    upper, lower = tl.where(is_value, first, upper), tl.where(is_value, second, lower)
    if FP8:
        upper, lower = e4m3(upper), e4m3(lower)
    _store_halves(target, upper, lower, inside & (head >= QUERY_HEADS) & (slot >= 0), DIM // 2)


@triton.jit
def _scaled(x, scale, q_norm, k_norm, is_query, half, COUNT: tl.constexpr, like):
    query = tl.load(q_norm + half, mask=half < COUNT, other=0.0).to(tl.float32)
    key = tl.load(k_norm + half, mask=half < COUNT, other=0.0).to(tl.float32)
    return rounded(rounded(x * scale, like) * tl.where(is_query, query, key), like)


@triton.jit
def rounded(x, like):
    """As if stored in the type of `like`; float32."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def _store_halves(target, upper, lower, mask, DISTANCE: tl.constexpr):
    tl.store(target, upper.to(target.dtype.element_ty), mask=mask)
    tl.store(target + DISTANCE, lower.to(target.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=["token_ids"])
def _embed(token_ids, table, out, stride_table, stride_out, vocab_size, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # One identity a lane: the interpreter cannot combine a scalar condition with a block's.
    identity = tl.load(token_ids + token).to(tl.int64) + tl.zeros_like(at)
    known = (identity >= 0) & (identity < vocab_size)
    row = tl.load(table + identity * stride_table + at, mask=known & (at < WIDTH), other=0.0)
    tl.store(out + token * stride_out + at, row, mask=at < WIDTH)
