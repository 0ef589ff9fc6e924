"""Compaction of one sequence's blocks: the fewest copies that leave what was kept in front.

Shapes: M moves of all layers and KV heads; a layer is [blocks, 2, H, tokens_per_block, D].
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from trtkit.engine.paged_cache import PagedCache
from trtkit.kv.moves import HoleMoves


def move_slots(cache: PagedCache, block_table: list[int], moves: HoleMoves) -> None:
    """Fill the holes of one sequence in every layer; `moves.rows` are flat (layer, KV head) rows, ascending."""
    heads, size = cache.num_kv_heads, cache.tokens_per_block
    table = torch.tensor(block_table, device=cache.device)
    side = torch.arange(2, device=cache.device)[:, None] * heads

    def rows(slots: Tensor) -> Tensor:
        """Rows of each slot's key and value, [2, M]."""
        block = table[torch.div(slots, size, rounding_mode="floor")]
        return (block * (2 * heads) + side + moves.rows % heads) * size + slots % size

    sources, targets = rows(moves.sources), rows(moves.targets)
    edges = torch.arange(len(cache.layers) + 1, device=cache.device) * heads
    bounds = torch.searchsorted(moves.rows, edges).tolist()
    for layer, (start, end) in enumerate(itertools.pairwise(bounds)):
        moved = cache.rows(layer).index_select(0, sources[:, start:end].reshape(-1))
        cache.put(layer, targets[:, start:end].reshape(-1), moved)
