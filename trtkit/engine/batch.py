"""`Batch`: one step's tokens laid out for the model, with every index tensor built once.

Rows that feed one token come first, longest cache first, so that groups of similar length are slices of the
step's tokens; rows that feed more follow. Axes in names: T tokens of the step, B rows of a group, H KV heads,
S slots of the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from trtkit.engine.paged_cache import PagedCache
from trtkit.engine.sequence import Sequence

R = TypeVar("R")
_GROUP_OVERHEAD_BLOCKS = 12
"""Padding that is accepted before a further group, with its own kernel launches in every layer, is opened (assumed)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowInput:
    """What a row feeds: `token_ids` continue `sequence` at its `num_tokens`. Its blocks are allocated already.

    The last `drafts` of them are guesses: a token is drawn after each, and after the one before them. A row that is
    `ahead` comes that many tokens after `num_tokens`, which other rows of the same step feed.
    """

    sequence: Sequence
    token_ids: Seq[int]
    ends_piece: bool = True
    observed: bool = True
    drafts: int = 0
    ahead: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row as laid out. `input_index` is its place in the caller's list.

    Its tokens are `start : start + count` of the step, at logical positions from `position` on. They see the
    `cached` slots before them all, and each other causally; afterwards `kv_len` slots are live.
    """

    sequence: Sequence
    input_index: int
    start: int
    count: int
    position: int
    cached: int
    ends_piece: bool
    observed: bool

    @property
    def kv_len(self) -> int:
        """Live slots once this step's tokens are in."""
        return self.cached + self.count


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeGroup:
    """Rows `start : start + size` of the step feed one token each. `mask_BS` [B * H, 1, S] hides padding."""

    start: int
    size: int
    gather: Tensor
    mask_BS: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillRow:
    """One row that feeds several tokens. `mask_TS` is None where nothing was cached before: plain causal."""

    start: int
    count: int
    kv_len: int
    gather: Tensor
    mask_TS: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Everything the model needs for one step."""

    rows: tuple[Row, ...]
    token_ids_T: Tensor
    positions_T: Tensor
    write: Tensor
    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillRow, ...]
    cache: PagedCache

    @property
    def last_tokens(self) -> list[int]:
        """Index of each row's last token, in the caller's order."""
        ordered = sorted(self.rows, key=lambda row: row.input_index)
        return [row.start + row.count - 1 for row in ordered]


def lay_out(inputs: Seq[RowInput], order: Seq[int], make: Callable[..., R]) -> list[R]:
    """One row for each input, in `order`, their tokens back to back; `make` is `Row` or adds to it."""
    rows: list[R] = []
    start = 0
    for index in order:
        item = inputs[index]
        rows.append(
            make(
                sequence=item.sequence,
                input_index=index,
                start=start,
                count=len(item.token_ids),
                position=item.sequence.num_tokens + item.ahead,
                cached=item.sequence.cache_len + item.ahead,
                ends_piece=item.ends_piece,
                observed=item.observed,
            )
        )
        start += len(item.token_ids)
    return rows


def build_batch(inputs: Seq[RowInput], cache: PagedCache, dtype: torch.dtype) -> Batch:
    """Lay out a step."""
    size = cache.tokens_per_block
    order = sorted(
        range(len(inputs)), key=lambda i: (len(inputs[i].token_ids) > 1, -(inputs[i].sequence.cache_len // size))
    )
    rows = lay_out(inputs, order, Row)
    singles = list(itertools.takewhile(lambda row: row.count == 1, rows))
    token_ids = list(itertools.chain.from_iterable(inputs[index].token_ids for index in order))
    return Batch(
        rows=tuple(rows),
        token_ids_T=torch.tensor(token_ids, device=cache.device),
        positions_T=torch.from_numpy(_spans(rows, "position")).to(cache.device),
        write=_write_index(rows, cache),
        decode=tuple(_decode_group(group, cache, dtype) for group in _similar(singles, size)),
        prefill=tuple(_prefill_row(row, cache, dtype) for row in rows[len(singles) :]),
        cache=cache,
    )


def _spans(rows: Seq[Row], field: str) -> np.ndarray:
    """For each token of each row: the row's `field` plus the token's place in the row, [T]."""
    counts = np.fromiter((row.count for row in rows), np.int64, len(rows))
    first = np.fromiter((getattr(row, field) - row.start for row in rows), np.int64, len(rows))
    return np.repeat(first, counts) + np.arange(int(counts.sum()))


def _write_index(rows: Seq[Row], cache: PagedCache) -> Tensor:
    slots = _spans(rows, "cached")
    size = cache.tokens_per_block
    tables = cache.padded_tables([row.sequence.block_table for row in rows])
    row_of_token = np.repeat(np.arange(len(rows)), [row.count for row in rows])
    return cache.write_rows(tables[row_of_token, slots // size], slots % size)


def _similar(rows: list[Row], block_size: int) -> list[list[Row]]:
    """Cut rows (longest first) into groups, so that padding costs less than another group would."""
    groups: list[list[Row]] = []
    wasted = 0
    for row in rows:
        if groups:
            wasted += (groups[-1][0].kv_len - row.kv_len) // block_size
        if not groups or wasted > _GROUP_OVERHEAD_BLOCKS:
            groups.append([])
            wasted = 0
        groups[-1].append(row)
    return groups


def _decode_group(rows: list[Row], cache: PagedCache, dtype: torch.dtype) -> DecodeGroup:
    tables = cache.padded_tables([_live_table(row, cache) for row in rows])
    lengths = torch.tensor([row.kv_len for row in rows], device=cache.device)
    hidden = torch.arange(tables.shape[1] * cache.tokens_per_block, device=cache.device) >= lengths[:, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=cache.device).masked_fill_(hidden, float("-inf"))
    return DecodeGroup(
        start=rows[0].start,
        size=len(rows),
        gather=cache.gather_rows(tables),
        mask_BS=mask.repeat_interleave(cache.num_kv_heads, dim=0).unsqueeze(1),
    )


def _prefill_row(row: Row, cache: PagedCache, dtype: torch.dtype) -> PrefillRow:
    gather = cache.gather_rows(cache.padded_tables([_live_table(row, cache)]))
    mask = None
    if row.cached:
        mask = torch.full((row.count, row.kv_len), float("-inf"), dtype=dtype, device=cache.device)
        mask = mask.triu_(row.cached + 1)
    return PrefillRow(start=row.start, count=row.count, kv_len=row.kv_len, gather=gather, mask_TS=mask)


def _live_table(row: Row, cache: PagedCache) -> list[int]:
    return row.sequence.block_table[: -(-row.kv_len // cache.tokens_per_block)]
