# ruff: noqa: ANN001, ANN201, ANN401, PLR0913, PLR0917, RET505, SIM300
# mypy: disable-error-code="no-untyped-def"
"""What the attention kernels share: the type products run in, tiles of a paged cache, and how tiles are chosen.

Imported only where Triton is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtkit.kernels.matmul_configs import bench
from trtkit.kernels.triton_widen import widen

MIN_DOT = 16
"""Rows a tensor-core product has at least; fewer query heads are padded."""
LOG2_E = 1.4426950408889634
_STAGED_BYTES = 128 * 1024
"""Keys and values a program may stage; queries and exchanges need more, and an A100 has 163 KiB for one block."""
_LOGITS_PER_WARP = {(True, False): 2048, (True, True): 512, (False, False): 512, (False, True): 256}
"""Logits a warp may hold on (Hopper, in fp32) before registers spill, as compiled code shows: Hopper multiplies out
of shared memory, others out of registers, and fp32 products are three of TF32, whose parts take registers too."""
_SHARED_KIB = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
"""Shared memory one program can have, by compute capability, from NVIDIA's tables (datasheet)."""
_SHARED_KIB_ANYWHERE = 99
_HELD = 128
"""Numbers of the output, in fp32, that a thread may hold on to; a thread has 255 registers."""
_FLOAT8 = torch.float8_e4m3fn


@cache
def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, which was decided when Triton was imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


ASSEMBLY = tl.constexpr(not interpreting())


def product_type(queries: torch.dtype, stored: torch.dtype) -> tl.dtype:
    """What queries and keys are multiplied in: the queries' own 16-bit type where the cache fits it, else fp32.

    The interpreter multiplies bf16 as the integers it keeps them in, so there it is fp32 too.
    """
    if queries is torch.float16 and stored in (queries, _FLOAT8):
        return tl.float16
    if queries is torch.bfloat16 and stored in (queries, _FLOAT8) and not interpreting():
        return tl.bfloat16
    return tl.float32


def padded(dim: int) -> int:
    """Elements of a head that products run over."""
    return max(MIN_DOT, int(triton.next_power_of_2(dim)))


def readable(stored: Tensor) -> Tensor:
    """The cache as kernels read it: FP8 as bytes, which `as_product` turns into numbers on every GPU."""
    return stored.view(torch.uint8) if stored.dtype is _FLOAT8 else stored


def autotuned(configs: Sequence[triton.Config], *, spare: Sequence[triton.Config], **options: Any):
    """`triton.autotune` over the configurations whose tiles fit; the first alone under the interpreter.

    The kernel names its cache `cache`, its tile of keys TILE, its padded head dim DIM_PAD, and what it stages of a
    slot SIDES: 1 for keys, 2 for keys and values. `spare` are for shapes that none of `configs` fits, such as heads of
    256 in fp32; the first that fits is taken. `options` are `triton.autotune`'s.
    """
    chosen = list(configs[:1] if interpreting() else (*configs, *spare))
    prune = partial(_fitting, spare=tuple(spare))
    return triton.autotune(chosen, prune_configs_by={"early_config_prune": prune}, do_bench=bench, **options)


def _fitting(
    configs: list[triton.Config], arguments: dict[str, Any], *, spare: tuple[triton.Config, ...], **constants: Any
) -> list[triton.Config]:
    """Those without spills and within shared memory, but for tiles less than half as large as the largest of them."""
    known = {**arguments, **constants}
    architecture = int(triton.runtime.driver.active.get_current_target().arch)
    wide = known["DOT"] == tl.float32
    most, longest = _LOGITS_PER_WARP[architecture >= 90, wide], 64 if wide else 128
    limit = _SHARED_KIB.get(architecture, _SHARED_KIB_ANYWHERE) * 1024

    def fits(config: triton.Config) -> bool:
        small = config.kwargs["TILE"] <= longest and _staged_bytes(config, known) <= _STAGED_BYTES
        held = _rows(config, known) * known["DIM_PAD"] // (32 * config.num_warps)
        small = small and _logits_per_warp(config, known) <= most and (held <= _HELD or known["SIDES"] == 1)
        return small and _shared_bytes(config, known, wide=wide) <= limit

    fit = [one for one in configs if one not in spare and fits(one)]
    if not fit:
        smallest = min(configs, key=lambda one: _shared_bytes(one, known, wide=wide))
        return next(([one] for one in spare if one in configs and fits(one)), [smallest])
    largest = max(_logits_per_warp(one, known) for one in fit)
    return [one for one in fit if 2 * _logits_per_warp(one, known) >= largest]


def _rows(config: triton.Config, known: dict[str, Any]) -> int:
    """Rows of the product with a tile of keys."""
    return int(config.kwargs.get("ROWS") or config.kwargs.get("QUERIES") or known.get("LANES") or MIN_DOT)


def _logits_per_warp(config: triton.Config, known: dict[str, Any]) -> int:
    return int(_rows(config, known) * config.kwargs["TILE"] // config.num_warps)


def _staged_bytes(config: triton.Config, known: dict[str, Any]) -> int:
    """Keys and values on their way. Half of the stages hold block tables, see `key_offsets`."""
    slot_bytes = known["SIDES"] * known["DIM_PAD"] * known["cache"].element_size()
    return int(max(1, (config.num_stages - 1) // 2) * config.kwargs["TILE"] * slot_bytes)


def _shared_bytes(config: triton.Config, known: dict[str, Any], *, wide: bool) -> int:
    """What a program takes of shared memory, or a little more, as compiled code shows; fp32 operands lie there twice."""
    value_bytes, rows = int(known["DIM_PAD"]) * (4 if wide else 2), _rows(config, known)
    if known["SIDES"] == 1:  # keys stay, queries pass
        return value_bytes * (int(config.kwargs["TILE"]) * (1 + wide) + rows * int(config.num_stages))
    staged = _staged_bytes(config, known)
    if config.num_stages < 5:  # of what is staged once, keys may still lie there twice
        staged += staged // 2
    return staged + value_bytes * rows * (2 + wide)


@triton.jit
def as_product(tile, DOT: tl.constexpr):
    """A loaded tile of keys or values in the type products run in."""
    if tile.dtype == tl.uint8:
        if DOT == tl.float32:
            return widen(tile, "fp8", tl.float16, ASSEMBLY).to(tl.float32)
        else:
            return widen(tile, "fp8", DOT, ASSEMBLY)
    else:
        return tile.to(DOT)


@triton.jit
def key_offsets(
    table, first, end, head,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Elements from the start of a layer to the keys of the slots `first` + [0, TILE) below `end`, int64 [TILE].

    `first` is a multiple of TILE. Triton stages the table as it stages the keys that hang on it, so of `num_stages`
    only every second one holds keys: 5 stages keep two tiles of keys in flight, 7 keep three. Few table entries are
    loaded one by one: from a table loaded as a tensor Triton 3.6 makes code around which ptxas waits for every
    single tensor-core instruction of prefill (its remark C7515), and two fifths more instructions in decode.
    """
    lane = tl.arange(0, TILE)
    if BLOCK % TILE == 0:
        # The tile lies inside one block.
        block = tl.load(table + first // BLOCK).to(tl.int64)
        return (block * (2 * HEADS) + head) * (BLOCK * DIM) + (first % BLOCK) * DIM + lane * DIM
    elif (TILE % BLOCK == 0) & (TILE // BLOCK <= 8):
        column = table + first // BLOCK
        block = tl.load(column) + lane * 0
        for index in tl.static_range(1, TILE // BLOCK):
            found = tl.load(column + index, mask=first + index * BLOCK < end, other=0)
            block = tl.where(lane >= index * BLOCK, found, block)
        return (block.to(tl.int64) * (2 * HEADS) + head) * (BLOCK * DIM) + (lane % BLOCK) * DIM
    else:
        slot = first + lane
        block = tl.load(table + slot // BLOCK, mask=slot < end, other=0).to(tl.int64)
        return (block * (2 * HEADS) + head) * (BLOCK * DIM) + (slot % BLOCK) * DIM
