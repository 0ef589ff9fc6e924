# ruff: noqa: ANN001, ANN202, E741, PLR0912, PLR0913, PLR0915, PLR0917
# mypy: disable-error-code="no-untyped-def"
"""The Triton kernels behind `trtkit.kernels.matmul`; that module says what each computes, and its twins define it.

Imported only where Triton is. Few tokens are bound by reading the weights once, so everything about `_linear` serves
that: 16-byte copies into shared memory, several stages ahead, from enough programs to fill every SM; a program owns
BO output channels, and tokens that a tile has room for but nobody sent are not read. Where output channels are too few to fill the GPU, the sum over inputs is cut in pieces; the program that finishes last adds
them, in order, so the result is the same every time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtkit.kernels.dispatch import num_multiprocessors
from trtkit.kernels.matmul import DECODE_ROWS
from trtkit.kernels.matmul_configs import (
    INTERPRETED,
    bench,
    candidates,
    configuration,
    configurations,
    launch_options,
    median_ms,
    prune,
    starts_early,
    tile_of,
)
from trtkit.kernels.matmul_tiles import (
    FUSED_ROWS,
    MAX_TILES,
    MEASURED_ROWS,
    WIDTHS,
    Tile,
    channels_at_once,
    num_pieces,
    num_tiles,
    partial_elements,
    token_width,
)
from trtkit.kernels.scaled_mm import fp8_way, scaled_product
from trtkit.kernels.triton_quantise import dequantise, kind_of, quantise_rows_fp8
from trtkit.kernels.triton_widen import widen


def linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    scale_O: Tensor | None,
    bias_O: Tensor | None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """See `trtkit.kernels.matmul.linear`; scales of groups are `triton_matmul_grouped`'s."""
    tokens, outputs = x_TI.shape[0], weight_OI.shape[0]
    if out is None:
        out = torch.empty(tokens, outputs, dtype=x_TI.dtype, device=x_TI.device)
    if tokens == 0:
        return out
    if x_TI.dtype is torch.float32:  # no tensor core takes it at full width; nothing here is meant for it
        return _widened(x_TI, weight_OI, scale_O, bias_O, out)
    few, quantised = tokens <= DECODE_ROWS, scale_O is not None
    # 8-bit weights for few tokens are ours alone, 16-bit ones for many torch's; between them the clock decides.
    fused = few if few == quantised else _fused_is_quicker(x_TI, weight_OI, scale_O, out)
    run = fused_linear if fused else _widened
    return run(x_TI, weight_OI, scale_O, bias_O, out)


def fused_linear(
    x_TI: Tensor,
    weight_OI: Tensor,
    scale_O: Tensor | None,
    bias_O: Tensor | None,
    out: Tensor,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """One pass over the weight as it is stored, for any number of tokens; `tile` instead of the quickest one."""
    tokens, (outputs, inputs) = x_TI.shape[0], weight_OI.shape
    if x_TI.stride(1) != 1:
        x_TI = x_TI.contiguous()
    kind, bits = kind_of(weight_OI)
    width, item = token_width(tokens), bits.element_size()
    multiprocessors = num_multiprocessors(x_TI.device)
    tried = candidates(width, item) if tile is None else (tile,)
    room = partial_elements(tried, tokens, (outputs, inputs), item, multiprocessors, width)
    partial = torch.empty(room, dtype=torch.float32, device=x_TI.device)

    def grid(meta: dict[str, Any]) -> tuple[int, int]:
        chosen = tile_of(meta)
        tiles = num_tiles(chosen, width, tokens, outputs)
        return tiles, num_pieces(chosen, width, tiles, inputs, item, multiprocessors)

    kernel, fixed = (_linear, {}) if tile is None else (_linear.fn, configuration(tile).all_kwargs())
    early = starts_early(x_TI.device)
    kernel[grid](
        x_TI, bits, scale_O, bias_O, out, partial, counters_of(x_TI.device), tokens, outputs, inputs,
        x_TI.stride(0), out.stride(0), KIND=kind, HAS_SCALE=scale_O is not None, HAS_BIAS=bias_O is not None,
        BT=width, ASM=not INTERPRETED, EARLY=early, **launch_options(early=early), **fixed,
    )  # fmt: skip
    return out


def forget_counts(device: torch.device) -> None:
    """After a launch that failed, or was wrong: no tile has arrived anywhere."""
    counters_of(device).zero_()


def compile_ahead(x_TI: Tensor, weight_OI: Tensor, scale_O: Tensor | None, *, has_bias: bool) -> None:
    """Compile every tile for operands like these, on all cores of the host, without running any.

    A tile that does not compile is passed over here; whoever runs it is told.
    """
    if INTERPRETED:
        return
    kind, bits = kind_of(weight_OI)
    numbers = torch.empty(16, dtype=torch.float32, device=x_TI.device)
    width_O, width_I = weight_OI.shape
    early = starts_early(x_TI.device)
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for width in WIDTHS:
            for tile in candidates(width, bits.element_size()):
                _linear.fn.fn.warmup(
                    x_TI, bits, scale_O, x_TI if has_bias else None, x_TI, numbers, numbers.view(torch.int32), 1,
                    width_O, width_I, width_I, width_O, KIND=kind, HAS_SCALE=scale_O is not None, HAS_BIAS=has_bias,
                    BT=width, ASM=True, EARLY=early, EVEN=True, grid=(1,), **launch_options(early=early),
                    **configuration(tile).all_kwargs(),
                )  # fmt: skip


def fp8_linear(
    x_TI: Tensor, weight_OI: Tensor, scale_O: Tensor, bias_O: Tensor | None, *, out: Tensor | None = None
) -> Tensor:
    """See `trtkit.kernels.matmul.fp8_linear`."""
    if fp8_way(x_TI.device, *weight_OI.shape)[0] == "dequantise":
        return linear(x_TI, weight_OI, scale_O, bias_O, out=out)
    return fp8_product(*quantise_rows_fp8(x_TI), weight_OI, scale_O, bias_O, x_TI.dtype, out=out)


def fp8_product(
    quantised_TI: Tensor,
    scale_T1: Tensor,
    weight_OI: Tensor,
    scale_O: Tensor,
    bias_O: Tensor | None,
    dtype: torch.dtype,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """See `trtkit.kernels.matmul.fp8_product`."""
    way, padding = fp8_way(quantised_TI.device, *weight_OI.shape)
    if way == "dequantise":
        return linear((quantised_TI.float() * scale_T1).to(dtype), weight_OI, scale_O, bias_O, out=out)
    product = scaled_product(quantised_TI, scale_T1, weight_OI, scale_O, way, padding)
    if bias_O is not None:
        product += bias_O
    if out is None:
        return product.to(dtype)
    return out.copy_(product)


def _fused_is_quicker(x_TI: Tensor, weight_OI: Tensor, scale_O: Tensor | None, out: Tensor) -> bool:
    operands = (x_TI, weight_OI, scale_O, None, out)
    key = (*weight_OI.shape, weight_OI.dtype, x_TI.dtype, x_TI.device)
    return is_quicker(lambda: fused_linear(*operands), lambda: _widened(*operands), x_TI.shape[0], key, x_TI.device)


def is_quicker(
    fused: Callable[[], Tensor],
    widened: Callable[[], Tensor],
    tokens: int,
    key: tuple[object, ...],
    device: torch.device,
) -> bool:
    """Whether our own product beats torch's, before which 8-bit weights are widened: measured once for a shape.

    The first product of a shape waits for the device; inside a graph's capture, where nothing may, and off CUDA the
    modeled bound decides.
    """
    if tokens > MEASURED_ROWS or device.type != "cuda":
        return tokens <= FUSED_ROWS
    key, known = (triton.next_power_of_2(tokens), *key), _quicker()
    if key not in known:
        if torch.cuda.is_current_stream_capturing():
            return tokens <= FUSED_ROWS
        known[key] = median_ms(fused) <= median_ms(widened)
    return known[key]


@cache
def _quicker() -> dict[tuple[object, ...], bool]:
    return {}


def _widened(x_TI: Tensor, weight_OI: Tensor, scale_O: Tensor | None, bias_O: Tensor | None, out: Tensor) -> Tensor:
    if scale_O is None:
        torch.mm(x_TI, weight_OI.T, out=out)
        return out if bias_O is None else out.add_(bias_O)

    def widen_rows(rows: slice, wide: Tensor) -> None:
        dequantise(weight_OI[rows], scale_O[rows], wide)

    return widened_product(x_TI, weight_OI.shape[0], widen_rows, bias_O, out)


def widened_product(
    x_TI: Tensor, outputs: int, widen_rows: Callable[[slice, Tensor], None], bias_O: Tensor | None, out: Tensor
) -> Tensor:
    """torch's product, over a few output channels at a time, each of which `widen_rows` writes out first."""
    tokens, inputs = x_TI.shape
    step = channels_at_once(tokens, outputs, inputs, num_multiprocessors(x_TI.device))
    workspace = torch.empty(step, inputs, dtype=x_TI.dtype, device=x_TI.device)
    for start in range(0, outputs, step):
        rows = slice(start, min(outputs, start + step))
        wide = workspace[: rows.stop - start]
        widen_rows(rows, wide)
        torch.mm(x_TI, wide.T, out=out[:, rows])
    return out if bias_O is None else out.add_(bias_O)


@cache
def counters_of(device: torch.device) -> Tensor:
    """One zero per tile; every launch leaves them zero again. Launches that share them must share a stream."""
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


@triton.autotune(
    configs=configurations(),
    key=["O", "I", "BT"],
    prune_configs_by={"early_config_prune": prune},
    do_bench=bench,
)
@triton.heuristics({"EVEN": lambda named: named["I"] % named["BI"] == 0})
@triton.jit(do_not_specialize=["T"])
def _linear(
    x, weight, scale, bias, out, partial, counters, T, O, I, stride_x, stride_out,
    KIND: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, BT: tl.constexpr, LEFT: tl.constexpr,
    ASM: tl.constexpr, EARLY: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, STAGES: tl.constexpr,
    WARPS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    token_tiles = tl.cdiv(T, BT)
    tile = tl.program_id(0)  # those of the same channels are neighbours, so that L2 reads the weight once
    piece = tl.program_id(1)
    pieces = tl.num_programs(1)
    channel = (tile // token_tiles) * BO + tl.arange(0, BO)
    token = (tile % token_tiles) * BT + tl.arange(0, BT)
    lane = tl.arange(0, BI)
    steps = tl.cdiv(I, BI)
    starts = weight + tl.minimum(channel, O - 1).to(tl.int64) * I
    weights = starts[:, None] + lane[None, :]
    rows = x + token.to(tl.int64)[:, None] * stride_x + lane[None, :]
    there = (token < T)[:, None]
    DTYPE: tl.constexpr = x.dtype.element_ty if ASM else tl.float32  # the interpreter cannot multiply bf16
    sums = tl.zeros([BO, BT] if LEFT else [BT, BO], tl.float32)
    first = steps * piece // pieces
    if EARLY:
        _start_early(starts + first * BI, BI, STAGES)
    for step in tl.range(first, steps * (piece + 1) // pieces, num_stages=STAGES):
        at = step * BI
        if EVEN:
            bits = tl.load(weights + at, eviction_policy="evict_first")
            tokens = tl.load(rows + at, mask=there, other=0.0)
        else:
            inside = (at + lane < I)[None, :]
            bits = tl.load(weights + at, mask=inside, other=0)
            tokens = tl.load(rows + at, mask=there & inside, other=0.0)
        wide = widen(bits, KIND, DTYPE, ASM)
        if LEFT:
            sums = tl.dot(wide, tl.trans(tokens.to(DTYPE)), sums, input_precision="ieee")
        else:
            sums = tl.dot(tokens.to(DTYPE), tl.trans(wide), sums, input_precision="ieee")
    if LEFT:
        sums = tl.trans(sums)
    last = pieces == 1
    if pieces > 1:
        sums, last = _add_pieces(sums, partial, counters, tile, piece, pieces, BT, BO)
    if last:
        inside = channel < O
        if HAS_SCALE:
            sums *= tl.load(scale + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
        if HAS_BIAS:
            sums += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
        place = out + token.to(tl.int64)[:, None] * stride_out + channel[None, :]
        tl.store(place, sums.to(out.dtype.element_ty), mask=there & inside[None, :])


@triton.jit
def _start_early(starts, BI: tl.constexpr, STAGES: tl.constexpr):
    """Ask L2 for the first weights, which no kernel writes, then wait for the kernel before, which writes the rest."""
    LINE: tl.constexpr = 1024 // starts.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = (STAGES - 1) * BI // LINE
    for line in tl.static_range(LINES):
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [starts + line * LINE],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _add_pieces(sums, partial, counters, tile, piece, pieces, BT: tl.constexpr, BO: tl.constexpr):
    """Leave this program's sums for the last one of its tile; whether this is it, and then the whole sum."""
    flat = tl.arange(0, BT)[:, None] * BO + tl.arange(0, BO)[None, :]
    mine = partial + tile.to(tl.int64) * pieces * (BO * BT) + flat
    tl.store(mine + piece * (BO * BT), sums)
    tl.debug_barrier()  # every thread's part is stored before one thread says so
    last = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == pieces - 1
    if last:
        sums = tl.zeros([BT, BO], tl.float32)
        for index in range(pieces):
            sums += tl.load(mine + index * (BO * BT), cache_modifier=".cg")
        tl.store(counters + tile, 0)
    return sums, last
