"""Checks of the matrix products, every tile that may be chosen at warm-up among them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from trtkit.kernels import check_matmul_grouped, matmul
from trtkit.kernels.dispatch import use_triton
from trtkit.kernels.matmul_tiles import MEASURED_ROWS, WIDTHS, Tile
from trtkit.kernels.selfcheck import Answers, Check, CheckShape, Draws, failures

BOUNDS = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-4}
"""A few roundings of the type: accumulation is fp32."""

_OUTPUTS, _INPUTS = 512, 4096
"""Few channels and a long sum, so that it is cut in pieces as a small matrix of a large model is."""

_FP8_BOUND = 0.02
_QUANTISED = (torch.int8, torch.float8_e4m3fn)


def checks(device: torch.device, shape: CheckShape) -> Iterator[Check]:
    """Products of each weight type, for each width of the tokens."""
    bound = BOUNDS[shape.dtype]
    for weight_type in shape.weight_dtypes:
        if weight_type is torch.uint8 or (weight_type is torch.int8 and shape.weight_group):
            yield from check_matmul_grouped.checks(device, shape, weight_type, bound)
            continue
        _compile_ahead(device, shape, weight_type)
        name = str(weight_type).removeprefix("torch.")
        most = max(WIDTHS) if weight_type in _QUANTISED else matmul.DECODE_ROWS
        for width in WIDTHS:
            if width <= most:
                yield from _widths(device, shape, weight_type, width)
        many = partial(_product, device, shape, weight_type, MEASURED_ROWS + 88)
        yield Check(family="matmul", name=f"{name}, many tokens", bound=bound, run=many)
        if weight_type in _QUANTISED:
            yield Check(
                family="matmul", name=f"{name}, every byte", bound=0.0, run=partial(_bytes, device, shape, weight_type)
            )
    if torch.float8_e4m3fn in shape.weight_dtypes:
        yield Check(family="matmul", name="rows to fp8", bound=0.04, run=partial(_rows, device, shape))
        yield Check(family="matmul", name="fp8 by fp8", bound=_FP8_BOUND, run=partial(_fp8, device, shape))


def _widths(device: torch.device, shape: CheckShape, weight_type: torch.dtype, width: int) -> Iterator[Check]:
    name, bound = str(weight_type).removeprefix("torch."), BOUNDS[shape.dtype]
    tokens = width - 3 if width > min(WIDTHS) else 1
    if not use_triton(torch.empty(0, device=device), matmul.FAMILY) or shape.dtype is torch.float32:
        run = partial(_product, device, shape, weight_type, tokens)
        yield Check(family="matmul", name=f"{name}, {tokens} tokens", bound=bound, run=run)
        return
    from trtkit.kernels import matmul_configs

    item = weight_type.itemsize
    for tile in matmul_configs.candidates(width, item):
        yield Check(
            family="matmul",
            name=f"{name}, {tokens} tokens, {tile.outputs} x {tile.inputs} in {tile.stages} stages, {tile.warps} warps",
            bound=bound,
            run=partial(_product, device, shape, weight_type, tokens, tile=tile),
            on_failure=partial(_give_up, device, width, item, tile),
        )


def _compile_ahead(device: torch.device, shape: CheckShape, weight_type: torch.dtype) -> None:
    """Compile all tiles at once; one after the other they take half a minute."""
    if use_triton(torch.empty(0, device=device), matmul.FAMILY) and shape.dtype is not torch.float32:
        from trtkit.kernels import triton_matmul

        x, weight, scale = _problem(Draws(device), shape, weight_type, 1)
        with contextlib.suppress(*failures()):  # whatever it is, the check that meets it again tells
            triton_matmul.compile_ahead(x, weight, scale, has_bias=shape.has_bias)


def _give_up(device: torch.device, width: int, item: int, tile: Tile) -> bool:
    """Reject one tile; whether any is left."""
    from trtkit.kernels import matmul_configs, triton_matmul

    matmul_configs.reject(width, tile)
    triton_matmul.forget_counts(device)
    return bool(matmul_configs.candidates(width, item))


def _product(
    device: torch.device, shape: CheckShape, weight_type: torch.dtype, tokens: int, *, tile: Tile | None = None
) -> Answers:
    x, weight, scale = _problem(Draws(device), shape, weight_type, tokens)
    bias = Draws(device, 1).normal(_OUTPUTS, dtype=shape.dtype) if shape.has_bias else None
    expected = x.double() @ _wide(weight).T
    if scale is not None:
        expected = expected * scale.double()
    if bias is not None:
        expected = expected + bias.double()
    if tile is None:
        yield matmul.linear(x, weight, scale, bias), expected
        return
    from trtkit.kernels import triton_matmul

    for _ in range(2):  # the second time finds what the first left behind
        out = torch.full((tokens, _OUTPUTS), torch.nan, dtype=shape.dtype, device=device)
        yield triton_matmul.fused_linear(x, weight, scale, bias, out, tile=tile), expected


def _bytes(device: torch.device, shape: CheckShape, weight_type: torch.dtype) -> Answers:
    """Rows of the unit matrix read single weights, whose 256 values must come out exactly."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(_OUTPUTS, 1)
    if weight_type is torch.float8_e4m3fn:
        codes[codes % 128 == 127] = 0  # NaN, which no weight is
    weight = codes.to(device).view(weight_type)
    ones = torch.ones(_OUTPUTS, dtype=_scale_type(shape, weight_type), device=device)
    for rows in (16, 64, 256, MEASURED_ROWS + 256):
        unit = torch.eye(256, dtype=shape.dtype, device=device).repeat(-(-rows // 256), 1)[:rows]
        yield matmul.linear(unit, weight, ones), (unit.double() @ _wide(weight).T)


def _rows(device: torch.device, shape: CheckShape) -> Answers:
    x = Draws(device).normal(5, shape.hidden_size, dtype=shape.dtype)
    x[1] *= 1e-3
    x[4] = 0
    quantised, scale = matmul.quantise_rows_fp8(x)
    top = x.double().abs().amax(1, keepdim=True)
    yield scale[:4], top[:4] / matmul.FP8_MAX
    for row in range(5):
        yield quantised[row].to(torch.float32) * scale[row], x[row].double()


def _fp8(device: torch.device, shape: CheckShape) -> Answers:
    x, weight, scale = _problem(Draws(device), shape, torch.float8_e4m3fn, matmul.DECODE_ROWS + 21)
    assert scale is not None
    yield matmul.fp8_linear(x, weight, scale), matmul.fp8_linear_twin(x, weight, scale)


def _problem(
    draws: Draws, shape: CheckShape, weight_type: torch.dtype, tokens: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    x = draws.normal(tokens, _INPUTS, dtype=shape.dtype)
    scale = ((draws.uniform(_OUTPUTS) + 0.5) / 128).to(_scale_type(shape, weight_type))
    if weight_type is torch.int8:
        return x, draws.integers(-127, 128, _OUTPUTS, _INPUTS, dtype=torch.int8), scale
    drawn = draws.normal(_OUTPUTS, _INPUTS)
    if weight_type is torch.float8_e4m3fn:
        return x, (drawn * 100).clamp(-448, 448).to(weight_type), scale
    return x, drawn.to(shape.dtype), None


def _scale_type(shape: CheckShape, weight_type: torch.dtype) -> torch.dtype:
    """As the engine keeps scales; another type would be another kernel to compile."""
    return torch.float32 if weight_type is torch.float8_e4m3fn else shape.dtype


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.float32).to(torch.float64)
