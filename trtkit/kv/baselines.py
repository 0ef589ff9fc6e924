"""The plain policies H2O is compared with, behind the same protocol as anybody's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trtkit.kv.policy import Budget, CachedTokens, Watch, refuse_scorer, resolve_budget
from trtkit.kv.ranking import keep_best
from trtkit.spec.errors import UsageError
from trtkit.spec.kv import KVPolicySpec

_WINDOW_QUERIES = 32
_HASH_BITS = 31
_MIXERS = (0x2C1B3C6D, 0x297A2D39)
_ROW_STRIDE = 0x3504F333
POSITIONS_ONLY = Watch()


@dataclass(frozen=True, kw_only=True)
class SinksAndWindow:
    """The first `sinks` tokens and the newest ones (StreamingLLM, but with original positions)."""

    budget: Budget
    watch: Watch = POSITIONS_ONLY

    @classmethod
    def from_spec(cls, spec: KVPolicySpec) -> SinksAndWindow:
        """`recent` follows from the budget; giving another one is a contradiction."""
        refuse_scorer(spec)
        sinks = resolve_budget(spec).sinks
        recent = (spec.budget or 0) - sinks
        if spec.recent is not None and spec.recent != recent:
            raise UsageError(
                f"KV policy 'window' keeps sinks + recent = budget, but {sinks} + {spec.recent} is not {spec.budget}; "
                "leave recent out"
            )
        budget = resolve_budget(spec)
        return cls(budget=Budget(tokens=budget.tokens, sinks=sinks, recent=recent, interval=budget.interval))

    def select(self, tokens: CachedTokens) -> Tensor:
        """Position decides; nothing is left to a score."""
        return keep_best(tokens.mass, tokens.positions, tokens.num_tokens, self.budget)


@dataclass(frozen=True, kw_only=True)
class ObservationWindow:
    """What the last queries look at, as SnapKV does after a prompt, here at every eviction. No pooling."""

    budget: Budget
    watch: Watch

    @classmethod
    def from_spec(cls, spec: KVPolicySpec) -> ObservationWindow:
        """The observing queries are the protected recent window, 32 unless `recent` says otherwise."""
        refuse_scorer(spec)
        budget = resolve_budget(spec, recent=_WINDOW_QUERIES)
        if budget.recent < 1:
            raise UsageError("KV policy 'snapkv' observes through its recent window, which must be at least 1")
        return cls(budget=budget, watch=Watch(queries="last", window=budget.recent))

    def select(self, tokens: CachedTokens) -> Tensor:
        """Heaviest under the window's queries."""
        return keep_best(tokens.mass, tokens.positions, tokens.num_tokens, self.budget)


@dataclass(frozen=True, kw_only=True)
class RandomKeep:
    """A fixed random priority per token: what a budget is worth with no information. Sinks and recent are kept."""

    budget: Budget
    seed: int = 0
    watch: Watch = POSITIONS_ONLY

    @classmethod
    def from_spec(cls, spec: KVPolicySpec) -> RandomKeep:
        """The seed is fixed, so runs repeat."""
        refuse_scorer(spec)
        return cls(budget=resolve_budget(spec))

    def select(self, tokens: CachedTokens) -> Tensor:
        """Priorities are a hash of (seed, row, position), so a replay chooses alike."""
        priority = _hashed(tokens.positions, self.seed, tokens.first_row)
        return keep_best(priority, tokens.positions, tokens.num_tokens, self.budget)


def _hashed(positions: Tensor, seed: int, first_row: int) -> Tensor:
    """A uniform-looking number per (row, position), [..., N]; integer arithmetic, so alike on every machine."""
    rows = positions.numel() // max(1, positions.shape[-1])
    row = torch.arange(first_row, first_row + rows, device=positions.device).reshape(*positions.shape[:-1], 1)
    mask = (1 << _HASH_BITS) - 1
    value = (positions.to(torch.int64) + row * _ROW_STRIDE + seed * _MIXERS[0]) & mask
    for mixer in _MIXERS:
        value = ((value ^ (value >> 15)) * mixer) & mask
    return (value ^ (value >> 15)).to(torch.float32)
