"""Triton kernels that do one thing only, so that what they reach is the machine's limit. Imported only on CUDA."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

READ_SHAPES = ((4096, 4, 16), (8192, 8, 16), (16384, 8, 8), (8192, 4, 32))
"""Elements of a tile, warps, tiles a program reads: the best one counts."""


def read_all(source: Tensor, out: Tensor, *, tile: int, warps: int, tiles: int) -> int:
    """Read an int32 buffer once and keep a sum per program; returns how many bytes were read."""
    programs = source.numel() // (tile * tiles)
    assert programs <= out.numel()
    _read_all[(programs,)](source, out, tiles, TILE=tile, num_warps=warps)
    return programs * tile * tiles * source.element_size()


def nothing(flag: Tensor) -> None:
    """Launch a kernel of one program that does nothing."""
    _nothing[(1,)](flag, num_warps=1)


def reads_right(device: torch.device) -> bool:
    """Whether `read_all` reads every element, on a small buffer."""
    tile, warps, tiles = READ_SHAPES[0]
    source = torch.arange(tile * tiles * 3, dtype=torch.int32, device=device)
    out = torch.zeros(3, dtype=torch.int32, device=device)
    read_all(source, out, tile=tile, warps=warps, tiles=tiles)
    return bool(torch.equal(out, source.view(3, -1).sum(1).to(torch.int32)))


@triton.jit
def _read_all(source, out, tiles, TILE: tl.constexpr):
    program = tl.program_id(0)
    lane = tl.arange(0, TILE)
    first = source + program.to(tl.int64) * tiles * TILE + lane
    total = tl.zeros([TILE], tl.int32)
    for index in range(tiles):
        total += tl.load(first + index * TILE)
    tl.store(out + program, tl.sum(total, 0))


@triton.jit
def _nothing(flag):
    tl.program_id(0)
