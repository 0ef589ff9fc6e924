"""What eviction knows of one sequence and of one rank, in plain values.

Shapes: L local layers, H KV heads, N live slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from trtkit.kv.ledger import AttentionLedger
from trtkit.kv.policy import EvictionPolicy


class Pool(Protocol):
    """The paged cache of one rank, as TensorRT-LLM's managers show it."""

    def view(self, layer: int) -> Tensor:
        """One local layer, [blocks, 2, H, tokens_per_block, D] (HND), a view."""

    def blocks(self, request_id: int) -> Sequence[int]:
        """Block ids of a sequence, in order; indices into the first axis of `view`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """One rank's share: local layers, its KV heads, the most sequences in flight, and the longest piece of a prompt.

    `max_chunk` None means that prompts come whole or that room for all of a prompt may stay reserved.
    """

    layers: int
    kv_heads: int
    max_sequences: int
    device: torch.device
    max_chunk: int | None = None


@dataclass(kw_only=True, slots=True, eq=False)
class Counters:
    """What was released so far, all sequences of the manager together; tokens are per sequence, as in `KVStats`."""

    evictions: int = 0
    tokens_evicted: int = 0
    blocks_freed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Proof:
    """A key that must lie in a slot once the attention operator has compacted: of the first layer's first KV head."""

    slot: int
    key: Tensor


@dataclass(kw_only=True, slots=True, eq=False)
class Piece:
    """A piece of a prompt whose step is under way: its first position, its length, and the `base` tokens cached before.

    `table` holds the sequence's block ids where `base` is not 0; `proof` is what to look for after the step.
    """

    first: int
    count: int
    base: int
    table: Tensor | None
    layers_seen: set[int] = field(default_factory=set)
    proof: Proof | None = None


@dataclass(kw_only=True, slots=True, eq=False)
class Tracked:
    """One evicting sequence.

    `fed` tokens have been handed to the device, `num_tokens` of them are settled: what was due after them is done. The
    last `waiting` settled ones are cached but neither in the ledger nor scored. The runtime holds room for `held`.
    """

    policy: EvictionPolicy
    ledger: AttentionLedger
    prompt_len: int
    slot: int
    held: int
    fed: int = 0
    num_tokens: int = 0
    waiting: int = 0
    evicted: int = 0
    piece: Piece | None = None

    @property
    def prompt_is_in(self) -> bool:
        """Nothing of the prompt is left to settle."""
        return self.num_tokens >= self.prompt_len

    def give_back(self) -> int:
        """Tokens of room that no settled token needs once the prompt is in; they count as given back from now on."""
        surplus = self.held - (self.fed - self.evicted) if self.prompt_is_in else 0
        self.held -= surplus
        return surplus
