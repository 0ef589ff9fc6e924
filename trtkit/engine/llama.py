"""The Llama family's forward pass over a step of ragged rows and a paged cache.

Axes in names: T tokens of the step, E hidden size, H KV heads, G query heads per KV head, D head dimension,
S slots, B rows of a decode group, R selected tokens, V vocabulary.

Every cached slot is visible to every later query; causality is needed only inside the chunk being fed. That is
plain causal attention while nothing is evicted, and exactly masked attention afterwards.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trtkit.engine.batch import Batch, DecodeGroup, PrefillRow
from trtkit.engine.matmul import linear
from trtkit.engine.observer import LayerObserver
from trtkit.engine.paged_cache import PagedCache
from trtkit.engine.rope import RopeTable, rotate_
from trtkit.engine.weights import LayerWeights, ModelWeights


def forward(weights: ModelWeights, rope: RopeTable, batch: Batch, observer: LayerObserver | None = None) -> Tensor:
    """Hidden states of the step's tokens before the final norm, [T, E]; keys and values go into the cache."""
    model = weights.model
    x_TE = weights.embedding.index_select(0, batch.token_ids_T)
    cos_sin = rope.at(batch.positions_T)
    for index, layer in enumerate(weights.layers):
        h_TE = rms_norm(x_TE, layer.input_norm, model.norm_epsilon)
        q_THD = _project(layer, h_TE, weights, cos_sin, batch, index)
        o_TQ = _attend(q_THD, batch, index)
        x_TE = x_TE + layer.dense(o_TQ)
        if observer is not None:
            observer.observe(index, q_THD, batch)
        h_TE = rms_norm(x_TE, layer.post_norm, model.norm_epsilon)
        gate, up = layer.gate_up(h_TE).chunk(2, dim=-1)
        x_TE = x_TE + layer.down(F.silu(gate).mul_(up))
    return x_TE


def logits(weights: ModelWeights, x_RE: Tensor) -> Tensor:
    """Logits of selected tokens in float32, [R, V]; only these rows meet the vocabulary matrix."""
    h_RE = rms_norm(x_RE, weights.final_norm, weights.model.norm_epsilon)
    return linear(h_RE, weights.lm_head).float()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm over the last axis, in float32 inside whatever the type outside."""
    if x.dtype is torch.float32:
        return F.rms_norm(x, weight.shape, weight, epsilon)
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)


def _project(
    layer: LayerWeights,
    h_TE: Tensor,
    weights: ModelWeights,
    cos_sin: tuple[Tensor, Tensor],
    batch: Batch,
    index: int,
) -> Tensor:
    """Queries of the step, rotated, [T, H * G, D]; rotated keys and values are written to the cache."""
    model = weights.model
    qkv = layer.qkv(h_TE).view(-1, model.num_heads + 2 * model.num_kv_heads, model.head_dim)
    q_THD, k_THD = qkv[:, : model.num_heads], qkv[:, model.num_heads : -model.num_kv_heads]
    if layer.q_norm is not None and layer.k_norm is not None:
        q_THD.copy_(rms_norm(q_THD, layer.q_norm, model.norm_epsilon))
        k_THD.copy_(rms_norm(k_THD, layer.k_norm, model.norm_epsilon))
    rotate_(qkv[:, : -model.num_kv_heads], *cos_sin)
    batch.cache.put(index, batch.write, qkv[:, model.num_heads :].reshape(-1, model.head_dim))
    return q_THD


def _attend(q_THD: Tensor, batch: Batch, index: int) -> Tensor:
    """Attention output of the step, [T, H * G * D]."""
    tokens, heads, head_dim = q_THD.shape
    out = torch.empty(tokens, heads, head_dim, dtype=q_THD.dtype, device=q_THD.device)
    for group in batch.decode:
        rows = slice(group.start, group.start + group.size)
        out[rows] = _decode_attention(q_THD[rows], group, batch.cache, index)
    for row in batch.prefill:
        rows = slice(row.start, row.start + row.count)
        out[rows] = _prefill_attention(q_THD[rows], row, batch.cache, index)
    return out.view(tokens, -1)


def _decode_attention(q_BHD: Tensor, group: DecodeGroup, cache: PagedCache, index: int) -> Tensor:
    """One query per row over its gathered cache; the query heads of a KV head share it as rows of one matrix."""
    head_dim = q_BHD.shape[-1]
    kv = cache.block_rows(index).index_select(0, group.gather).to(q_BHD.dtype)
    k_NSD, v_NSD = kv.view(2, group.size * cache.num_kv_heads, -1, head_dim)
    q_NGD = q_BHD.reshape(group.size * cache.num_kv_heads, -1, head_dim)
    scores = torch.baddbmm(group.mask_BS, q_NGD, k_NSD.transpose(1, 2), alpha=head_dim**-0.5)
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v_NSD.dtype)
    return torch.bmm(probabilities, v_NSD).view(q_BHD.shape)


def _prefill_attention(q_THD: Tensor, row: PrefillRow, cache: PagedCache, index: int) -> Tensor:
    """A chunk of one sequence: over its cached slots, and causally over itself."""
    heads, head_dim = q_THD.shape[1:]
    kv_heads = cache.num_kv_heads
    kv = cache.block_rows(index).index_select(0, row.gather).to(q_THD.dtype)
    keys, values = kv.view(2, kv_heads, 1, -1, head_dim)[:, :, :, : row.kv_len].expand(
        -1, -1, heads // kv_heads, -1, -1
    )
    q_HGTD = q_THD.transpose(0, 1).view(kv_heads, -1, row.count, head_dim)
    out = F.scaled_dot_product_attention(q_HGTD, keys, values, attn_mask=row.mask_TS, is_causal=row.mask_TS is None)
    return out.flatten(0, 1).transpose(0, 1)
