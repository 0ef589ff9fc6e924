"""What eviction sees of the engine, and the only ways it may change it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from trtkit.engine.batch import Batch
from trtkit.engine.sequence import Sequence


@dataclass(kw_only=True, slots=True)
class EvictionCounters:
    """Running totals: rounds, tokens per sequence, blocks given back, bytes kept beside the cache."""

    evictions: int = 0
    tokens_evicted: int = 0
    blocks_freed: int = 0
    side_bytes: int = 0


class LayerObserver(Protocol):
    """Watches every layer's queries and may shrink sequences at the end of a step.

    Order of calls for one sequence: `admit` once, then per step `observe` for each layer and one `end_step`;
    `forget` when it is preempted (it starts again from position 0) or ends.
    """

    counters: EvictionCounters
    failed: dict[Sequence, str]
    """Sequences whose policy broke in this step, with one line each; they end, the batch goes on."""

    def admit(self, sequence: Sequence) -> None:
        """Set `prefill_quantum`, `kv_cap_tokens` and `evicts` by the request's policy.

        Raises:
            TrtkitError: the policy is unknown or cannot be carried out; the request is refused with this line.
        """

    def observe(self, layer: int, q_THD: Tensor, batch: Batch) -> None:
        """After a layer's attention: rotated queries [T, query heads, D] of all rows; keys are in the cache already.

        Row r's queries are `q_THD[row.start : row.start + row.count]`; its live slots are `row.kv_len`. Rows with
        `observed` False (continuations being scored) must leave no trace.
        """

    def end_step(self, batch: Batch) -> None:
        """May compact rows with `ends_piece` and `observed`: `move_slots`, set `cache_len`, `Scheduler.trim`."""

    def forget(self, sequence: Sequence) -> None:
        """Drop what is stored about a sequence. Unknown sequences are ignored."""
