"""Products of weights with a scale for each group of inputs against float64, the kernels in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import sys

import numpy as np
import pytest
import torch
from support.grouped_weights import grouped_problem

from trtkit.kernels import matmul, matmul_tiles
from trtkit.kernels.int4 import dequantise_groups, pack_int4

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("triton was imported without its interpreter before this file", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"

from trtkit.kernels import matmul_configs, triton_matmul, triton_matmul_grouped, triton_widen_groups

EPS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def kernels_instead_of_twins(monkeypatch):
    monkeypatch.setattr(matmul, "use_triton", lambda *_: True)


def assert_close(found, expected, dtype):
    assert not found.isnan().any()
    assert (found.double() - expected).abs().max() <= EPS[dtype] * expected.abs().max()


@pytest.mark.parametrize("tokens", [1, 3, 17, 64, 65, 130])
@pytest.mark.parametrize(("bits", "zeros"), [(4, False), (4, True), (8, False), (8, True)])
def test_any_number_of_tokens_gives_the_float64_product(tokens, bits, zeros):
    dtype = torch.float16
    x, weight, scale, zero, bias, expected = grouped_problem(tokens, 40, 256, 128, bits, dtype, zeros=zeros, bias=True)
    assert_close(matmul.linear(x, weight, scale, bias, zero=zero), expected, dtype)


@pytest.mark.parametrize(("group", "groups"), [(32, 2), (32, 3), (64, 2), (64, 3), (128, 3), (256, 2), (96, 2)])
@pytest.mark.parametrize(("bits", "zeros"), [(4, False), (4, True), (8, False), (8, True)])
def test_any_group_in_any_number_gives_the_float64_product(group, groups, bits, zeros):
    x, weight, scale, zero, _, expected = grouped_problem(
        3, 33, group * groups, group, bits, torch.float16, zeros=zeros
    )
    assert_close(matmul.linear(x, weight, scale, zero=zero), expected, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale_type", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [2, 66, 600])
def test_any_type_of_activations_and_scales_gives_the_float64_product(dtype, scale_type, tokens):
    x, weight, scale, zero, _, _ = grouped_problem(tokens, 33, 384, 128, 4, dtype, zeros=True)
    scale = scale.to(scale_type)
    expected = x.double() @ dequantise_groups(weight, scale, zero).double().T
    assert_close(matmul.linear(x, weight, scale, zero=zero), expected, dtype)


@pytest.mark.parametrize("tokens", [5, 20])
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (8, 64)])
def test_the_weight_on_the_left_gives_the_float64_product(tokens, bits, group):
    """As the tiles for few tokens have it; the interpreter's own is on the right."""
    x, weight, scale, zero, bias, expected = grouped_problem(
        tokens, 70, 640, group, bits, torch.float16, zeros=True, bias=True
    )
    tile = matmul_tiles.Tile(outputs=64, inputs=256, stages=1, warps=4, left=True)
    out = torch.full((tokens, 70), torch.nan, dtype=torch.float16)
    triton_matmul_grouped.fused_linear(x, weight, scale, zero, bias, out, tile=tile)
    assert_close(out, expected, torch.float16)


@pytest.mark.parametrize("seed", range(24))
def test_any_tile_at_odd_shapes_gives_the_float64_product_and_touches_nothing_else(seed):
    """Every tile of a GPU; scales of either sign and of nothing; NaN beside the activations, results beside the result."""
    generator = np.random.default_rng(seed)

    def draw(among):
        return among[int(generator.integers(len(among)))]

    tokens, outputs = draw([1, 7, 8, 9, 16, 17, 33, 64, 65, 128, 129]), draw([1, 3, 31, 65, 127, 257])
    group, groups, bits = draw(matmul_tiles.GROUPS), draw([1, 2, 3, 5, 9]), draw([4, 8])
    dtype, zeros, bias = draw([torch.float16, torch.bfloat16]), draw([True, False]), draw([True, False])
    x, weight, scale, zero, addend, _ = grouped_problem(
        tokens, outputs, group * groups, group, bits, dtype, zeros=zeros, bias=bias, seed=seed
    )
    scale = (scale * torch.randn(scale.shape, generator=torch.Generator().manual_seed(seed)).sign()).to(
        draw([dtype, torch.float32])
    )
    scale[:, -1] = 0
    wide = dequantise_groups(weight, scale, zero).double()
    expected = x.double() @ wide.T + (0 if addend is None else addend.double())
    around = torch.full((tokens, x.shape[1] + draw([0, 3, 8])), torch.nan, dtype=dtype)
    around[:, : x.shape[1]] = x
    beside = torch.full((tokens, outputs + draw([0, 5])), 7.0, dtype=dtype)
    tile = draw(matmul_tiles.grouped_tiles(matmul_tiles.token_width(tokens, matmul_tiles.GROUPED_WIDTHS), group))
    triton_matmul_grouped.fused_linear(
        around[:, : x.shape[1]], weight, scale, zero, addend, beside[:, :outputs], tile=tile
    )
    largest = x.double().abs() @ wide.abs().T + 1
    assert ((beside[:, :outputs].double() - expected).abs() <= EPS[dtype] * largest).all()
    assert (beside[:, outputs:] == 7).all()
    assert not triton_matmul.counters_of(x.device).any()


def test_pieces_of_a_long_sum_give_the_same_bits_every_time_and_leave_the_counters_at_zero():
    x, weight, scale, _, _, expected = grouped_problem(3, 40, 32 * 128, 128, 4, torch.float16)
    tile = matmul_tiles.Tile(outputs=64, inputs=128, stages=1, warps=4, left=True)
    assert matmul_tiles.num_pieces(tile, 8, 1, 32 * 128, 0.5, 132) > 2
    outs = [torch.empty(3, 40, dtype=torch.float16) for _ in range(2)]
    for out in outs:
        triton_matmul_grouped.fused_linear(x, weight, scale, None, None, out, tile=tile)
    assert_close(outs[0], expected, torch.float16)
    assert torch.equal(*outs)
    assert not triton_matmul.counters_of(x.device).any()


@pytest.mark.parametrize("tokens", [3, 600])
def test_rows_apart_are_read_and_written_where_they_lie(tokens):
    x, weight, scale, _, _, expected = grouped_problem(tokens, 33, 256, 128, 4, torch.float16)
    wide_x, wide_out = torch.randn(tokens, 300).half(), torch.zeros(tokens, 50, dtype=torch.float16)
    wide_x[:, :256] = x
    out = matmul.linear(wide_x[:, :256], weight, scale, out=wide_out[:, :33])
    assert out.data_ptr() == wide_out.data_ptr()
    assert_close(wide_out[:, :33], expected, torch.float16)
    assert not wide_out[:, 33:].any()
    assert_close(matmul.linear(x.T.contiguous().T, weight, scale), expected, torch.float16)


def test_rows_of_a_larger_weight_give_their_part_of_the_product():
    x, weight, scale, zero, _, expected = grouped_problem(4, 60, 256, 64, 4, torch.float16, zeros=True)
    found = matmul.linear(x, weight[20:], scale[20:], zero=zero[20:])
    assert_close(found, expected[:, 20:], torch.float16)


@pytest.mark.parametrize(
    ("bits", "offset", "groups", "words"), [(4, 0, 4, True), (8, 2, 4, True), (4, 1, 4, False), (4, 0, 3, False)]
)
def test_scales_are_read_in_pairs_only_where_pairs_lie_at_whole_words(bits, offset, groups, words):
    """A GPU refuses 32 bits at an odd multiple of 16."""
    x, weight, scale, zero, _, expected = grouped_problem(3, 33, 32 * groups, 32, bits, torch.float16, zeros=True)
    views = []
    for numbers in (scale, zero):
        views.append(
            torch.full((offset + numbers.numel(),), torch.nan).half()[offset:].view(numbers.shape).copy_(numbers)
        )
    assert triton_matmul_grouped._constants(views[0], scale, None, 32, packed=True)["WORDS"] is words
    assert triton_matmul_grouped._constants(scale, views[1], None, 32, packed=True)["WORDS"] is words
    assert not triton_matmul_grouped._constants(scale.float(), None, None, 32, packed=True)["WORDS"]
    assert_close(matmul.linear(x, weight, views[0], zero=views[1]), expected, torch.float16)


def test_no_tokens_at_all_are_served():
    x, weight, scale, _, _, _ = grouped_problem(1, 24, 128, 64, 4, torch.float16)
    assert matmul.linear(x[:0], weight, scale).shape == (0, 24)


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 12), (8, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_widened_weights_are_the_twins_rounded_once(bits, group, dtype):
    _, weight, scale, zero, _, _ = grouped_problem(1, 5, 12 * group, group, bits, dtype, zeros=True)
    wide = triton_widen_groups.dequantise_groups(weight, scale, zero, torch.empty(5, 12 * group, dtype=dtype))
    expected = dequantise_groups(weight, scale, zero)
    torch.testing.assert_close(wide.float(), expected, rtol=2**-7 if dtype is torch.bfloat16 else 2**-10, atol=0)


def test_every_value_in_every_place_comes_out_exactly():
    values = torch.stack([(torch.arange(128) + row) % 16 - 8 for row in range(16)]).to(torch.int8)
    ones = torch.ones(16, 1, dtype=torch.float16)
    for group in (32, 64, 128):
        found = matmul.linear(
            torch.eye(128).half(), pack_int4(values, group), ones.expand(16, 128 // group).contiguous()
        )
        assert torch.equal(found.T, values.half())


@pytest.mark.parametrize("tokens", [65, 1000])
def test_for_many_tokens_the_quicker_way_is_taken(monkeypatch, tokens):
    taken = []

    def ask(fused, widened, asked, key, device):
        assert asked == tokens
        assert set(key) >= {torch.uint8, torch.float16, 128}
        return tokens == 65

    monkeypatch.setattr(triton_matmul_grouped, "is_quicker", ask)
    monkeypatch.setattr(triton_matmul_grouped, "fused_linear", lambda *_: taken.append("fused"))
    monkeypatch.setattr(triton_matmul_grouped, "_widened", lambda *_: taken.append("widened"))
    x, weight, scale, _, _, _ = grouped_problem(tokens, 8, 128, 128, 4, torch.float16)
    matmul.linear(x, weight, scale)
    matmul.linear(x[:64], weight, scale)
    assert taken == ["fused" if tokens == 65 else "widened", "fused"]


def test_a_step_has_whole_groups_and_no_more_of_small_ones():
    for width in matmul_tiles.GROUPED_WIDTHS:
        most = max(tile.inputs // 128 for tile in matmul_tiles.grouped_tiles(width, 128))
        for group in matmul_tiles.GROUPS:
            for tile in matmul_tiles.grouped_tiles(width, group):
                assert tile.inputs % max(group, 64) == 0
                assert 1 <= tile.inputs // group <= max(most, 64 // group)


def test_the_autotuner_is_offered_the_tiles_of_the_launch(monkeypatch):
    monkeypatch.setattr(matmul_configs, "INTERPRETED", False)
    offered = matmul_configs.prune_grouped([], {}, BT=16, PACKED=True, GROUP=64)
    tiles = [matmul_configs.tile_of(config.kwargs) for config in offered]
    assert tiles == list(matmul_tiles.grouped_tiles(16, 64))
