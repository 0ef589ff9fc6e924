"""The element-wise work between matrix products, fused: torch twins, which define it, and the choice of the kernel.

Shapes: T tokens, E hidden size, I intermediate size, V vocabulary, C = Hq + 2 H heads of the fused projection (queries,
keys, values), D head dim, P positions of the rotary table, B rows of a step, M columns of a block table. A cache layer
is [blocks, 2, H, tokens_per_block, D], index 0 keys and 1 values.

The twins round where the embedded engine rounds: sums of squares, SiLU and each step of the rotation are computed in
float32 and rounded to the activations' type, so a bfloat16 model writes the same tokens through either.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from trtkit.kernels.dispatch import has_fp8, use_triton
from trtkit.kernels.fused_arguments import check_embed, check_gate, check_norm, check_rope, check_rope_results
from trtkit.kernels.matmul import quantise_rows_fp8

FP8_MAX = 448.0
"""Largest float8_e4m3fn; torch's own cast turns what is larger into NaN."""

_FAMILY = "fused"

FP8_ROWS = "fused_fp8"
"""What switches the kernels that quantise rows off; two kernels then do the work of each."""


def add_rms_norm(
    delta_TE: Tensor | None, residual_TE: Tensor, weight_E: Tensor, epsilon: float, *, out: Tensor | None = None
) -> Tensor:
    """`residual_TE += delta_TE` in place, rounded to its type; then its root-mean-square norm times `weight_E`.

    Args:
        delta_TE: [T, E] in the residual's type, or None where nothing is to be added.
        residual_TE: [T, E], contiguous rows.
        weight_E: [E] in the same type.
        epsilon: added to the mean of squares.
        out: [T, E], may be `delta_TE`.

    Returns:
        The norm, [T, E].
    """
    check_norm(delta_TE, residual_TE, weight_E, out)
    if use_triton(residual_TE, _FAMILY):
        from trtkit.kernels import triton_fused

        return triton_fused.add_rms_norm(delta_TE, residual_TE, weight_E, epsilon, out=out)
    if delta_TE is not None:
        residual_TE.add_(delta_TE)
    return _into(out, rms_norm_twin(residual_TE, weight_E, epsilon))


def silu_mul(gate_up_T2I: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`silu(gate) * up` of the fused projection [T, 2 I], gate first: [T, I]."""
    check_gate(gate_up_T2I, out)
    if use_triton(gate_up_T2I, _FAMILY):
        from trtkit.kernels import triton_fused

        return triton_fused.silu_mul(gate_up_T2I, out=out)
    gate, up = gate_up_T2I.chunk(2, dim=-1)
    return _into(out, F.silu(gate).mul_(up))


def add_rms_norm_fp8(
    delta_TE: Tensor | None, residual_TE: Tensor, weight_E: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """`quantise_rows_fp8(add_rms_norm(...))` in one pass; arguments as there.

    Returns:
        The norm, rounded to the residual's type and then quantised: float8_e4m3fn [T, E] and fp32 scales [T, 1].
    """
    check_norm(delta_TE, residual_TE, weight_E, None)
    if _quantises_at_once(residual_TE):
        from trtkit.kernels import triton_fused_fp8

        if residual_TE.shape[1] <= triton_fused_fp8.MAX_NORM_WIDTH:
            return triton_fused_fp8.add_rms_norm_fp8(delta_TE, residual_TE, weight_E, epsilon)
    return quantise_rows_fp8(add_rms_norm(delta_TE, residual_TE, weight_E, epsilon))


def silu_mul_fp8(gate_up_T2I: Tensor) -> tuple[Tensor, Tensor]:
    """`quantise_rows_fp8(silu_mul(gate_up))` in one pass: float8_e4m3fn [T, I] and fp32 scales [T, 1]."""
    check_gate(gate_up_T2I, None)
    if _quantises_at_once(gate_up_T2I):
        from trtkit.kernels import triton_fused_fp8

        if gate_up_T2I.shape[1] // 2 * gate_up_T2I.element_size() <= triton_fused_fp8.MAX_SILU_BYTES:
            return triton_fused_fp8.silu_mul_fp8(gate_up_T2I)
    return quantise_rows_fp8(silu_mul(gate_up_T2I))


def rope_write(  # noqa: PLR0913, PLR0917 - one pass over the projection replaces five kernels, each with its operands
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
    """Rotate queries and keys, write keys and values to the paged cache, and queries to the ring.

    Halves are rotated against each other (element i with i + D/2). `qkv_TCD` itself is left as it is.

    Args:
        qkv_TCD: the fused projection, [T, Hq + 2 H, D].
        positions_T: int32, logical position of each token.
        cos_PD2: [P, D/2] in the projection's type; `sin_PD2` likewise.
        cache_layer: one layer's cache; float8_e4m3fn saturates at 448, NaN stays NaN.
        tables_BM: int32.
        rows_T: int32, the row of `tables_BM` each token belongs to; None: token t is row t.
        slots_T: int32, where in its sequence's cache a token goes; negative: nowhere.
        num_heads: Hq.
        q_norm_D: weight of a norm of each query head before the rotation; `k_norm_D` of key heads; both or none.
        epsilon: of those norms.
        q_out: [T, Hq, D] for the result, contiguous.
        ring: [places, Hq, D] in the projection's type.
        ring_index_T: int32 or int64, the place in `ring` for each token's queries; negative: none.

    Returns:
        Rotated queries, [T, Hq, D], contiguous.
    """
    check_rope(
        qkv_TCD, positions_T, cos_PD2, sin_PD2, cache_layer, tables_BM, rows_T, slots_T, num_heads, (q_norm_D, k_norm_D)
    )
    check_rope_results(qkv_TCD, num_heads, q_out, ring, ring_index_T)
    return _rope_for(qkv_TCD)(
        qkv_TCD, positions_T, cos_PD2, sin_PD2, cache_layer, tables_BM, rows_T, slots_T, num_heads=num_heads,
        q_norm_D=q_norm_D, k_norm_D=k_norm_D, epsilon=epsilon, q_out=q_out, ring=ring, ring_index_T=ring_index_T,
    )  # fmt: skip


def _rope_for(qkv_TCD: Tensor) -> Callable[..., Tensor]:
    if not use_triton(qkv_TCD, _FAMILY):
        return rope_twin
    from trtkit.kernels import triton_fused

    return triton_fused.rope_write


def rope_twin(  # noqa: PLR0913, PLR0917 - as `rope_write`
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
    """Defines `rope_write`; it waits for the device to tell which tokens have a slot."""
    kv_heads = cache_layer.shape[2]
    q_THD, k_THD = qkv_TCD[:, :num_heads], qkv_TCD[:, num_heads:-kv_heads]
    if q_norm_D is not None and k_norm_D is not None:
        q_THD, k_THD = rms_norm_twin(q_THD, q_norm_D, epsilon), rms_norm_twin(k_THD, k_norm_D, epsilon)
    at = positions_T.to(torch.int64)
    cos, sin = cos_PD2.index_select(0, at).unsqueeze(1), sin_PD2.index_select(0, at).unsqueeze(1)
    queries = _into(q_out, _rotated(q_THD, cos, sin))
    _write(_rotated(k_THD, cos, sin), qkv_TCD[:, -kv_heads:], cache_layer, tables_BM, rows_T, slots_T)
    if ring is not None and ring_index_T is not None:
        kept = ring_index_T >= 0
        ring[ring_index_T[kept].to(torch.int64)] = queries[kept]
    return queries


def embed(token_ids_T: Tensor, table_VE: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Rows of the embedding table, [T, E]. Zeros for an id that is no row, such as a sampler's "not a number"."""
    check_embed(token_ids_T, table_VE, out)
    if use_triton(table_VE, _FAMILY):
        from trtkit.kernels import triton_fused

        return triton_fused.embed(token_ids_T, table_VE, out=out)
    known = (token_ids_T >= 0) & (token_ids_T < table_VE.shape[0])
    ids = torch.where(known, token_ids_T, 0).to(torch.int64)
    return _into(out, table_VE.index_select(0, ids).masked_fill_(~known[:, None], 0))


def rms_norm_twin(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm over the last axis, in float32 inside whatever the type outside."""
    if x.dtype is torch.float32:
        return F.rms_norm(x, weight.shape, weight, epsilon)
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def to_cache_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` as the cache stores it."""
    if dtype is torch.float8_e4m3fn:
        return x.clamp(-FP8_MAX, FP8_MAX).to(dtype)
    return x.to(dtype)


def _rotated(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A rotated copy; two roundings an element, like the engine's rotation in place."""
    first, second = x_THD.chunk(2, dim=-1)
    upper = torch.addcmul(first * cos, second, sin, value=-1)
    return torch.cat((upper, torch.addcmul(second * cos, first, sin)), dim=-1)


def _write(
    k_THD: Tensor, v_THD: Tensor, cache_layer: Tensor, tables_BM: Tensor, rows_T: Tensor | None, slots_T: Tensor
) -> None:
    """Keys and values of the tokens with a slot into the cache."""
    tokens = (slots_T >= 0).nonzero().squeeze(1)
    slots = slots_T[tokens].to(torch.int64)
    rows = tokens if rows_T is None else rows_T[tokens].to(torch.int64)
    size = cache_layer.shape[3]
    blocks = tables_BM[rows, slots // size].to(torch.int64)
    kv_T2HD = to_cache_type(torch.stack((k_THD[tokens], v_THD[tokens]), dim=1), cache_layer.dtype)
    if cache_layer.element_size() == 1:  # torch cannot index every 8-bit float on every device; bytes it can
        cache_layer, kv_T2HD = cache_layer.view(torch.uint8), kv_T2HD.view(torch.uint8)
    cache_layer[blocks, :, :, slots % size] = kv_T2HD


def _quantises_at_once(x: Tensor) -> bool:
    return use_triton(x, _FAMILY) and use_triton(x, FP8_ROWS) and has_fp8(x.device)


def _into(out: Tensor | None, result: Tensor) -> Tensor:
    return result if out is None else out.copy_(result)
