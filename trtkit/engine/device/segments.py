"""Cutting the tokens that a prompt feeds in one step at the places where an eviction falls. No tensors are made here.

A step may hold several pieces of a prompt. Its matrix products run over all of them; inside each layer segment p is
written, attended, scored and evicted before segment p + 1 is written there. A layer's decisions depend on that layer
alone, so this equals one step per piece, and the cache never holds more than the budget and a piece.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from trtkit.engine.eviction_rules import due
from trtkit.engine.sequence import Sequence
from trtkit.kv.policy import Budget


class StepRow(Protocol):
    """One row of a step, as eviction needs it. `trtkit.engine.batch.Row` has all but the table."""

    @property
    def sequence(self) -> Sequence:
        """Whose tokens these are."""

    @property
    def count(self) -> int:
        """Tokens it feeds."""

    @property
    def position(self) -> int:
        """Logical position of the first: `sequence.num_tokens` before the step."""

    @property
    def cached(self) -> int:
        """Live slots before the step: `sequence.cache_len` then."""

    @property
    def ends_piece(self) -> bool:
        """An eviction may follow its last token."""

    @property
    def observed(self) -> bool:
        """False for continuations being scored: they must leave no trace."""

    @property
    def table(self) -> Tensor:
        """Its block table on the device, int32 [M]: a view of the step's tables; columns past its blocks are not read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Tokens `start : start + count` of a row, which see `cached_before` slots and, causally, each other.

    `evict_to` slots are left afterwards in this layer; None where no eviction follows.
    """

    start: int
    count: int
    cached_before: int
    evict_to: int | None = None

    @property
    def live(self) -> int:
        """Live slots once its tokens are written, before an eviction."""
        return self.cached_before + self.count

    @property
    def left(self) -> int:
        """Live slots that the next segment finds."""
        return self.live if self.evict_to is None else self.evict_to


def cut(row: StepRow, budget: Budget) -> tuple[Segment, ...]:
    """Segments of a prompt row under `budget`, in order. Pieces after which nothing is evicted are joined.

    Piece ends are absolute positions (multiples of the quantum, the caller's chunk ends, the prompt's end), so how
    the scheduler splits a prompt into steps changes nothing.
    """
    sequence, segments = row.sequence, []
    first, end, cached = row.position, row.position + row.count, row.cached
    for piece_end in piece_ends(sequence, first, end):
        if due(piece_end, sequence.prompt_len, cached + piece_end - first, budget):
            segments.append(
                Segment(
                    start=first - row.position, count=piece_end - first, cached_before=cached, evict_to=budget.tokens
                )
            )
            first, cached = piece_end, budget.tokens
    if first < end:
        segments.append(Segment(start=first - row.position, count=end - first, cached_before=cached))
    return tuple(segments)


def piece_ends(sequence: Sequence, first: int, last: int) -> list[int]:
    """Positions in (first, last] where a piece of the prompt ends, ascending."""
    ends = {end for end in sequence.chunk_ends if first < end <= last}
    if first < sequence.prompt_len <= last:
        ends.add(sequence.prompt_len)
    quantum = sequence.prefill_quantum
    if quantum is not None:
        ends.update(range((first // quantum + 1) * quantum, min(last, sequence.prompt_len) + 1, quantum))
    return sorted(ends)
