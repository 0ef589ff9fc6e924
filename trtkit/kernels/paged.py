"""Operations on a paged KV cache: torch twins, which define them, and the choice of the Triton kernel on CUDA.

Shapes: B sequences, R queries of all sequences together (`starts_B1` bounds them), Hq query heads, H KV heads,
G = Hq / H query heads per KV head, D head dim, M table columns, N = longest sequence. The cache of one layer is
TensorRT-LLM's HND block layout [blocks, 2, H, tokens_per_block, D], index 0 keys and 1 values; keys are rotated.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

_QUERY_TILE = 256


@dataclass(frozen=True, kw_only=True)
class PagedBatch:
    """Where the live tokens of B sequences lie in one layer's cache.

    `blocks_BM` (int32) are block tables, `lengths_B` (int32) live slots; a table's columns past a sequence's last
    block are never read.
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


def use_triton(tensor: Tensor) -> bool:
    """Whether the kernel runs instead of the twin: on CUDA, where Triton is installed."""
    return tensor.is_cuda and importlib.util.find_spec("triton") is not None


def paged_decode_attention(queries_BHD: Tensor, batch: PagedBatch) -> tuple[Tensor, Tensor]:
    """Attention of one query per sequence over all its live slots.

    Returns:
        Output [B, Hq, D] in the queries' type and the natural log-sum-exp of the scaled logits, fp32 [B, Hq].
    """
    if use_triton(queries_BHD):
        from trtkit.kernels import triton_paged

        return triton_paged.paged_decode_attention(queries_BHD, batch)
    return decode_attention_twin(queries_BHD, batch)


def score_paged(
    queries: PagedQueries, lse_RH: Tensor, weights_R: Tensor, batch: PagedBatch, positions: Tensor
) -> Tensor:
    """Attention mass each live key receives from `queries`, summed over the query heads of its KV head.

    Args:
        queries: the queries, with their positions.
        lse_RH: fp32 [R, Hq], log-sum-exp of each query's scaled logits, as attention emitted it.
        weights_R: fp32 [R], what each query's mass counts.
        batch: the cache after the queries' own tokens were written.
        positions: int32 [B, H, N], original position of every live slot.

    Returns:
        fp32 [B, H, N]; zero past a sequence's length.
    """
    if use_triton(lse_RH):
        from trtkit.kernels import triton_paged

        return triton_paged.score_paged(queries, lse_RH, weights_R, batch, positions)
    return score_twin(queries, lse_RH, weights_R, batch, positions)


def compact_paged(cache: Tensor, blocks_BM: Tensor, moves_M4: Tensor) -> None:
    """Copy keys and values inside one layer's cache, in place.

    Args:
        cache: [blocks, 2, H, tokens_per_block, D].
        blocks_BM: int32 block tables.
        moves_M4: int32 [moves, 4]: sequence, KV head, source slot, target slot; no target is any move's source.
    """
    if use_triton(cache):
        from trtkit.kernels import triton_paged

        triton_paged.compact_paged(cache, blocks_BM, moves_M4)
        return
    compact_twin(cache, blocks_BM, moves_M4)


def gather_sequence(batch: PagedBatch, index: int) -> Tensor:
    """Keys and values of one sequence in slot order, a copy [2, H, length, D]."""
    length = int(batch.lengths_B[index])
    blocks = batch.blocks_BM[index, : math.ceil(length / batch.tokens_per_block)].to(torch.int64)
    return batch.cache[blocks].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]


def decode_attention_twin(queries_BHD: Tensor, batch: PagedBatch) -> tuple[Tensor, Tensor]:
    """Defines `paged_decode_attention`: fp32 inside, one sequence at a time."""
    out = torch.empty_like(queries_BHD)
    lse = torch.empty(queries_BHD.shape[:2], dtype=torch.float32, device=queries_BHD.device)
    for index, query_HD in enumerate(queries_BHD.float()):
        keys, values = gather_sequence(batch, index).float()
        logits_HGN = _scaled_logits(query_HD[None], keys)[:, :, 0]
        lse[index] = torch.logsumexp(logits_HGN, dim=-1).flatten()
        out[index] = (torch.softmax(logits_HGN, dim=-1) @ values).flatten(0, 1).to(out.dtype)
    return out, lse


def score_twin(
    queries: PagedQueries, lse_RH: Tensor, weights_R: Tensor, batch: PagedBatch, positions: Tensor
) -> Tensor:
    """Defines `score_paged`: exp(logit - lse) of visible keys, weighted and summed."""
    mass = torch.zeros(positions.shape, dtype=torch.float32, device=lse_RH.device)
    starts = queries.starts_B1.tolist()
    for index, (start, end) in enumerate(pairwise(starts)):
        keys = gather_sequence(batch, index)[0].float()
        live = positions[index, :, : keys.shape[1]]
        for first in range(start, end, _QUERY_TILE):
            rows = slice(first, min(end, first + _QUERY_TILE))
            logits_HGTN = _scaled_logits(queries.heads_RHD[rows].float(), keys)
            hidden_HTN = live[:, None, :] > queries.positions_R[rows][None, :, None]
            lse_HGT = lse_RH[rows].T.reshape(keys.shape[0], -1, rows.stop - rows.start)
            probabilities = torch.exp(logits_HGTN - lse_HGT[..., None]).masked_fill(hidden_HTN[:, None], 0)
            mass[index, :, : keys.shape[1]] += torch.einsum("hgtn,t->hn", probabilities, weights_R[rows])
    return mass


def lse_twin(queries: PagedQueries, batch: PagedBatch, positions: Tensor) -> Tensor:
    """Log-sum-exp of each query's visible scaled logits, fp32 [R, Hq]: for engines whose attention emits none."""
    lse = torch.empty(queries.heads_RHD.shape[:2], dtype=torch.float32, device=positions.device)
    starts = queries.starts_B1.tolist()
    for index, (start, end) in enumerate(pairwise(starts)):
        keys = gather_sequence(batch, index)[0].float()
        live = positions[index, :, : keys.shape[1]]
        for first in range(start, end, _QUERY_TILE):
            rows = slice(first, min(end, first + _QUERY_TILE))
            hidden_HTN = live[:, None, :] > queries.positions_R[rows][None, :, None]
            logits = _scaled_logits(queries.heads_RHD[rows].float(), keys).masked_fill(hidden_HTN[:, None], -math.inf)
            lse[rows] = torch.logsumexp(logits, dim=-1).flatten(0, 1).T
    return lse


def compact_twin(cache: Tensor, blocks_BM: Tensor, moves_M4: Tensor) -> None:
    """Defines `compact_paged`: all sources are read before any target is written."""
    size = cache.shape[3]
    sequence, head, source, target = moves_M4.to(torch.int64).unbind(1)
    from_block = blocks_BM[sequence, source // size].to(torch.int64)
    to_block = blocks_BM[sequence, target // size].to(torch.int64)
    cache[to_block, :, head, target % size] = cache[from_block, :, head, source % size]


def _scaled_logits(heads_THD: Tensor, keys_HND: Tensor) -> Tensor:
    """Queries [T, Hq, D] against keys [H, N, D], scaled by 1/sqrt(D): [H, G, T, N]."""
    count, _, dim = heads_THD.shape
    grouped = heads_THD.reshape(count, keys_HND.shape[0], -1, dim).permute(1, 2, 0, 3)
    return torch.matmul(grouped, keys_HND[:, None].transpose(-1, -2)) / math.sqrt(dim)
