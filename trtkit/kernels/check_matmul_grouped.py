"""Checks of products of weights with a scale for each group of inputs: packed INT4, and int8."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from trtkit.kernels import matmul
from trtkit.kernels.dispatch import use_triton
from trtkit.kernels.int4 import dequantise_groups, pack_int4
from trtkit.kernels.matmul_tiles import GROUPED_WIDTHS, GROUPS, MEASURED_ROWS, Tile
from trtkit.kernels.selfcheck import Answers, Check, CheckShape, Draws, failures

_OUTPUTS, _INPUTS = 512, 4096
_GROUP = 128
Problem = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]
"""Activations, weight, scales, zero points, bias, and the right product."""


def checks(device: torch.device, shape: CheckShape, weight_type: torch.dtype, bound: float) -> Iterator[Check]:
    """Products for each width of the tokens, many tokens, and whether every value comes out exactly."""
    group = shape.weight_group or _GROUP
    ours = use_triton(torch.empty(0, device=device), matmul.FAMILY) and shape.dtype is not torch.float32
    ours = ours and group in GROUPS
    if ours:
        _compile_ahead(device, shape, weight_type)
    name = f"{'int4' if weight_type is torch.uint8 else 'int8'} in groups of {group}"
    for width, least in zip(GROUPED_WIDTHS, (0, *GROUPED_WIDTHS), strict=False):
        tokens = max(least + 1, width - 3) if least else 1
        for tile in _tiles(width, weight_type, group) if ours else (None,):
            what = (
                "" if tile is None else f", {tile.outputs} x {tile.inputs} in {tile.stages} stages, {tile.warps} warps"
            )
            yield Check(
                family="matmul", name=f"{name}, {tokens} tokens{what}", bound=bound,
                run=partial(_product, device, shape, weight_type, tokens, tile=tile),
                on_failure=None if tile is None else partial(_give_up, device, width, weight_type, group, tile),
            )  # fmt: skip
    many = partial(_product, device, shape, weight_type, MEASURED_ROWS + 88)
    yield Check(family="matmul", name=f"{name}, many tokens", bound=bound, run=many)
    every = partial(_every_value, device, shape, weight_type)
    yield Check(family="matmul", name=f"{name}, every value", bound=0.0, run=every)


def _item(weight_type: torch.dtype) -> float:
    return 0.5 if weight_type is torch.uint8 else 1


def _tiles(width: int, weight_type: torch.dtype, group: int) -> tuple[Tile, ...]:
    from trtkit.kernels import matmul_configs

    return matmul_configs.grouped_candidates(width, _item(weight_type), group)


def _compile_ahead(device: torch.device, shape: CheckShape, weight_type: torch.dtype) -> None:
    from trtkit.kernels import triton_matmul_grouped

    x, weight, scale, zero, bias, _ = _problem(device, shape, weight_type, 1)
    with contextlib.suppress(*failures()):  # whatever it is, the check that meets it again tells
        triton_matmul_grouped.compile_ahead(x, weight, scale, zero, bias)


def _give_up(device: torch.device, width: int, weight_type: torch.dtype, group: int, tile: Tile) -> bool:
    """Reject one tile; whether any is left."""
    from trtkit.kernels import matmul_configs, triton_matmul

    matmul_configs.reject_grouped(width, _item(weight_type), tile)
    triton_matmul.forget_counts(device)
    return bool(_tiles(width, weight_type, group))


def _product(
    device: torch.device, shape: CheckShape, weight_type: torch.dtype, tokens: int, *, tile: Tile | None = None
) -> Answers:
    x, weight, scale, zero, bias, expected = _problem(device, shape, weight_type, tokens)
    if tile is None:
        yield matmul.linear(x, weight, scale, bias, zero=zero), expected
        return
    from trtkit.kernels import triton_matmul_grouped

    for _ in range(2):  # the second time finds what the first left behind
        out = torch.full((tokens, _OUTPUTS), torch.nan, dtype=shape.dtype, device=device)
        yield triton_matmul_grouped.fused_linear(x, weight, scale, zero, bias, out, tile=tile), expected


def _every_value(device: torch.device, shape: CheckShape, weight_type: torch.dtype) -> Answers:
    """Rows of the unit matrix read single weights: every value in every place of a word."""
    group = shape.weight_group or _GROUP
    inputs = 2 * group
    span = 16 if weight_type is torch.uint8 else 256
    values = torch.stack([(torch.arange(inputs) + row) % span - span // 2 for row in range(32)]).to(torch.int8)
    weight = (pack_int4(values, group) if weight_type is torch.uint8 else values).to(device)
    scale = torch.ones(32, 2, dtype=shape.dtype, device=device)
    zero = (torch.arange(64, device=device).view(32, 2) % 17 - 8).to(shape.dtype) if shape.zero_points else None
    wide = dequantise_groups(weight, scale, zero).double()
    for rows in (8, 64, 256, MEASURED_ROWS + 256):
        unit = torch.eye(inputs, dtype=shape.dtype, device=device).repeat(-(-rows // inputs), 1)[:rows]
        yield matmul.linear(unit, weight, scale, zero=zero), unit.double() @ wide.T


def _problem(device: torch.device, shape: CheckShape, weight_type: torch.dtype, tokens: int) -> Problem:
    draws, group, top = Draws(device), shape.weight_group or _GROUP, 8 if weight_type is torch.uint8 else 128
    inputs = -(-_INPUTS // group) * group
    x = draws.normal(tokens, inputs, dtype=shape.dtype)
    values = draws.integers(-top, top, _OUTPUTS, inputs, dtype=torch.int8)
    scale = ((draws.uniform(_OUTPUTS, inputs // group) + 0.5) / top).to(shape.dtype)
    zero = draws.integers(-8, 9, *scale.shape).to(shape.dtype) if shape.zero_points else None
    bias = draws.normal(_OUTPUTS, dtype=shape.dtype) if shape.has_bias else None
    weight = pack_int4(values, group) if weight_type is torch.uint8 else values
    wide = values.double() if zero is None else values.double() - zero.double().repeat_interleave(group, 1)
    expected = x.double() @ (wide * scale.double().repeat_interleave(group, 1)).T
    return x, weight, scale, zero, bias, expected if bias is None else expected + bias.double()
