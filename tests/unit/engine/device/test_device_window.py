from __future__ import annotations

import math

import pytest
import torch

from trtkit.engine.device.window import visible_lse


@pytest.mark.parametrize(("heads", "group"), [(1, 1), (2, 3)])
@pytest.mark.parametrize("length", [1, 8, 13])
def test_log_sum_exps_run_over_what_a_query_may_see_and_over_nothing_else(heads, group, length):
    generator = torch.Generator().manual_seed(length)
    layers, size, dim, queries = 2, 4, 6, 5
    storage = torch.full((layers, 7, 2, heads, size, dim), torch.nan)
    table = torch.tensor([5, 1, 3, 6], dtype=torch.int32)
    keys = torch.randn(layers, heads, length, dim, generator=generator)
    for slot in range(length):
        storage[:, table[slot // size], 0, :, slot % size] = keys[:, :, slot]
    order = [torch.randperm(20, generator=generator)[:length] for _ in range(layers * heads)]
    positions = torch.stack(order).view(layers, heads, length).int()
    asked = torch.tensor([0, 4, 9, 15, 19], dtype=torch.int32)
    q = torch.randn(layers, queries, heads * group, dim, generator=generator)
    found = visible_lse(q, storage, table, length, positions, asked)
    assert found.shape == (layers, queries, heads * group)
    for layer in range(layers):
        for query in range(queries):
            for head in range(heads * group):
                seen = positions[layer, head // group] <= asked[query]
                logits = keys[layer, head // group][seen].double() @ q[layer, query, head].double() / math.sqrt(dim)
                expected = torch.logsumexp(logits, 0) if len(logits) else torch.tensor(-math.inf)
                torch.testing.assert_close(found[layer, query, head].double(), expected.double(), atol=1e-5, rtol=1e-5)


def test_an_8_bit_cache_is_read_as_numbers():
    storage = torch.zeros(1, 1, 2, 1, 4, 2).to(torch.float8_e4m3fn)
    lse = visible_lse(
        torch.ones(1, 1, 1, 2),
        storage,
        torch.zeros(1, dtype=torch.int32),
        4,
        torch.arange(4, dtype=torch.int32).view(1, 1, 4),
        torch.tensor([3], dtype=torch.int32),
    )
    torch.testing.assert_close(lse, torch.full((1, 1, 1), math.log(4)))
