"""Log-sum-exps of queries over the keys that are live now: where an eviction has fallen since the queries attended.

Only policies that look through a window longer than what was fed since the last round come here, so it is written in
torch, layer by layer. Shapes: L layers, R queries, Hq query heads, H KV heads, N live slots, D head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def visible_lse(
    queries_LRHD: Tensor,
    storage: Tensor,
    table_M: Tensor,
    length: int,
    positions_LHN: Tensor,
    query_positions_R: Tensor,
) -> Tensor:
    """Log-sum-exp of each query's scaled logits over the keys at its own position and before; -inf without any.

    Args:
        queries_LRHD: rotated queries, [L, R, Hq, D].
        storage: the same layers' caches, [L, blocks, 2, H, tokens_per_block, D].
        table_M: int32 [M], the sequence's block table.
        length: its live slots N.
        positions_LHN: int32 [L, H, N].
        query_positions_R: int32 [R].

    Returns:
        fp32 [L, R, Hq].
    """
    heads, size, dim = storage.shape[3:]
    blocks = table_M[: -(-length // size)].long()
    rows = queries_LRHD.shape[1]
    lse = torch.empty(queries_LRHD.shape[:3], dtype=torch.float32, device=storage.device)
    for layer, (queries_RHD, stored) in enumerate(zip(queries_LRHD, storage, strict=True)):
        keys_HND = _chosen(stored[:, 0], blocks).float().transpose(0, 1).reshape(heads, -1, dim)[:, :length]
        grouped = queries_RHD.float().view(rows, heads, -1, dim).permute(1, 2, 0, 3)
        logits = torch.matmul(grouped, keys_HND[:, None].transpose(-1, -2)) / math.sqrt(dim)
        hidden = positions_LHN[layer][:, None, :] > query_positions_R[None, :, None]
        logits.masked_fill_(hidden[:, None], -math.inf)
        lse[layer] = torch.logsumexp(logits, dim=-1).permute(2, 0, 1).reshape(rows, -1)
    return lse


def _chosen(blocks_KHSD: Tensor, index: Tensor) -> Tensor:
    """Some blocks, a copy; 8-bit numbers are indexed as bytes, which every torch can."""
    if blocks_KHSD.element_size() > 1:
        return blocks_KHSD[index]
    return blocks_KHSD.view(torch.uint8)[index].view(blocks_KHSD.dtype)
