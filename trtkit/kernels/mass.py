"""Attention mass per key over keys that lie gathered, all layers at once: what the embedded engine scores with on a CPU.

The same sum as `trtkit.kernels.paged.score_twin`, without a log-sum-exp from outside. Shapes: L layers, H KV heads,
G query heads per KV head, T queries, N live slots, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MAX_LOGITS = 1 << 21
"""Logits held at once: 8 MiB, about what a core's caches hold."""


def column_mass(  # noqa: PLR0913 - two tensors of queries, two of keys, and knobs by keyword
    queries_LTHD: Tensor,
    keys_LHND: Tensor,
    positions_LHN: Tensor,
    query_positions_T: Tensor,
    weights_T: Tensor,
    *,
    settled: int = 0,
    max_logits: int = _MAX_LOGITS,
) -> Tensor:
    """Weighted softmax mass each key receives, summed over queries and the query heads of its KV head.

    Args:
        queries_LTHD: rotated queries, [L, T, H * G, D].
        keys_LHND: rotated keys of the live slots.
        positions_LHN: their original positions; a query sees keys at its own position and before.
        query_positions_T: positions of the queries, same integer type.
        weights_T: fp32, what each query counts.
        settled: that many slots in front are older than every query; their positions are not looked at.
        max_logits: fp32 logits held at once; a GPU wants more than the default, which suits a core's caches.

    Returns:
        fp32 [L, H, N].
    """
    layers, heads, live, dim = keys_LHND.shape
    count = queries_LTHD.shape[1]
    grouped = queries_LTHD.reshape(layers, count, heads, -1, dim).permute(0, 2, 1, 3, 4)
    group = grouped.shape[3]
    mass = torch.zeros(layers, heads, live, dtype=torch.float32, device=keys_LHND.device)
    keys = keys_LHND.float().transpose(-1, -2)
    tile = max(1, max_logits // max(1, layers * heads * group * live))
    for first in range(0, count, tile):
        rows = slice(first, min(count, first + tile))
        size = rows.stop - first
        queries = grouped[:, :, rows].float().reshape(layers, heads, size * group, dim) * dim**-0.5
        logits = torch.matmul(queries, keys).view(layers, heads, size, group, live)
        hidden = positions_LHN[:, :, None, None, settled:] > query_positions_T[rows][:, None, None]
        logits[..., settled:].masked_fill_(hidden, -torch.inf)
        probabilities = torch.softmax(logits, dim=-1)
        if not settled and bool(hidden.all(dim=-1).any()):
            probabilities.masked_fill_(hidden, 0)  # a query none of whose keys is left gives nothing, not NaN
        weights = weights_T[rows].repeat_interleave(group)
        mass += torch.matmul(weights, probabilities.flatten(2, 3))
    return mass
