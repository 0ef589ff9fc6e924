# ruff: noqa: ANN001, ANN202, PLR0124
# mypy: disable-error-code="no-untyped-def"
"""The Triton kernels behind `trtkit.kernels.sampling`; that module says what each computes, and its twins define it.

Imported only where Triton is. Greedy runs in two passes, so that even one row keeps many processors busy: tiles of the
vocabulary first, then the best of the tiles. A logit and its token travel as one integer, whose order is "larger
logit first, then lower token", so neither pass has ties to break.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtkit.kernels.sampling import GREEDY_TILE, NOT_A_NUMBER, workspace_size

_NOT_A_NUMBER = tl.constexpr(NOT_A_NUMBER)


def greedy(logits_RV: Tensor, *, out: Tensor | None = None, workspace: Tensor | None = None) -> Tensor:
    """See `trtkit.kernels.sampling.greedy`."""
    rows, vocab_size = logits_RV.shape
    if out is None:
        out = torch.empty(rows, dtype=torch.int32, device=logits_RV.device)
    if rows == 0:
        return out
    if logits_RV.stride(1) != 1:
        logits_RV = logits_RV.contiguous()
    if workspace is None:
        workspace = torch.empty(workspace_size(rows, vocab_size), dtype=torch.int64, device=logits_RV.device)
    tiles = triton.cdiv(vocab_size, GREEDY_TILE)
    _best_of_tile[(tiles, rows)](logits_RV, workspace, logits_RV.stride(0), vocab_size, TILE=GREEDY_TILE, num_warps=8)
    _best_of_tiles[(rows,)](workspace, out, tiles, TILES_PAD=triton.next_power_of_2(tiles), num_warps=1)
    return out


@triton.jit
def _best_of_tile(logits, best, stride_row, vocab_size, TILE: tl.constexpr):
    tile = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    token = tile * TILE + tl.arange(0, TILE)
    value = tl.load(logits + row * stride_row + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    # NaN counts as infinity: either makes the row invalid. Adding zero makes -0.0 equal to 0.0.
    value = tl.where(value != value, float("inf"), value) + 0.0
    bits = value.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)
    tl.store(best + row * tl.num_programs(0) + tile, tl.max(key, 0))


@triton.jit
def _best_of_tiles(best, tokens, tiles, TILES_PAD: tl.constexpr):
    row = tl.program_id(0)
    tile = tl.arange(0, TILES_PAD)
    key = tl.load(best + row.to(tl.int64) * tiles + tile, mask=tile < tiles, other=-0x7FFFFFFFFFFFFFFF)
    winner = tl.max(key, 0)
    value = winner >> 32
    # The keys of infinity and of its negative, which only wins where every logit is.
    finite = (value < 0x7F800000) & (value > -0x7F800001)
    token = 0x7FFFFFFF - (winner & 0x7FFFFFFF)
    tl.store(tokens + row, tl.where(finite, token, _NOT_A_NUMBER).to(tl.int32))
