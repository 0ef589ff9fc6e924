"""The Llama family's forward pass through `trtkit.kernels`, over a step as laid out for the device.

The same arithmetic as `trtkit.engine.llama`, fused: what a kernel does in one pass is there several operators. Axes in
names: T tokens of the step, B rows that feed one token, E hidden size, C heads of the fused projection, D head dim,
R rows that sample, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trtkit.engine.device.layout import DeviceRow, DeviceStep, PromptCall
from trtkit.engine.device.rings import DeviceRings
from trtkit.engine.device.segments import Segment
from trtkit.engine.paged_cache import PagedCache
from trtkit.engine.rope import RopeTable
from trtkit.engine.weights import LayerWeights, Linear, ModelWeights
from trtkit.kernels.fused import add_rms_norm, add_rms_norm_fp8, embed, rope_write, silu_mul, silu_mul_fp8
from trtkit.kernels.matmul import fp8_linear, fp8_product, linear, multiplies_fp8
from trtkit.kernels.paged import DecodeWorkspace, PagedBatch, paged_decode_attention, paged_prefill_attention


class SegmentObserver(Protocol):
    """What a forward pass tells eviction."""

    def after_segment(self, layer: int, row: DeviceRow, segment: Segment, q_THD: Tensor, lse_TH: Tensor) -> None:
        """A segment was written and attended at `layer`: queries [count, Hq, D] and their log-sum-exp [count, Hq]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """What a forward pass works with."""

    weights: ModelWeights
    rope: RopeTable
    cache: PagedCache
    workspace: DecodeWorkspace
    rings: DeviceRings | None = None
    observer: SegmentObserver | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Rows:
    """Activations as an FP8 product takes them, and the compute type they came from."""

    rows_TI: Tensor
    scale_T1: Tensor
    dtype: torch.dtype


def product(matrix: Linear, x_TI: Tensor | Fp8Rows, out: Tensor | None = None) -> Tensor:
    """A matrix of the model times activations, [T, out]; the weight is plain, not from `pack`."""
    if isinstance(x_TI, Fp8Rows):
        assert matrix.scale is not None, "rows are quantised for quantised weights only"
        operands = (x_TI.rows_TI, x_TI.scale_T1, matrix.weight, matrix.scale, matrix.bias)
        return fp8_product(*operands, x_TI.dtype, out=out)
    if matrix.scale is not None and matrix.weight.dtype is torch.float8_e4m3fn:
        return fp8_linear(x_TI, matrix.weight, matrix.scale, matrix.bias, out=out)
    if matrix.apart:
        joined = torch.cat([product(part, x_TI) for part in matrix.apart], dim=1)
        return joined if out is None else out.copy_(joined)
    return linear(matrix.scaled(x_TI), matrix.weight, matrix.scale, matrix.bias, zero=matrix.zero, out=out)


def forward(parts: Parts, step: DeviceStep, token_ids_T: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states of the step's tokens: the residual [T, E] and what is still to be added to it, [T, E].

    Keys and values go into the cache, queries of decode rows into the rings.
    """
    weights = parts.weights
    epsilon = weights.model.norm_epsilon
    residual_TE = embed(token_ids_T, weights.embedding)
    delta_TE: Tensor | None = None
    for index, layer in enumerate(weights.layers):
        h_TE = _normed(delta_TE, residual_TE, layer.input_norm, epsilon, layer.qkv)
        delta_TE = product(layer.dense, _attention(parts, step, layer, index, product(layer.qkv, h_TE)))
        h_TE = _normed(delta_TE, residual_TE, layer.post_norm, epsilon, layer.gate_up)
        delta_TE = product(layer.down, _activated(product(layer.gate_up, h_TE), layer.down))
    assert delta_TE is not None, "a model has at least one layer"
    return residual_TE, delta_TE


def logits(weights: ModelWeights, residual_RE: Tensor, delta_RE: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Logits of selected tokens in the compute type, [R, V]; `residual_RE` is changed."""
    h_RE = add_rms_norm(delta_RE, residual_RE, weights.final_norm, weights.model.norm_epsilon)
    return linear(h_RE, weights.lm_head, out=out)


def _normed(
    delta_TE: Tensor | None, residual_TE: Tensor, weight_E: Tensor, epsilon: float, matrix: Linear
) -> Tensor | Fp8Rows:
    """The residual with `delta_TE` added, normed, as `matrix` takes it."""
    if not multiplies_fp8(residual_TE.shape[0], matrix.weight):
        return add_rms_norm(delta_TE, residual_TE, weight_E, epsilon)
    rows_TE, scale_T1 = add_rms_norm_fp8(delta_TE, residual_TE, weight_E, epsilon)
    return Fp8Rows(rows_TI=rows_TE, scale_T1=scale_T1, dtype=residual_TE.dtype)


def _activated(gate_up_T2I: Tensor, matrix: Linear) -> Tensor | Fp8Rows:
    """SiLU of the gate times up, as `matrix` takes it."""
    if not multiplies_fp8(gate_up_T2I.shape[0], matrix.weight):
        return silu_mul(gate_up_T2I)
    rows_TI, scale_T1 = silu_mul_fp8(gate_up_T2I)
    return Fp8Rows(rows_TI=rows_TI, scale_T1=scale_T1, dtype=gate_up_T2I.dtype)


def _attention(parts: Parts, step: DeviceStep, layer: LayerWeights, index: int, qkv_TC: Tensor) -> Tensor:
    """Attention output of the step, [T, Hq * D], from its fused projection."""
    model, tokens = parts.weights.model, qkv_TC.shape[0]
    qkv_TCD = qkv_TC.view(tokens, -1, model.head_dim)
    shape = (tokens, model.num_heads, model.head_dim)
    q_THD, out_THD = qkv_TC.new_empty(shape), qkv_TC.new_empty(shape)
    _write(parts, step, layer, index, qkv_TCD, slice(0, step.plain_tokens), q_THD)
    cache = parts.cache.layers[index]
    if step.num_decode:
        decode = slice(0, step.num_decode)
        paged_decode_attention(
            q_THD[decode],
            PagedBatch(cache=cache, blocks_BM=step.tables_RM[decode], lengths_B=step.lengths_B),
            out=out_THD[decode],
            workspace=parts.workspace,
            ring_lse=None if parts.rings is None else parts.rings.lse_LPH[index],
            ring_index_B=None if parts.rings is None else step.ring_T[decode],
        )
    for call in step.calls:
        _attend_prompt(parts, step, layer, index, call, qkv_TCD, q_THD, out_THD)
    return out_THD.view(tokens, -1)


def _attend_prompt(  # noqa: PLR0913, PLR0917 - one layer's share of one call, all of it needed
    parts: Parts,
    step: DeviceStep,
    layer: LayerWeights,
    index: int,
    call: PromptCall,
    qkv_TCD: Tensor,
    q_THD: Tensor,
    out_THD: Tensor,
) -> None:
    """One attention call; a segment's keys are written here, for the segment before may have been evicted only now."""
    if call.segment is not None:
        _write(parts, step, layer, index, qkv_TCD, call.tokens, q_THD)
    queries = q_THD[call.tokens]
    batch = PagedBatch(cache=parts.cache.layers[index], blocks_BM=call.tables_PM, lengths_B=call.lengths_P)
    _, lse_TH = paged_prefill_attention(
        queries, call.starts_P1, call.cached_P, batch, max_count=call.max_count, out=out_THD[call.tokens]
    )
    if call.segment is not None and call.row is not None and parts.observer is not None:
        parts.observer.after_segment(index, call.row, call.segment, queries, lse_TH)


def _write(  # noqa: PLR0913, PLR0917 - see `_attend_prompt`
    parts: Parts,
    step: DeviceStep,
    layer: LayerWeights,
    index: int,
    qkv_TCD: Tensor,
    tokens: slice,
    q_THD: Tensor,
) -> None:
    """Rotate, write keys and values, keep queries in the ring; the step's tokens `tokens` alone."""
    if tokens.start == tokens.stop:
        return
    rope_write(
        qkv_TCD[tokens],
        step.positions_T[tokens],
        parts.rope.cos,
        parts.rope.sin,
        parts.cache.layers[index],
        step.tables_RM,
        None if step.rows_T is None else step.rows_T[tokens],
        step.slots_T[tokens],
        num_heads=parts.weights.model.num_heads,
        q_norm_D=layer.q_norm,
        k_norm_D=layer.k_norm,
        epsilon=parts.weights.model.norm_epsilon,
        q_out=q_THD[tokens],
        ring=None if parts.rings is None else parts.rings.queries_LPHD[index],
        ring_index_T=None if parts.rings is None else step.ring_T[tokens],
    )
