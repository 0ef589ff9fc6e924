# ruff: noqa: ANN001, ANN202, E741, PLR0913, PLR0917, RET505
# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of `trtkit.kernels.matmul` for weights with a scale for each group of inputs: packed INT4, and int8.

As `triton_matmul`, whose launches, counters and pieces these share, but the sum of a group is multiplied by its scales
before it joins the whole sum, in fp32; the weights themselves stay whole numbers, so nothing is rounded on the way.
That costs BT / g instructions a weight. INT4 has half the bytes of int8, so twice the weights a second to bring to 16
bits: see `matmul_tiles.grouped_tiles` for what that leaves an SM.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtkit.kernels.dispatch import num_multiprocessors
from trtkit.kernels.int4 import group_of
from trtkit.kernels.matmul import DECODE_ROWS
from trtkit.kernels.matmul_configs import (
    INTERPRETED,
    bench,
    configuration,
    grouped_candidates,
    grouped_configurations,
    launch_options,
    prune_grouped,
    starts_early,
    tile_of,
)
from trtkit.kernels.matmul_tiles import (
    GROUPED_WIDTHS,
    GROUPS,
    Tile,
    num_pieces,
    num_tiles,
    partial_elements,
    token_width,
)
from trtkit.kernels.triton_matmul import _add_pieces, _start_early, counters_of, is_quicker, widened_product
from trtkit.kernels.triton_widen import widen, widen_int4
from trtkit.kernels.triton_widen_groups import dequantise_groups


def linear(
    x_TI: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias_O: Tensor | None,
    *,
    zero: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `trtkit.kernels.matmul.linear`."""
    tokens, outputs = x_TI.shape[0], weight.shape[0]
    if out is None:
        out = torch.empty(tokens, outputs, dtype=x_TI.dtype, device=x_TI.device)
    if tokens == 0:
        return out
    fused = partial(fused_linear, x_TI, weight, scale, zero, bias_O, out)
    widened = partial(_widened, x_TI, weight, scale, zero, bias_O, out)
    group = group_of(weight, scale)
    if group not in GROUPS or x_TI.dtype is torch.float32:
        return widened()
    if tokens <= DECODE_ROWS:
        return fused()
    key = (*weight.shape, weight.dtype, group, x_TI.dtype, x_TI.device)
    return fused() if is_quicker(fused, widened, tokens, key, x_TI.device) else widened()


def fused_linear(
    x_TI: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias_O: Tensor | None,
    out: Tensor,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """One pass over the weight as it is stored, for any number of tokens; `tile` instead of the quickest one."""
    (tokens, inputs), outputs, device = x_TI.shape, weight.shape[0], x_TI.device
    if x_TI.stride(1) != 1:
        x_TI = x_TI.contiguous()
    group, packed, bits, item = _operand(weight, scale)
    width, multiprocessors = token_width(tokens, GROUPED_WIDTHS), num_multiprocessors(device)
    tried = grouped_candidates(width, item, group) if tile is None else (tile,)
    if len(tried) == 1:
        tile = tried[0]
    room = partial_elements(tried, tokens, (outputs, inputs), item, multiprocessors, width)
    partial_sums = torch.empty(room, dtype=torch.float32, device=device)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        chosen = tile_of(meta)
        tiles = num_tiles(chosen, width, tokens, outputs)
        return tiles, num_pieces(chosen, width, tiles, inputs, item, multiprocessors)

    kernel, fixed = (_grouped, {}) if tile is None else (_grouped.fn, configuration(tile).all_kwargs())
    early = starts_early(device)
    kernel[grid](
        x_TI, bits, scale, zero, bias_O, out, partial_sums, counters_of(device), tokens, outputs, inputs,
        bits.stride(0), x_TI.stride(0), out.stride(0), **_constants(scale, zero, bias_O, group, packed=packed),
        BT=width, EARLY=early, **launch_options(early=early), **fixed,
    )  # fmt: skip
    return out


def compile_ahead(x_TI: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias_O: Tensor | None) -> None:
    """Compile every tile for operands like these, on all cores of the host, without running any.

    A tile that does not compile is passed over here; whoever runs it is told.
    """
    if INTERPRETED:
        return
    group, packed, bits, item = _operand(weight, scale)
    numbers = torch.empty(16, dtype=torch.float32, device=x_TI.device)
    outputs, inputs = weight.shape[0], x_TI.shape[1]
    early, constants = starts_early(x_TI.device), _constants(scale, zero, bias_O, group, packed=packed)
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for width in GROUPED_WIDTHS:
            for tile in grouped_candidates(width, item, group):
                _grouped.fn.fn.warmup(
                    x_TI, bits, scale, zero, bias_O, x_TI, numbers, numbers.view(torch.int32), 1, outputs, inputs,
                    bits.stride(0), inputs, outputs, **constants, BT=width, EARLY=early, EVEN=inputs % tile.inputs == 0,
                    grid=(1,), **launch_options(early=early), **configuration(tile).all_kwargs(),
                )  # fmt: skip


def _operand(weight: Tensor, scale: Tensor) -> tuple[int, bool, Tensor, float]:
    """The group, whether it is INT4, the weight as the kernel reads it, and a weight's bytes."""
    packed = weight.dtype is torch.uint8
    return group_of(weight, scale), packed, weight.view(torch.int16) if packed else weight, 0.5 if packed else 1


def _constants(
    scale: Tensor, zero: Tensor | None, bias_O: Tensor | None, group: int, *, packed: bool
) -> dict[str, Any]:
    """What the kernel is compiled for, apart from its tile."""
    words = scale.shape[1] % 2 == 0 and all(
        numbers.element_size() == 2 and numbers.data_ptr() % 4 == 0 for numbers in (scale, zero) if numbers is not None
    )
    return {
        "PACKED": packed, "GROUP": group, "WORDS": words,
        "HAS_ZERO": zero is not None, "HAS_BIAS": bias_O is not None, "ASM": not INTERPRETED,
    }  # fmt: skip


def _widened(
    x_TI: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, bias_O: Tensor | None, out: Tensor
) -> Tensor:
    """torch's product, over a few output channels at a time."""

    def widen_rows(rows: slice, wide: Tensor) -> None:
        dequantise_groups(weight[rows], scale[rows], None if zero is None else zero[rows], wide)

    return widened_product(x_TI, weight.shape[0], widen_rows, bias_O, out)


@triton.autotune(
    configs=grouped_configurations(),
    key=["O", "I", "GROUP", "BT"],
    prune_configs_by={"early_config_prune": prune_grouped},
    do_bench=bench,
)
@triton.heuristics({"EVEN": lambda named: named["I"] % named["BI"] == 0})
@triton.jit(do_not_specialize=["T"])
def _grouped(
    x, weight, scale, zero, bias, out, partial, counters, T, O, I, stride_weight, stride_x, stride_out,
    PACKED: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    BT: tl.constexpr, LEFT: tl.constexpr, ASM: tl.constexpr, EARLY: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr,
    STAGES: tl.constexpr, WARPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    token_tiles = tl.cdiv(T, BT)
    tile = tl.program_id(0)  # those of the same channels are neighbours, so that L2 reads the weight once
    piece = tl.program_id(1)
    pieces = tl.num_programs(1)
    channel = (tile // token_tiles) * BO + tl.arange(0, BO)
    token = (tile % token_tiles) * BT + tl.arange(0, BT)
    row = tl.minimum(channel, O - 1).to(tl.int64)
    FOURTHS: tl.constexpr = 4 if PACKED else 1
    CHUNK: tl.constexpr = 64 if PACKED and GROUP < 64 else GROUP  # inputs of one product: a fourth is 16 at least
    LANES: tl.constexpr = CHUNK // FOURTHS
    LANE_GROUP: tl.constexpr = GROUP // FOURTHS
    lane = tl.arange(0, LANES)
    inputs = lane // LANE_GROUP * GROUP + lane % LANE_GROUP if CHUNK > GROUP else lane
    weights = weight + row[:, None] * stride_weight + lane[None, :]
    rows = x + token.to(tl.int64)[:, None] * stride_x + inputs[None, :]
    there = (token < T)[:, None]
    steps = tl.cdiv(I, BI)
    DTYPE: tl.constexpr = x.dtype.element_ty if ASM else tl.float32  # the interpreter cannot multiply bf16
    sums = tl.zeros([BO, BT] if LEFT else [BT, BO], tl.float32)
    first = steps * piece // pieces
    if EARLY:
        _start_early(weight + row * stride_weight + first * (BI // FOURTHS), BI // FOURTHS, STAGES)
    for step in tl.range(first, steps * (piece + 1) // pieces, num_stages=STAGES):
        for part in tl.static_range(BI // CHUNK):
            at = step * BI + part * CHUNK
            begin = weights + step * (BI // FOURTHS) + part * LANES
            bits = _stored(begin, (at + inputs < I)[None, :], EVEN)
            wanted = there if EVEN else there & (at + inputs < I)[None, :]
            for share in tl.static_range(CHUNK // GROUP):
                index = part * (CHUNK // GROUP) + share
                size = _of_group(scale, row, I, step, index, GROUP, BI, WORDS, EVEN).to(tl.float32)
                point = _of_group(zero, row, I, step, index, GROUP, BI, WORDS, EVEN)[:, None] if HAS_ZERO else size
                numbers = _numbers(bits, point, PACKED, HAS_ZERO, DTYPE, ASM)
                mine = wanted & (lane // LANE_GROUP == share)[None, :] if CHUNK > GROUP else wanted  # of one group
                product = _product(numbers, rows + at, mine, FOURTHS, LANE_GROUP, LEFT, tl.zeros_like(sums))
                sums += product * (size[:, None] if LEFT else size[None, :])
    if LEFT:
        sums = tl.trans(sums)
    last = pieces == 1
    if pieces > 1:
        sums, last = _add_pieces(sums, partial, counters, tile, piece, pieces, BT, BO)
    if last:
        _store(sums, out + token.to(tl.int64)[:, None] * stride_out, there, channel, O, bias, HAS_BIAS)


@triton.jit
def _stored(pointers, inside, EVEN: tl.constexpr):
    """Weights as they lie, each read once."""
    if EVEN:
        return tl.load(pointers, eviction_policy="evict_first")
    else:
        return tl.load(pointers, mask=inside, other=0, eviction_policy="evict_first")


@triton.jit
def _store(sums, rows, there, channel, O, bias, HAS_BIAS: tl.constexpr):
    """The result's tile, with its bias."""
    inside = channel < O
    if HAS_BIAS:
        sums += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(rows + channel[None, :], sums.to(rows.dtype.element_ty), mask=there & inside[None, :])


@triton.jit
def _numbers(bits, point, PACKED: tl.constexpr, HAS_ZERO: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Four tiles from one of packed INT4, one from one of int8."""
    if PACKED:
        return widen_int4(bits, point, HAS_ZERO, DTYPE, ASM)
    elif HAS_ZERO:
        return (widen(bits, "int8", DTYPE, ASM) - point.to(DTYPE),)
    else:
        return (widen(bits, "int8", DTYPE, ASM),)


@triton.jit
def _product(
    numbers, rows, wanted, FOURTHS: tl.constexpr, LANE_GROUP: tl.constexpr, LEFT: tl.constexpr, product
):  # fmt: skip
    """Weights of a group times its activations."""
    for fourth in tl.static_range(FOURTHS):
        tokens = tl.load(rows + fourth * LANE_GROUP, mask=wanted, other=0.0).to(numbers[fourth].dtype)
        if LEFT:
            product = tl.dot(numbers[fourth], tl.trans(tokens), product, input_precision="ieee")
        else:
            product = tl.dot(tokens, tl.trans(numbers[fourth]), product, input_precision="ieee")
    return product


@triton.jit
def _of_group(
    numbers, row, I, step, INDEX: tl.constexpr, GROUP: tl.constexpr, BI: tl.constexpr, WORDS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """The number of each row for group `INDEX` of a step. Two of 16 bits come as one of 32, which may be copied ahead."""
    groups = I // GROUP
    COUNT: tl.constexpr = BI // GROUP
    inside = tl.full(row.shape, step * COUNT + INDEX, tl.int32) < groups
    if WORDS and COUNT % 2 == 0:
        place = numbers.to(tl.pointer_type(tl.int32)) + row * (groups // 2) + step * (COUNT // 2) + INDEX // 2
        pair = tl.load(place) if EVEN else tl.load(place, mask=inside, other=0)
        half = pair >> 16 if INDEX % 2 else pair
        return half.to(tl.int16).to(numbers.dtype.element_ty, bitcast=True)
    place = numbers + row * groups + step * COUNT + INDEX
    return tl.load(place) if EVEN else tl.load(place, mask=inside, other=0.0)
