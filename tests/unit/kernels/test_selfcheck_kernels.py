"""The start-up check over the Triton kernels themselves, in Triton's interpreter, through the public functions."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import replace

import pytest
import torch

from trtkit.kernels import (
    check_matmul,
    check_matmul_grouped,
    check_odd,
    dispatch,
    fused,
    matmul,
    paged,
    ranking,
    sampling,
    slots,
)
from trtkit.kernels.selfcheck import CheckShape, self_check

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("triton was imported without its interpreter before this file", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"

from trtkit.kernels import matmul_configs, matmul_tiles, triton_fused_fp8, triton_matmul, triton_matmul_grouped

SHAPE = CheckShape(
    dtype=torch.float16, kv_dtype=torch.float16, weight_dtypes=(torch.int8, torch.float8_e4m3fn, torch.float16),
    num_heads=8, num_kv_heads=2, head_dim=64, hidden_size=256, intermediate_size=512, vocab_size=1000,
    tokens_per_block=16,
)  # fmt: skip


@pytest.fixture(autouse=True)
def kernels_instead_of_twins(monkeypatch):
    for module in (check_matmul, check_matmul_grouped, fused, matmul, paged, ranking, sampling, slots):
        monkeypatch.setattr(module, "use_triton", lambda _, family: family not in dispatch.disabled())
    for module in (fused, matmul):
        monkeypatch.setattr(module, "has_fp8", lambda _: True)
    monkeypatch.setattr(check_matmul, "_INPUTS", 512)
    monkeypatch.setattr(check_matmul, "_OUTPUTS", 48)
    monkeypatch.setattr(check_matmul_grouped, "_INPUTS", 384)
    monkeypatch.setattr(check_matmul_grouped, "_OUTPUTS", 40)
    yield
    matmul_configs._rejected().clear()
    for family in dispatch.disabled():
        dispatch.enable(family)


@pytest.mark.parametrize("family", dispatch.FAMILIES)
def test_kernels_of_a_family_pass(family):
    rows = self_check(torch.device("cpu"), SHAPE, families=[family])
    assert rows
    assert [row for row in rows if not row.ok] == []


@pytest.mark.slow
def test_kernels_pass_at_odd_shapes(monkeypatch):
    monkeypatch.setattr(check_odd, "VOCABULARIES", [(4097, torch.bfloat16)])
    monkeypatch.setattr(check_odd, "SHAPES", [check_odd.SHAPES[3]])
    monkeypatch.setattr(check_odd, "ROWS", [(1, 1)])
    monkeypatch.setattr(check_odd, "_LONG", 4096)
    rows = self_check(torch.device("cpu"), SHAPE, families=set(dispatch.FAMILIES) - {"matmul"}, thorough=True)
    assert [row for row in rows if not row.ok] == []
    assert len([row for row in rows if row.name.startswith("odd shapes")]) > 14


@pytest.mark.parametrize(
    ("weight_type", "group", "zeros"), [(torch.uint8, 128, False), (torch.uint8, 32, True), (torch.int8, 64, False)]
)
def test_products_of_grouped_weights_pass(weight_type, group, zeros):
    shape = replace(SHAPE, weight_dtypes=(weight_type,), weight_group=group, zero_points=zeros, has_bias=zeros)
    rows = self_check(torch.device("cpu"), shape, families=["matmul"])
    assert [row for row in rows if not row.ok] == []
    kind = "int4" if weight_type is torch.uint8 else "int8"
    assert len([row for row in rows if row.name.startswith(f"{kind} in groups of {group}, ")]) == 7


def test_a_wrong_tile_of_grouped_weights_is_rejected_for_them_alone(monkeypatch):
    monkeypatch.setattr(matmul_configs, "INTERPRETED", False)  # so that there is a list to choose from
    monkeypatch.setattr(triton_matmul_grouped, "compile_ahead", lambda *_: None)
    wrong = matmul_tiles.grouped_tiles(16, 128)[0]

    def product(x, weight, scale, zero, bias, out, *, tile=None):
        right = matmul.linear_twin(x, weight, scale, bias, zero=zero, out=out)
        return right.mul_(1.1) if tile == wrong and x.shape[0] == 13 else right

    monkeypatch.setattr(triton_matmul_grouped, "fused_linear", product)
    monkeypatch.setattr(triton_matmul_grouped, "linear", matmul.linear_twin)
    shape = replace(SHAPE, weight_dtypes=(torch.uint8,), weight_group=128)
    rows = self_check(torch.device("cpu"), shape, families=["matmul"])
    assert len([row for row in rows if not row.ok]) == 1
    assert not dispatch.disabled()
    assert matmul_configs.grouped_candidates(16, 0.5, 128) == matmul_tiles.grouped_tiles(16, 128)[1:]
    assert matmul_configs.grouped_candidates(16, 1, 128) == matmul_tiles.grouped_tiles(16, 128)
    assert matmul_configs.grouped_candidates(32, 0.5, 128) == matmul_tiles.grouped_tiles(32, 128)


def test_a_wrong_tile_is_rejected_and_the_family_stays_while_another_is_left(monkeypatch):
    """The interpreter knows one tile; here there seem to be two, of which the first is wrong."""
    only = matmul_configs.INTERPRETED_TILE
    wrong = matmul_tile(outputs=16)

    def tiles(width, _):
        return tuple(tile for tile in (wrong, only) if (width, tile) not in matmul_configs._rejected())

    right = triton_matmul.fused_linear

    def product(*arguments, tile=None):
        out = right(*arguments, tile=only)
        return out.mul_(1.1) if tile == wrong else out

    monkeypatch.setattr(matmul_configs, "candidates", tiles)
    monkeypatch.setattr(triton_matmul, "fused_linear", product)
    rows = self_check(torch.device("cpu"), SHAPE, families=["matmul"])
    assert [row.name for row in rows if not row.ok and "16 x 64" not in row.name] == []
    assert len([row for row in rows if not row.ok]) == 4, "a tile is given up once for every width"
    assert not dispatch.disabled()
    assert tiles(16, 1) == (only,)


def test_rows_quantised_wrongly_cost_only_the_kernels_that_quantise_them(monkeypatch):
    right = triton_fused_fp8.silu_mul_fp8

    def wrong(gate_up):
        quantised, scale = right(gate_up)
        return quantised, scale * 1.1

    monkeypatch.setattr(triton_fused_fp8, "silu_mul_fp8", wrong)
    rows = self_check(torch.device("cpu"), SHAPE, families=["fused"])
    assert [row.name for row in rows if not row.ok] == ["activation to fp8"]
    assert set(dispatch.disabled()) == {fused.FP8_ROWS}
    assert all(row.ok for row in self_check(torch.device("cpu"), SHAPE, families=["fused"]))


def test_compiling_ahead_that_fails_leaves_it_to_the_checks(monkeypatch):
    def broken(*_, **__):
        raise AttributeError("module 'triton' has no attribute 'AsyncCompileMode'")

    monkeypatch.setattr(triton_matmul, "compile_ahead", broken)
    rows = self_check(torch.device("cpu"), SHAPE, families=["matmul"])
    assert rows
    assert all(row.ok for row in rows)


def matmul_tile(*, outputs):
    return matmul_tiles.Tile(outputs=outputs, inputs=64, stages=1, warps=4, left=False)
