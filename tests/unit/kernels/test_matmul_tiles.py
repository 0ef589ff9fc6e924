from __future__ import annotations

import pytest

from trtkit.kernels import matmul_tiles

SMS = 132
LLAMA_70B = [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672), (128256, 8192)]


@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (16, 16), (17, 32), (64, 64), (65, 128), (5000, 128)])
def test_a_tile_is_as_wide_as_the_tokens_need(tokens, width):
    assert matmul_tiles.token_width(tokens) == width


@pytest.mark.parametrize("shape", LLAMA_70B)
@pytest.mark.parametrize("tokens", [1, 32, 64])
def test_enough_programs_run_to_saturate_the_memory(tokens, shape):
    """Little's law asks for about 16 KB in flight on every SM at 3 TB/s and 700 ns."""
    outputs, inputs = shape
    width = matmul_tiles.token_width(tokens)
    for tile in matmul_tiles.tiles_for(width, 1):
        tiles = matmul_tiles.num_tiles(tile, width, tokens, outputs)
        pieces = matmul_tiles.num_pieces(tile, width, tiles, inputs, 1, SMS)
        in_flight = tiles * pieces * (tile.stages - 1) * tile.outputs * tile.inputs
        assert in_flight / SMS >= 24 * 1024, (tile, pieces)


@pytest.mark.parametrize("shape", LLAMA_70B[:4])
@pytest.mark.parametrize("width", [8, 16, 32, 64])
def test_enough_programs_run_to_saturate_the_memory_with_int4(width, shape):
    outputs, inputs = shape
    for tile in matmul_tiles.grouped_tiles(width, 128):
        tiles = matmul_tiles.num_tiles(tile, width, width, outputs)
        pieces = matmul_tiles.num_pieces(tile, width, tiles, inputs, 0.5, SMS)
        in_flight = tiles * pieces * (tile.stages - 1) * tile.outputs * tile.inputs // 2
        assert in_flight / SMS >= 24 * 1024, (tile, pieces)


@pytest.mark.parametrize(("tokens", "width"), [(1, 8), (8, 8), (9, 16), (33, 64), (65, 128), (5000, 128)])
def test_grouped_weights_have_a_narrower_tile_for_the_fewest_tokens(tokens, width):
    assert matmul_tiles.token_width(tokens, matmul_tiles.GROUPED_WIDTHS) == width


def test_room_for_pieces_covers_every_tile_that_may_be_chosen():
    candidates = matmul_tiles.tiles_for(16, 1)
    room = matmul_tiles.partial_elements(candidates, 1, (8192, 8192), 1, SMS, 16)
    for tile in candidates:
        tiles = matmul_tiles.num_tiles(tile, 16, 1, 8192)
        assert room >= tiles * matmul_tiles.num_pieces(tile, 16, tiles, 8192, 1, SMS) * tile.outputs * 16
    assert room * 4 < 64 << 20


def test_a_product_with_more_tiles_than_counters_is_not_cut():
    tile = matmul_tiles.tiles_for(16, 1)[0]
    assert matmul_tiles.num_pieces(tile, 16, matmul_tiles.MAX_TILES + 1, 1 << 20, 1, 10**6) == 1
    assert matmul_tiles.num_pieces(tile, 16, matmul_tiles.MAX_TILES, 1 << 20, 1, 10**6) > 1


@pytest.mark.parametrize("tokens", [600, 1000, 2048, 4096, 8192])
@pytest.mark.parametrize("shape", LLAMA_70B[:4])
def test_channels_widened_at_once_fill_the_gpu_and_stay_bounded(tokens, shape):
    outputs, inputs = shape
    channels = matmul_tiles.channels_at_once(tokens, outputs, inputs, SMS)
    assert channels * inputs * 2 <= matmul_tiles.WORKSPACE_BYTES
    programs = -(-channels // 256) * -(-tokens // 128)
    if channels < outputs and channels * inputs * 2 < matmul_tiles.WORKSPACE_BYTES * 0.9:
        assert programs / (-(-programs // SMS) * SMS) > 0.8
