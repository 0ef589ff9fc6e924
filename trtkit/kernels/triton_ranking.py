# ruff: noqa: ANN001, ANN202, PLR0124, PLR0913, PLR0917
# mypy: disable-error-code="no-untyped-def"
"""Ranking without sorting; `trtkit.kernels.ranking` says what it computes, and its twin defines it.

Imported only where Triton is. A program searches one row, bit by bit, for the largest score that enough slots reach,
and among slots with exactly that score for the position that enough of them reach. Scores become integers of the
same order, so nothing depends on rounding. Up to 8,192 slots stay in registers; longer rows are read again for
every bit, from the cache that holds them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_IN_REGISTERS = 8192
_CHUNK = 2048
_PER_THREAD = 16
_LONG_ROW_REGISTERS = 80
"""A thread's, where rows are read in chunks: left alone, the assembler stops at 64 and Triton 3.6's code spills."""


def keep_best(scores: Tensor, positions: Tensor, num_tokens: int, *, tokens: int, sinks: int, recent: int) -> Tensor:
    """See `trtkit.kernels.ranking.keep_best`."""
    shape, length = scores.shape[:-1], scores.shape[-1]
    scores = _rows(scores)
    positions = _rows(positions)
    kept = torch.empty(*shape, tokens, dtype=torch.int64, device=scores.device)
    rows = scores.shape[0]
    if rows == 0 or tokens == 0:
        return kept
    chunk = triton.next_power_of_2(length) if length <= _IN_REGISTERS else _CHUNK
    short = length <= chunk
    per_thread = _PER_THREAD if short else _PER_THREAD // 2
    _keep_best[(rows,)](
        scores, positions, kept, scores.stride(0), positions.stride(0),
        length, num_tokens - recent, sinks, tokens,
        CHUNK=chunk, ONE_CHUNK=short, num_warps=max(1, min(32, chunk // (32 * per_thread))),
        maxnreg=None if short else _LONG_ROW_REGISTERS,
    )  # fmt: skip
    return kept


def _rows(tensor: Tensor) -> Tensor:
    """As [rows, N] with adjacent slots; a view wherever the rows lie evenly, as a ledger's do."""
    rows = tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.flatten(0, -2)
    return rows if rows.stride(1) == 1 else rows.contiguous()


@triton.jit
def _keys(
    scores, positions, start, length, newest_from, sinks, CHUNK: tl.constexpr
):  # fmt: skip
    """Scores of a chunk as unsigned integers of the same order (0 where there is no slot), and its positions."""
    slot = start + tl.arange(0, CHUNK)
    there = slot < length
    score = tl.load(scores + slot, mask=there, other=0.0).to(tl.float32)
    position = tl.load(positions + slot, mask=there, other=0).to(tl.int32)
    largest: tl.constexpr = 3.4028234663852886e38
    clamped = tl.minimum(tl.maximum(score, -largest), largest)
    ranked = tl.where(score != score, float("-inf"), clamped)
    ranked = tl.where((position < sinks) | (position >= newest_from), float("inf"), ranked)
    # Both zeros are one number; their bits differ.
    bits = tl.where(ranked == 0.0, 0.0, ranked).to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000
    return tl.where(there, key, 0), position


@triton.jit(do_not_specialize=["stride_scores", "stride_positions", "length", "newest_from", "sinks", "tokens"],
            do_not_specialize_on_alignment=["scores", "positions", "kept"])  # fmt: skip
def _keep_best(
    scores, positions, kept, stride_scores, stride_positions, length, newest_from, sinks, tokens,
    CHUNK: tl.constexpr, ONE_CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    scores += row * stride_scores
    positions += row * stride_positions
    kept += row * tokens
    key, position = _keys(scores, positions, 0, length, newest_from, sinks, CHUNK)
    threshold = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        enough = tokens <= _reaching(
            scores, positions, key, position, threshold | bit, 0, length, newest_from, sinks, CHUNK, ONE_CHUNK
        )
        threshold = tl.where(enough, threshold | bit, threshold)
        bit = bit >> 1
    # Of slots with the very score at the edge the newest stay: the largest position that enough of them reach.
    oldest = 0
    at_least = _reaching(scores, positions, key, position, threshold, 0, length, newest_from, sinks, CHUNK, ONE_CHUNK)
    if at_least > tokens:
        place = 1 << 30
        for _ in range(31):
            enough = tokens <= _reaching(
                scores, positions, key, position, threshold, oldest | place, length, newest_from, sinks,
                CHUNK, ONE_CHUNK,
            )  # fmt: skip
            oldest = tl.where(enough, oldest | place, oldest)
            place = place >> 1
    done = _store_kept(kept, key, position, threshold, oldest, 0, 0, tokens, CHUNK)
    if not ONE_CHUNK:
        for start in range(CHUNK, length, CHUNK):
            other, at = _keys(scores, positions, start, length, newest_from, sinks, CHUNK)
            done = _store_kept(kept, other, at, threshold, oldest, start, done, tokens, CHUNK)


@triton.jit
def _reaching(
    scores, positions, key, position, threshold, oldest, length, newest_from, sinks,
    CHUNK: tl.constexpr, ONE_CHUNK: tl.constexpr,
):  # fmt: skip
    """Slots whose score is above `threshold`, or equal to it with a position of `oldest` or later."""
    count = tl.sum(_stays(key, position, threshold, oldest).to(tl.int32), 0)
    if not ONE_CHUNK:
        for start in range(CHUNK, length, CHUNK):
            other, at = _keys(scores, positions, start, length, newest_from, sinks, CHUNK)
            count += tl.sum(_stays(other, at, threshold, oldest).to(tl.int32), 0)
    return count


@triton.jit
def _stays(key, position, threshold, oldest):
    return (key > threshold) | ((key == threshold) & (position >= oldest))


@triton.jit
def _store_kept(kept, key, position, threshold, oldest, start, done, tokens, CHUNK: tl.constexpr):
    """Append the slots of a chunk that stay, ascending, after `done` earlier ones; how many there are then."""
    stays = _stays(key, position, threshold, oldest)
    place = done + tl.cumsum(stays.to(tl.int32), 0) - 1
    slot = start + tl.arange(0, CHUNK)
    # Positions that are not distinct, against the contract, would keep more; nothing is written past the row.
    tl.store(kept + place, slot.to(tl.int64), mask=stays & (place < tokens))
    return done + tl.sum(stays.to(tl.int32), 0)
