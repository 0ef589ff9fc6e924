from __future__ import annotations

import pytest
import torch

from trtkit.kernels import mass, paged


@pytest.mark.parametrize("group", [1, 4, 8])
@pytest.mark.parametrize("tile", [1, 1 << 21])
def test_gathered_mass_equals_the_paged_twin(group, tile, monkeypatch):
    """The same definition from two sides: with a log-sum-exp over blocks, with a softmax over gathered keys."""
    monkeypatch.setattr(mass, "_MAX_LOGITS", tile)
    generator = torch.Generator().manual_seed(0)
    heads, live, dim, count = 2, 13, 64, 5
    keys = torch.randn(heads, live, dim, generator=generator)
    cache = torch.zeros(4, 2, heads, 4, dim)
    for slot in range(live):
        cache[slot // 4, 0, :, slot % 4] = keys[:, slot]
    batch = paged.PagedBatch(
        cache=cache, blocks_BM=torch.arange(4, dtype=torch.int32)[None], lengths_B=torch.tensor([live])
    )
    positions = torch.stack([torch.randperm(live, generator=generator) for _ in range(heads)]).to(torch.int32)
    asked = torch.arange(live - count, live, dtype=torch.int32)
    queries = paged.PagedQueries(
        heads_RHD=torch.randn(count, heads * group, dim, generator=generator),
        starts_B1=torch.tensor([0, count]),
        positions_R=asked,
    )
    weights = torch.linspace(0.5, 1, count)
    lse = paged.lse_twin(queries, batch, positions[None])
    expected = paged.score_twin(queries, lse, weights, batch, positions[None])[0]
    found = mass.column_mass(queries.heads_RHD[None], keys[None], positions[None], asked, weights)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_query_with_no_key_left_gives_nothing_and_no_nan():
    keys, queries = torch.randn(1, 1, 3, 8), torch.randn(1, 2, 1, 8)
    positions = torch.tensor([[[5, 6, 7]]], dtype=torch.int32)
    asked = torch.tensor([4, 9], dtype=torch.int32)
    found = mass.column_mass(queries, keys, positions, asked, torch.ones(2))
    torch.testing.assert_close(found.sum(), torch.tensor(1.0))
