"""The contract of an eviction policy: integer budgets in, exact slots out. Knows nothing of pages, models or engines.

Shapes: leading dimensions `...` are any rows that decide alone (the engine passes [layers, KV heads]); N live slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from trtkit.spec.errors import UsageError
from trtkit.spec.kv import KVPolicySpec

DEFAULT_SINKS = 4
DEFAULT_INTERVAL = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Tokens per (layer, KV head): `tokens` stay after an eviction, `sinks` oldest and `recent` newest always.

    Between evictions at most `interval` more accumulate, so a decoding cache holds [tokens, tokens + interval].
    """

    tokens: int
    sinks: int
    recent: int
    interval: int

    def __post_init__(self) -> None:
        if min(self.tokens, self.interval) < 1 or min(self.sinks, self.recent) < 0:
            raise UsageError(f"KV budget {self} needs positive tokens and interval, and no negative part")
        if self.sinks + self.recent > self.tokens:
            raise UsageError(
                f"KV budget {self.tokens} is below sinks + recent = {self.sinks + self.recent}; "
                f"raise the budget to at least {self.sinks + self.recent} or protect fewer tokens"
            )

    @property
    def heavy(self) -> int:
        """Tokens chosen by score."""
        return self.tokens - self.sinks - self.recent


def resolve_budget(spec: KVPolicySpec, *, recent: int | None = None) -> Budget:
    """Fill in what `spec` leaves open; its budget must be in tokens already.

    Defaults: 4 sinks (at most a quarter of the budget); half of what sinks leave as the recent window (the paper's
    split, and the better one on text: docs/h2o.md), at most `recent` if given; an interval of 32 tokens.

    Raises:
        UsageError: the budget is a share, or sinks and recent exceed it.
    """
    if spec.budget is None:
        raise UsageError(f"KV policy {spec.label!r}: resolve the share to tokens before building the policy")
    tokens = spec.budget
    sinks = spec.sinks if spec.sinks is not None else min(DEFAULT_SINKS, max(0, tokens - (spec.recent or 0)) // 4)
    half = min(max(1, (tokens - sinks) // 2), max(0, tokens - sinks))
    default_recent = half if recent is None else min(recent, half)
    return Budget(
        tokens=tokens,
        sinks=sinks,
        recent=default_recent if spec.recent is None else spec.recent,
        interval=spec.interval or DEFAULT_INTERVAL,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """Which queries' attention a policy wants to have seen when it decides.

    `queries` "none": it decides from positions. "all": mass of every query since a key was cached, each later query
    multiplying what is there by `decay` first. "last": mass of the last `window` queries alone, taken over the
    cache as it is when the decision falls.
    """

    queries: str = "none"
    decay: float = 1.0
    window: int = 0

    def __post_init__(self) -> None:
        if self.queries not in ("none", "all", "last"):
            raise ValueError(f"queries is {self.queries!r}, allowed are none, all, last")
        if not 0 < self.decay <= 1 or (self.queries == "last") != (self.window > 0):
            raise ValueError(f"{self}: decay must be in (0, 1], and a window goes with queries='last'")


@dataclass(frozen=True, kw_only=True)
class CachedTokens:
    """What a policy sees: the live slots of one sequence, in no particular order.

    `positions` (int, [..., N]) are original positions, distinct in a row; `mass` (fp32, [..., N]) is what the
    policy's `Watch` asked for, summed over the query heads of the KV head, and zero where it asked for none.
    `num_tokens` counts the sequence's tokens so far, evicted ones included: the next query's position. `first_row`
    rows of the sequence lie before these: an engine may ask for all layers at once or for one after the other, and
    must be told the same.
    """

    positions: Tensor
    mass: Tensor
    num_tokens: int
    first_row: int = 0


@runtime_checkable
class EvictionPolicy(Protocol):
    """Chooses what stays. Must be a pure function of its arguments: the engine replays it after a preemption."""

    @property
    def budget(self) -> Budget:
        """Resolved counts."""

    @property
    def watch(self) -> Watch:
        """The attention it needs to see."""

    def select(self, tokens: CachedTokens) -> Tensor:
        """Slots that stay: int64 [..., budget.tokens], ascending, for N > budget.tokens live slots."""


class PolicyFactory(Protocol):
    """What an entry point in `trtkit.kv_policies` names: a class with this classmethod."""

    def from_spec(self, spec: KVPolicySpec) -> EvictionPolicy:
        """Build the policy. `spec.budget` is in tokens.

        Raises:
            UsageError: an option this policy does not have, or counts that contradict each other.
        """


def refuse_scorer(spec: KVPolicySpec) -> None:
    """For policies without scorers.

    Raises:
        UsageError: one was given.
    """
    if spec.scorer is not None:
        raise UsageError(f"KV policy {spec.kind!r} has no scorer, but scorer={spec.scorer} was given; leave it out")
