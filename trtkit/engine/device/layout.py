"""One step laid out for the device: which tokens lie where, and every index its kernels need, built on the host.

Order of tokens: rows that feed one token, then prompts that nothing watches, then watched prompts, whose segments each
go through attention alone. Axes in names: T tokens of the step, B rows that feed one token, R all rows, P prompt rows
of one attention call, M columns of a block table.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trtkit.engine.batch import Row, RowInput, lay_out
from trtkit.engine.device.segments import Segment
from trtkit.engine.device.staging import Field, Layout, Staging
from trtkit.engine.sequence import PENDING, Sequence

NOWHERE = -1
"""Marks a padded row in every index the kernels take: nothing is read or written for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceRow(Row):
    """A row, and its block table on the device, int32 [M]."""

    table: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptCall:
    """One call of prefill attention: tokens `tokens` of the step, of one segment or of many rows without segments."""

    tokens: slice
    starts_P1: Tensor
    cached_P: Tensor
    lengths_P: Tensor
    tables_PM: Tensor
    max_count: int
    row: DeviceRow | None = None
    segment: Segment | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceStep:
    """Everything the model needs for one step, on the device.

    `sources_T` is the place in `last_token` that a token comes from, negative where `token_ids_T` has it. `rows_T` is
    the row of `tables_RM` a token belongs to, None where token t is row t. `ring_B` says where a decode row's query is
    kept. `plain_tokens` tokens in front need no segments.
    """

    rows: tuple[DeviceRow, ...]
    num_decode: int
    plain_tokens: int
    token_ids_T: Tensor
    sources_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    rows_T: Tensor | None
    tables_RM: Tensor
    lengths_B: Tensor
    ring_T: Tensor
    calls: tuple[PromptCall, ...]

    @property
    def last_tokens(self) -> list[int]:
        """Index of each row's last token, in the caller's order."""
        ordered = sorted(self.rows, key=lambda row: row.input_index)
        return [row.start + row.count - 1 for row in ordered]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    """A stretch of one prompt row: `start` in the step, `table` its row of the tables."""

    start: int
    count: int
    cached: int
    table: int
    segment: Segment | None = None


def row_order(inputs: Seq[RowInput], watched: Callable[[RowInput], bool]) -> list[int]:
    """Places of the inputs in the order of the step."""

    def key(index: int) -> int:
        item = inputs[index]
        return 0 if len(item.token_ids) == 1 else 2 if watched(item) else 1

    return sorted(range(len(inputs)), key=key)


def arrange(inputs: Seq[RowInput], order: list[int], no_table: Tensor) -> list[DeviceRow]:
    """Rows in the step's order, still without their tables."""
    return lay_out(inputs, order, partial(DeviceRow, table=no_table))


@dataclass(frozen=True, kw_only=True, slots=True)
class RowFacts:
    """What the runner knows of the rows.

    `place_of` is each sequence's place in the last tokens, `dump` the place for what nobody wants. `ring_places` and
    `segments` are eviction's answers; `segments` is None for rows that nothing watches.
    """

    place_of: dict[Sequence, int]
    dump: int
    no_table: Tensor
    ring_places: Callable[[Seq[DeviceRow]], list[int]]
    segments: Callable[[DeviceRow], tuple[Segment, ...] | None]


class DecodeLayout:
    """Steps in which `size` rows (padded ones among them) feed one token each: always the same memory.

    Only such steps can be captured, because a captured kernel reads the addresses it was captured with.
    """

    def __init__(self, size: int, table_columns: int, memory: Tensor) -> None:
        """Views into `memory`, int32."""
        row = Field(shape=(size,))
        self.size = size
        self._layout = Layout(
            dict.fromkeys(("token_ids", "sources", "positions", "slots", "lengths", "ring", "targets"), row)
            | {"tables": Field(shape=(size, table_columns))}
        )
        self._memory = memory
        self._columns = table_columns
        views = self._layout.tensors(memory)
        self.targets = views["targets"]
        self.step = _decode_step(views, rows=(), count=size)

    @staticmethod
    def words(size: int, table_columns: int) -> int:
        """Memory that a step of `size` rows takes."""
        return (size + 3) * 7 + size * table_columns + 3

    def send(self, inputs: Seq[RowInput], targets: Seq[int], facts: RowFacts, staging: Staging) -> DeviceStep:
        """Start the copy of a step; the step returned has its rows, in the order of `inputs`."""
        rows = arrange(inputs, list(range(len(inputs))), facts.no_table)
        padding = self.size - len(rows)
        values = {
            **_decode_values(rows, inputs, facts, padding),
            "tables": _tables(rows, (self.size, self._columns)),
            "targets": [*targets, *([facts.dump] * padding)],
        }
        staging.send(self._layout, values, self._memory)
        return replace(self.step, rows=_with_tables(rows, self.step.tables_RM))

    def clear(self, dump: int, *, length: int = 0, num_blocks: int = 1) -> None:
        """Make every row padding: nothing is written for it.

        With a `length` the rows read that many slots, of blocks all over the cache: kernels tune themselves on them.
        """
        views = self._layout.tensors(self._memory)
        for name, value in (("token_ids", 0), ("positions", 0), ("lengths", length), ("targets", dump)):
            views[name].fill_(value)
        for name in ("sources", "slots", "ring"):
            views[name].fill_(NOWHERE)
        tables = views["tables"]
        tables.copy_(torch.arange(tables.numel(), device=tables.device).remainder_(num_blocks).view(tables.shape))


def _decode_values(rows: Seq[DeviceRow], inputs: Seq[RowInput], facts: RowFacts, padding: int) -> dict[str, Any]:
    """Fields of rows that feed one token each."""
    tokens = [inputs[row.input_index].token_ids[0] for row in rows]
    nothing = [NOWHERE] * padding
    return {
        "token_ids": [*tokens, *([0] * padding)],
        "sources": [
            *(facts.place_of[r.sequence] if t == PENDING else NOWHERE for r, t in zip(rows, tokens, strict=True)),
            *nothing,
        ],
        "positions": [*(row.position for row in rows), *([0] * padding)],
        "slots": [*(row.cached for row in rows), *nothing],
        "lengths": [*(row.kv_len for row in rows), *([0] * padding)],
        "ring": [*facts.ring_places(rows), *nothing],
    }


def _decode_step(views: dict[str, Tensor], rows: tuple[DeviceRow, ...], count: int) -> DeviceStep:
    return DeviceStep(
        rows=rows,
        num_decode=count,
        plain_tokens=count,
        token_ids_T=views["token_ids"],
        sources_T=views["sources"],
        positions_T=views["positions"],
        slots_T=views["slots"],
        rows_T=None,
        tables_RM=views["tables"],
        lengths_B=views["lengths"],
        ring_T=views["ring"],
        calls=(),
    )


def _tables(rows: Seq[DeviceRow], shape: tuple[int, int]) -> np.ndarray:
    """Block tables as one array; columns past a row's blocks are never read."""
    tables = np.zeros(shape, dtype=np.int32)
    for place, row in zip(tables, rows, strict=False):
        place[: len(row.sequence.block_table)] = row.sequence.block_table
    return tables


def _with_tables(rows: Seq[DeviceRow], tables_RM: Tensor) -> tuple[DeviceRow, ...]:
    """The rows with their tables where eviction will ask for them."""
    return tuple(
        replace(row, table=tables_RM[index]) if row.observed and row.sequence.evicts else row
        for index, row in enumerate(rows)
    )


def send_mixed(inputs: Seq[RowInput], order: list[int], facts: RowFacts, staging: Staging) -> DeviceStep:
    """A step with prompts in it, in memory of its own.

    Tables go ahead of the rest, because eviction may read them to answer how a prompt is cut.
    """
    rows = arrange(inputs, order, facts.no_table)
    width = max(len(row.sequence.block_table) for row in rows)
    tables = _tables(rows, (len(rows), width))
    placed = _with_tables(
        rows, staging.send(Layout({"tables": Field(shape=tables.shape)}), {"tables": tables})["tables"]
    )
    num_decode = sum(row.count == 1 for row in placed)
    plain: list[_Piece] = []
    cut: list[tuple[int, _Piece]] = []
    for index, row in enumerate(placed[num_decode:], start=num_decode):
        segments = facts.segments(row)
        if segments is None:
            plain.append(_Piece(start=row.start, count=row.count, cached=row.cached, table=index))
        else:
            cut += [(index, _segment_piece(row, index, segment)) for segment in segments]
    pieces = plain + [piece for _, piece in cut]
    values = {"tables": tables} | _mixed_values(placed, num_decode, inputs, pieces, facts)
    values["call_tables"] = tables[[piece.table for piece in pieces]]
    views = staging.send(Layout({name: Field(shape=np.shape(value)) for name, value in values.items()}), values)
    calls = [_call(views, plain, 0, 0)] if plain else []
    for number, (index, piece) in enumerate(cut):
        call = _call(views, [piece], len(plain) + number, len(plain) + 1 + 2 * number)
        calls.append(replace(call, row=placed[index], segment=piece.segment))
    step = _decode_step(views, rows=placed, count=num_decode)
    plain_tokens = num_decode + sum(piece.count for piece in plain)
    return replace(step, rows_T=views["rows"], calls=tuple(calls), plain_tokens=plain_tokens)


def _segment_piece(row: DeviceRow, table: int, segment: Segment) -> _Piece:
    return _Piece(
        start=row.start + segment.start,
        count=segment.count,
        cached=segment.cached_before,
        table=table,
        segment=segment,
    )


def _mixed_values(
    rows: Seq[DeviceRow], num_decode: int, inputs: Seq[RowInput], pieces: list[_Piece], facts: RowFacts
) -> dict[str, Any]:
    """Fields of a mixed step: T-sized ones by token, then per attention call the bounds of its rows."""
    decode = rows[:num_decode]
    values = {name: np.asarray(v, np.int32) for name, v in _decode_values(decode, inputs, facts, 0).items()}
    prompts = rows[num_decode:]
    counts = [row.count for row in prompts]
    tokens = [token for row in prompts for token in inputs[row.input_index].token_ids]
    assert PENDING not in tokens, "a token in flight is fed alone"
    positions = _spans([row.position for row in prompts], counts)
    slots = _spans([piece.cached for piece in pieces], [piece.count for piece in pieces])
    nowhere = np.full(len(tokens), NOWHERE, np.int32)
    values["token_ids"] = np.concatenate([values["token_ids"], np.asarray(tokens, np.int32)])
    values["sources"] = np.concatenate([values["sources"], nowhere])
    values["positions"] = np.concatenate([values["positions"], positions])
    values["slots"] = np.concatenate([values["slots"], slots])
    values["ring"] = np.concatenate([values["ring"], nowhere])
    values["rows"] = np.repeat(np.arange(len(rows)), [row.count for row in rows])
    values["cached"] = np.asarray([piece.cached for piece in pieces], np.int32)
    values["ends"] = np.asarray([piece.cached + piece.count for piece in pieces], np.int32)
    plain = [piece.count for piece in pieces if piece.segment is None]
    bounds = [np.cumsum([0, *plain])] + [np.asarray([0, p.count]) for p in pieces if p.segment is not None]
    values["starts"] = np.concatenate(bounds)
    return values


def _call(views: dict[str, Tensor], pieces: list[_Piece], first: int, bound: int) -> PromptCall:
    """The attention call of `pieces`: number `first` and following of the step's, their bounds from `bound` on."""
    rows = slice(first, first + len(pieces))
    return PromptCall(
        tokens=slice(pieces[0].start, pieces[-1].start + pieces[-1].count),
        starts_P1=views["starts"][bound : bound + len(pieces) + 1],
        cached_P=views["cached"][rows],
        lengths_P=views["ends"][rows],
        tables_PM=views["call_tables"][rows],
        max_count=max(piece.count for piece in pieces),
    )


def _spans(firsts: list[int], counts: list[int]) -> np.ndarray:
    """`first, first + 1, ...` for each count, joined, int32."""
    if not counts:
        return np.zeros(0, np.int32)
    totals = np.cumsum(counts)
    offsets = np.repeat(np.asarray(firsts) - (totals - counts), counts)
    return (np.arange(totals[-1]) + offsets).astype(np.int32)
