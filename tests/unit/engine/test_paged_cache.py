"""Index arithmetic of the paged cache, against plain loops over the documented layout."""

from __future__ import annotations

import torch

from trtkit.engine.paged_cache import PagedCache, block_bytes
from trtkit.spec.dtype import DType
from trtkit.spec.model import ModelSpec

SPEC = ModelSpec(
    name="m",
    architecture="LlamaForCausalLM",
    num_layers=2,
    hidden_size=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=8,
    vocab_size=10,
    max_position_embeddings=64,
)


def _cache(blocks: int = 6, size: int = 3) -> PagedCache:
    cache = PagedCache(SPEC, blocks, size, DType.FP32, "cpu")
    for layer in cache.layers:
        layer.zero_()
    return cache


def _fill(cache: PagedCache, table: list[int], length: int, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Write known keys and values slot by slot; returns both as [H, length, D]."""
    keys, values = torch.randn(2, 2, length, 4, generator=torch.Generator().manual_seed(layer))
    for slot in range(length):
        block, offset = table[slot // cache.tokens_per_block], slot % cache.tokens_per_block
        cache.layers[layer][block, 0, :, offset] = keys[:, slot]
        cache.layers[layer][block, 1, :, offset] = values[:, slot]
    return keys, values


def test_the_layout_is_blocks_2_heads_tokens_dim_with_one_pad_block() -> None:
    assert _cache().layers[0].shape == (7, 2, 2, 3, 4)
    assert _cache().pad_block == 6


def test_bytes_count_keys_and_values_of_all_layers() -> None:
    assert block_bytes(SPEC, 3, DType.FP16) == 2 * 2 * 2 * 3 * 4 * 2
    assert _cache().num_bytes == 6 * block_bytes(SPEC, 3, DType.FP32)


def test_written_rows_land_where_the_layout_says() -> None:
    import numpy as np

    cache = _cache()
    rows = cache.write_rows(np.array([4, 1]), np.array([2, 0]))
    tokens = torch.arange(2 * 4 * 4.0).view(2, 4, 4)  # two tokens of K heads 0, 1 and V heads 0, 1
    cache.rows(0).index_copy_(0, rows, tokens.view(-1, 4))
    assert torch.equal(cache.layers[0][4, 0, :, 2], tokens[0, :2])
    assert torch.equal(cache.layers[0][4, 1, :, 2], tokens[0, 2:])
    assert torch.equal(cache.layers[0][1, 0, :, 0], tokens[1, :2])
    assert torch.equal(cache.layers[0][1, 1, :, 0], tokens[1, 2:])


def test_read_returns_the_live_slots_in_order() -> None:
    cache = _cache()
    keys, values = _fill(cache, [5, 0, 2], 7)
    read_keys, read_values = cache.read(0, [5, 0, 2], 7)
    assert torch.equal(read_keys, keys)
    assert torch.equal(read_values, values)


def test_short_tables_are_padded_with_the_zero_block() -> None:
    cache = _cache()
    assert cache.padded_tables([[1, 2], [3]]).tolist() == [[1, 2], [3, 6]]
    assert not cache.layers[1][cache.pad_block].any()


def test_clear_zeroes_only_the_blocks_named() -> None:
    cache = _cache()
    for layer in cache.layers:
        layer[:6] = float("nan")
    cache.clear([1, 4])
    for layer in cache.layers:
        assert not layer[[1, 4]].any()
        assert layer[[0, 2, 3, 5]].isnan().all()


def test_all_layers_are_views_of_one_tensor() -> None:
    cache = _cache()
    cache.layers[1][3, 1, 0, 2] = 7.0
    assert bool((cache.storage[1, 3, 1, 0, 2] == 7.0).all())


def test_an_8_bit_cache_stores_rounds_and_saturates() -> None:
    cache = PagedCache(SPEC, 6, 3, DType.FP8, "cpu")
    assert cache.num_bytes == _cache().num_bytes // 4
    rows = torch.tensor([[1.0, 1000.0, -1000.0, 0.3]])
    cache.put(1, torch.tensor([5]), rows)
    assert cache.rows(1)[5].float().tolist() == [1.0, 448.0, -448.0, 0.3125]
    cache.clear([0])
    assert not cache.layers[1][0].float().any()


def test_rows_of_an_8_bit_cache_move_as_they_are() -> None:
    cache = PagedCache(SPEC, 6, 3, DType.FP8, "cpu")
    cache.put(0, torch.tensor([1]), torch.tensor([[0.5, 2.0, -3.0, 8.0]]))
    cache.put(0, torch.tensor([2]), cache.rows(0).index_select(0, torch.tensor([1])))
    assert cache.rows(0)[2].float().tolist() == [0.5, 2.0, -3.0, 8.0]
