# ruff: noqa: ANN001, ANN202, PLR0913, PLR0917
# mypy: disable-error-code="no-untyped-def"
"""Compaction over all layers of one sequence; `trtkit.kernels.paged` says what it does, and a twin defines it.

Imported only where Triton is. A program makes a tile of one (layer, KV head)'s moves and finds each by itself, with
binary searches over what is kept. Sources lie behind what stays and targets before it, so programs never meet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOVES = 32


def compact_layers(
    storage: Tensor,
    table_M: Tensor,
    keep_RK: Tensor,
    length: int,
    mass_LHC: Tensor | None,
    positions_LHC: Tensor | None,
) -> None:
    """See `trtkit.kernels.paged.compact_layers`."""
    _, blocks, _, kv_heads, block, dim = storage.shape
    rows, kept = keep_RK.shape
    if kept >= length or rows == 0:
        return
    # Bytes are copied, whatever they stand for.
    stored = storage.view(torch.uint8) if storage.element_size() == 1 else storage
    mass = _strided(mass_LHC, keep_RK)
    positions = _strided(positions_LHC, keep_RK)
    _compact[(triton.cdiv(min(kept, length - kept), _MOVES), rows)](
        stored, table_M.contiguous(), keep_RK.contiguous(), mass[0], positions[0],
        kept, length, kept.bit_length(), blocks, *mass[1:], *positions[1:],
        HEADS=kv_heads, DIM=dim, DIM_PAD=triton.next_power_of_2(dim), BLOCK=block, MOVES=_MOVES,
        HAS_MASS=mass_LHC is not None, HAS_POSITIONS=positions_LHC is not None, num_warps=4,
    )  # fmt: skip


def _strided(ledger: Tensor | None, instead: Tensor) -> tuple[Tensor, int, int]:
    """A ledger [L, H, C] and its strides; any tensor where there is none."""
    return (instead, 0, 0) if ledger is None else (ledger, ledger.stride(0), ledger.stride(1))


_FREE = [
    "kept", "length", "steps", "blocks", "stride_mass", "stride_mass_head", "stride_position",
    "stride_position_head",
]  # fmt: skip


@triton.jit(do_not_specialize=_FREE, do_not_specialize_on_alignment=["table", "keep", "mass", "positions"])
def _compact(
    cache, table, keep, mass, positions,
    kept, length, steps, blocks, stride_mass, stride_mass_head, stride_position, stride_position_head,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM_PAD: tl.constexpr, BLOCK: tl.constexpr, MOVES: tl.constexpr,
    HAS_MASS: tl.constexpr, HAS_POSITIONS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    layer = (row // HEADS).to(tl.int64)
    head = row % HEADS
    keep += row.to(tl.int64) * kept
    in_front = _kept_in_front(keep, kept, steps)
    move = tl.program_id(0) * MOVES + tl.arange(0, MOVES)
    wanted = in_front + move < kept
    source = tl.load(keep + in_front + move, mask=wanted, other=0).to(tl.int32)
    target = _hole(keep, in_front, move, steps)
    # A slot out of range, which a broken policy may have named, moves nothing.
    wanted &= (source >= kept) & (source < length) & (target < kept)
    dim = tl.arange(0, DIM_PAD)
    copied = wanted[:, None] & (dim < DIM)[None, :]
    cache += layer * blocks * (2 * HEADS * BLOCK * DIM)
    from_place = cache + _offset(table, source, wanted, head, HEADS, BLOCK, DIM)
    to_place = cache + _offset(table, target, wanted, head, HEADS, BLOCK, DIM)
    from_place = from_place[:, None] + dim[None, :]
    to_place = to_place[:, None] + dim[None, :]
    side: tl.constexpr = HEADS * BLOCK * DIM
    key = tl.load(from_place, mask=copied)
    value = tl.load(from_place + side, mask=copied)
    tl.store(to_place, key, mask=copied)
    tl.store(to_place + side, value, mask=copied)
    if HAS_MASS:
        mass += layer * stride_mass + head * stride_mass_head
        tl.store(mass + target, tl.load(mass + source, mask=wanted), mask=wanted)
    if HAS_POSITIONS:
        positions += layer * stride_position + head * stride_position_head
        tl.store(positions + target, tl.load(positions + source, mask=wanted), mask=wanted)


@triton.jit
def _kept_in_front(keep, kept, steps):
    """How many of the ascending slots lie below their own number: those stay where they are."""
    low = 0
    high = kept
    for _ in range(steps):
        middle = (low + high) // 2
        below = (low < high) & (tl.load(keep + tl.minimum(middle, kept - 1)).to(tl.int32) < kept)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, tl.minimum(middle, high))
    return low


@triton.jit
def _hole(keep, in_front, move, steps):
    """The `move`-th slot, from 0, that is not among the first `in_front` of `keep`.

    keep[i] - i holes lie before the i-th kept slot, so the hole lies behind as many kept slots as have <= `move`.
    """
    low = move * 0
    high = low + in_front
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        before = tl.load(keep + middle, mask=open_, other=0).to(tl.int32) - middle
        passed = open_ & (before <= move)
        low = tl.where(passed, middle + 1, low)
        high = tl.where(open_ & (before > move), middle, high)
    return move + low


@triton.jit
def _offset(table, slot, wanted, head, HEADS: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr):
    """Elements from the start of a layer to a slot's key."""
    block = tl.load(table + slot // BLOCK, mask=wanted, other=0).to(tl.int64)
    return (block * (2 * HEADS) + head) * (BLOCK * DIM) + (slot % BLOCK) * DIM
