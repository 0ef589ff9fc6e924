# ruff: noqa: ANN001, ANN202, PLR0124, PLR0913, PLR0917
# mypy: disable-error-code="no-untyped-def"
"""The Triton kernels behind `trtkit.kernels.sampling`; that module says what each computes, and its twins define it.

Imported only where Triton is. Greedy runs in two passes, so that even one row keeps many processors busy: tiles of the
vocabulary first, then the best of the tiles. A logit and its token travel as one integer, whose order is "larger
logit first, then lower token", so neither pass has ties to break.

Sampling sorts nothing. Logits become integers of the same order, and the borders of top-k, of top-p and of the draw are
found by bisection over those integers: each step reads the row once, from cache, and sums what lies above a threshold.
Equal logits lie between two thresholds, where the order is by token, so a border inside them is a division.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trtkit.kernels.sampling import GREEDY_TILE, NOT_A_NUMBER, workspace_size

_NOT_A_NUMBER = tl.constexpr(NOT_A_NUMBER)
_SHIFTS = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
"""Low bits that a type's values leave empty in float32: as many steps fewer."""


def greedy(logits_RV: Tensor, *, out: Tensor | None = None, workspace: Tensor | None = None) -> Tensor:
    """See `trtkit.kernels.sampling.greedy`."""
    rows, vocab_size = logits_RV.shape
    if logits_RV.dtype is torch.float64:
        logits_RV = logits_RV.float()
    if out is None:
        out = torch.empty(rows, dtype=torch.int32, device=logits_RV.device)
    if rows == 0:
        return out
    if logits_RV.stride(1) != 1:
        logits_RV = logits_RV.contiguous()
    if workspace is None:
        workspace = torch.empty(workspace_size(rows, vocab_size), dtype=torch.int64, device=logits_RV.device)
    tiles = triton.cdiv(vocab_size, GREEDY_TILE)
    _best_of_tile[(rows, tiles)](logits_RV, workspace, logits_RV.stride(0), vocab_size, TILE=GREEDY_TILE, num_warps=8)
    _best_of_tiles[(rows,)](workspace, out, tiles, TILES_PAD=triton.next_power_of_2(tiles), num_warps=1)
    return out


def sample_rows(
    logits_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, uniform_R: Tensor
) -> Tensor:
    """See `trtkit.kernels.sampling.sample_rows`."""
    rows, vocab_size = logits_RV.shape
    out = torch.empty(rows, dtype=torch.int32, device=logits_RV.device)
    if rows == 0:
        return out
    if logits_RV.dtype is torch.float64:
        logits_RV = logits_RV.float()
    if logits_RV.stride(1) != 1:
        logits_RV = logits_RV.contiguous()
    tile = min(GREEDY_TILE, triton.next_power_of_2(vocab_size))
    _sample[(rows,)](
        logits_RV, temperature_R.contiguous(), top_k_R.contiguous(), top_p_R.contiguous(), uniform_R.contiguous(),
        out, logits_RV.stride(0), vocab_size, TILE=tile, SHIFT=_SHIFTS[logits_RV.dtype],
        num_warps=max(1, min(32, tile // 128)),
    )  # fmt: skip
    return out


@triton.jit
def _best_of_tile(logits, best, stride_row, vocab_size, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # the axis that may be longest
    tile = tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    value = tl.load(logits + row * stride_row + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
    # NaN counts as infinity: either makes the row invalid. Adding zero makes -0.0 equal to 0.0.
    value = tl.where(value != value, float("inf"), value) + 0.0
    bits = value.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)
    tl.store(best + row * tl.num_programs(1) + tile, tl.max(key, 0))


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


@triton.jit(do_not_specialize_on_alignment=["temperatures", "top_ks", "top_ps", "uniforms", "tokens"])
def _sample(
    logits, temperatures, top_ks, top_ps, uniforms, tokens, stride_row, vocab_size,
    TILE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    row_index = tl.program_id(0)
    row = logits + row_index.to(tl.int64) * stride_row
    peak = _peak(row, vocab_size, TILE)
    finite = (peak < float("inf")) & (peak > float("-inf"))
    temperature = tl.load(temperatures + row_index)
    drawn = finite & (temperature > 0)
    # Where all but the largest weigh nothing, or all weigh the same, bounds make no difference; 0 * inf would.
    rate = 1.0 / tl.minimum(tl.maximum(temperature.to(tl.float32), 1e-30), 1e30)
    top = _key(peak, SHIFT)
    # Kept are all tokens above the key `floor`, and the first `ties` of those at it; together they weigh `kept`.
    floor = top
    ties = 1
    place = 0
    at = top
    if drawn:
        floor = top * 0 + (-0x7F800001 >> SHIFT)  # the key of minus infinity
        ties = vocab_size
        _, kept = _above(row, vocab_size, floor, peak, rate, TILE, SHIFT)
        top_k = tl.load(top_ks + row_index).to(tl.int32)
        if (top_k > 0) & (top_k < vocab_size):
            floor = _lowest(row, vocab_size, floor, top, top_k, peak, rate, True, False, TILE, SHIFT)
            count, mass = _above(row, vocab_size, floor + 1, peak, rate, TILE, SHIFT)
            ties = top_k - count
            kept = mass + ties.to(tl.float64) * _weight(floor, peak, rate, SHIFT)
        top_p = tl.load(top_ps + row_index).to(tl.float64)
        if top_p < 1:
            border = _lowest(row, vocab_size, floor, top, top_p * kept, peak, rate, False, False, TILE, SHIFT)
            _, mass = _above(row, vocab_size, border + 1, peak, rate, TILE, SHIFT)
            weight = _weight(border, peak, rate, SHIFT)
            missing = top_p * kept - mass
            needed = _times(missing, weight)
            needed = tl.maximum(needed + (needed * weight < missing).to(tl.int32), 1)
            ties = tl.where(border == floor, tl.minimum(needed, ties), needed)
            floor = border
            kept = mass + ties.to(tl.float64) * weight
        target = tl.load(uniforms + row_index).to(tl.float64) * kept
        at = _lowest(row, vocab_size, floor, top, target, peak, rate, False, True, TILE, SHIFT)
        _, mass = _above(row, vocab_size, at + 1, peak, rate, TILE, SHIFT)
        most = tl.where(at == floor, ties - 1, vocab_size)
        place = tl.minimum(_times(target - mass, _weight(at, peak, rate, SHIFT)), most)
    token = _occurrence(row, vocab_size, at, place, TILE, SHIFT)
    tl.store(tokens + row_index, tl.where(finite, token, _NOT_A_NUMBER))


@triton.jit
def _peak(row, vocab_size, TILE: tl.constexpr):
    highest = tl.full([TILE], float("-inf"), tl.float32)
    for first in range(0, vocab_size, TILE):
        token = first + tl.arange(0, TILE)
        value = tl.load(row + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
        highest = tl.maximum(highest, tl.where(value != value, float("inf"), value))
    return tl.max(highest, 0)


@triton.jit
def _key(value, SHIFT: tl.constexpr):
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # adding zero makes -0.0 equal to 0.0
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> SHIFT


@triton.jit
def _weight(key, peak, rate, SHIFT: tl.constexpr):
    # What a token at this key weighs, the likeliest weighing 1; never quite nothing, for it divides.
    ordered = (key << SHIFT) | tl.where(key < 0, (1 << SHIFT) - 1, 0)
    value = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)
    return tl.maximum(tl.exp((value - peak) * rate), 1e-37).to(tl.float64)


@triton.jit
def _times(mass, weight):
    # How often a weight fits into a mass. The quick division may miss by one, which the products tell.
    guess = tl.minimum(tl.maximum(mass.to(tl.float32) / weight.to(tl.float32), 0.0), 1e9).to(tl.int32)
    guess -= (guess * weight > mass).to(tl.int32)
    guess += ((guess + 1) * weight <= mass).to(tl.int32)
    return tl.maximum(guess, 0)


@triton.jit
def _above(row, vocab_size, threshold, peak, rate, TILE: tl.constexpr, SHIFT: tl.constexpr):
    # How many tokens have this key or a higher one, and what they weigh together.
    counts = tl.zeros([TILE], tl.int32)
    masses = tl.zeros([TILE], tl.float32)
    for first in range(0, vocab_size, TILE):
        token = first + tl.arange(0, TILE)
        value = tl.load(row + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
        chosen = (token < vocab_size) & (_key(value, SHIFT) >= threshold)
        counts += chosen.to(tl.int32)
        masses += tl.where(chosen, tl.exp((value - peak) * rate), 0.0)
    return tl.sum(counts, 0), tl.sum(masses.to(tl.float64), 0)


@triton.jit
def _lowest(
    row, vocab_size, low, high, wanted, peak, rate,
    BY_COUNT: tl.constexpr, STRICT: tl.constexpr, TILE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    # The highest key from `low` to `high` at and above which there is as much as wanted; `low` is taken to be enough.
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # their mean, rounded up, without overflow
        count, mass = _above(row, vocab_size, middle, peak, rate, TILE, SHIFT)
        found = count if BY_COUNT else mass
        enough = found > wanted if STRICT else found >= wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit
def _occurrence(row, vocab_size, key, place, TILE: tl.constexpr, SHIFT: tl.constexpr):
    # The token at which `key` occurs for the time after `place` times; the last one where it occurs less often.
    before = 0
    found = -1
    for first in range(0, vocab_size, TILE):
        token = first + tl.arange(0, TILE)
        value = tl.load(row + token, mask=token < vocab_size, other=float("-inf")).to(tl.float32)
        equal = (token < vocab_size) & (_key(value, SHIFT) == key)
        rank = before + tl.cumsum(equal.to(tl.int32), 0)
        found = tl.maximum(found, tl.max(tl.where(equal & (rank <= place + 1), token, -1), 0))
        before += tl.sum(equal.to(tl.int32), 0)
    return found
