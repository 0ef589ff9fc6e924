"""What eviction knows about each evicting sequence, and its plan for one step."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from trtkit.engine.batch import Batch, Row
from trtkit.engine.query_ring import QueryRing
from trtkit.kv.ledger import AttentionLedger
from trtkit.kv.policy import EvictionPolicy


@dataclass(kw_only=True, slots=True, eq=False)
class Tracked:
    """What is known about one evicting sequence. `pending` ring queries and `unlisted` tokens, the newest, are not in the ledger yet; `prompt_cap` is its
    `kv_cap_tokens` while the prompt is fed."""

    policy: EvictionPolicy
    ledger: AttentionLedger
    ring: QueryRing | None
    prompt_cap: int | None
    ring_slot: int = 0
    pending: int = 0
    unlisted: int = 0

    def list_tokens(self, num_tokens: int) -> None:
        """Open ledger slots for the tokens since the last listing; `num_tokens` are in the cache."""
        if self.unlisted:
            self.ledger.append(num_tokens - self.unlisted, self.unlisted)
            self.unlisted = 0


@dataclass(kw_only=True, slots=True)
class StepPlan:
    """One step's work for `observe`: prompt pieces to score, and which tokens go where in which ring."""

    batch: Batch
    pieces: list[tuple[Row, Tracked]] = field(default_factory=list)
    writes: list[tuple[QueryRing, Tensor, Tensor | None]] = field(default_factory=list)
