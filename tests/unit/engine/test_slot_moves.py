from __future__ import annotations

import numpy as np
import torch

from trtkit.engine.paged_cache import PagedCache
from trtkit.engine.slot_moves import move_slots
from trtkit.kv.moves import plan_moves
from trtkit.spec.dtype import DType
from trtkit.spec.model import ModelSpec

MODEL = ModelSpec(
    name="tiny",
    architecture="LlamaForCausalLM",
    num_layers=2,
    hidden_size=8,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=8,
    vocab_size=8,
    max_position_embeddings=64,
)


def filled_cache(table, length):
    """Keys are 100 * layer + 10 * head + slot, values a half more; everything else is NaN."""
    cache = PagedCache(MODEL, 6, 3, DType.FP32, "cpu")
    for layer, stored in enumerate(cache.layers):
        stored.fill_(torch.nan)
        slots = np.arange(length)
        rows = cache.write_rows(np.asarray(table)[slots // 3], slots % 3).view(length, 2, 2)
        for side in range(2):
            for head in range(2):
                names = 100 * layer + 10 * head + torch.arange(length) + side / 2
                cache.rows(layer)[rows[:, side, head]] = names[:, None].expand(-1, 4)
    return cache


def test_every_layer_and_head_keeps_its_own_slots_with_their_values():
    table, length = [5, 0, 2], 8
    cache = filled_cache(table, length)
    keep = torch.tensor([[0, 3, 7], [1, 2, 6], [2, 4, 5], [0, 6, 7]])
    move_slots(cache, table, plan_moves(keep, length))
    for layer in range(2):
        keys, values = cache.read(layer, table[:1], 3)
        for head in range(2):
            expected = 100 * layer + 10 * head + keep[2 * layer + head]
            assert keys[head, :, 0].sort().values.tolist() == expected.tolist()
            assert torch.equal(values[head], keys[head] + 0.5)


def test_kept_slots_in_front_are_not_touched():
    cache = filled_cache([1, 4], 6)
    before = cache.read(0, [1], 3)[0].clone()
    move_slots(cache, [1, 4], plan_moves(torch.tensor([[0, 1, 5]] * 4), 6))
    after = cache.read(0, [1], 3)[0]
    assert torch.equal(after[:, :2], before[:, :2])
    assert after[:, 2, 0].tolist() == [5, 15]
