"""H2O spelled out in numpy: slow, obvious, and the definition that the fast form must equal.

It keeps every key and value, marks the evicted ones, and attends under the mask. Nothing is paged, batched or
compacted here. Shapes: H KV heads, G query heads per KV head, T new tokens, P positions so far, D head dim.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from trtkit_h2o.policy import H2O

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def select_positions(scores: Floats, live: Bools, num_tokens: int, policy: H2O) -> Bools:
    """Which live positions of one head stay, as a mask over all positions [P].

    Sinks first, then the recent window, then by score: higher stays, the newer of equals stays, NaN goes first.
    """
    budget = policy.budget
    positions = [p for p in range(num_tokens) if live[p]]
    stays = [p for p in positions if p < budget.sinks or p >= num_tokens - budget.recent]
    candidates = [p for p in positions if p not in set(stays)]

    def rank(p: int) -> tuple[float, int]:
        return (-math.inf if math.isnan(scores[p]) else float(scores[p]), p)

    candidates.sort(key=rank, reverse=True)
    mask = np.zeros(num_tokens, dtype=bool)
    mask[stays + candidates[: budget.tokens - len(stays)]] = True
    return mask


class LayerOracle:
    """One layer of one sequence: feed tokens, ask for attention, evict when told to."""

    def __init__(self, policy: H2O, kv_heads: int, head_dim: int) -> None:
        self.policy = policy
        self.keys: Floats = np.zeros((kv_heads, 0, head_dim))
        self.values: Floats = np.zeros((kv_heads, 0, head_dim))
        self.live: Bools = np.zeros((kv_heads, 0), dtype=bool)
        self.mass: Floats = np.zeros((kv_heads, 0))

    @property
    def num_tokens(self) -> int:
        """Positions so far, evicted ones included."""
        return int(self.keys.shape[1])

    def feed(self, queries_THGD: Floats, keys_THD: Floats, values_THD: Floats) -> Floats:
        """Append T tokens and attend, one query at a time over what is live and not in its future.

        Returns:
            Attention output [T, H, G, D].
        """
        first = self.num_tokens
        count, kv_heads = keys_THD.shape[:2]
        self.keys = np.concatenate([self.keys, keys_THD.transpose(1, 0, 2)], axis=1)
        self.values = np.concatenate([self.values, values_THD.transpose(1, 0, 2)], axis=1)
        self.live = np.concatenate([self.live, np.ones((kv_heads, count), dtype=bool)], axis=1)
        self.mass = np.concatenate([self.mass, np.zeros((kv_heads, count))], axis=1)
        out = np.zeros_like(queries_THGD)
        for t in range(count):
            for head in range(kv_heads):
                if self.policy.scorer == "decay":
                    self.mass[head] *= self.policy.decay
                for g in range(queries_THGD.shape[2]):
                    out[t, head, g] = self._attend(head, queries_THGD[t, head, g], first + t)
        return out

    def _attend(self, head: int, query_D: Floats, position: int) -> Floats:
        visible = self.live[head].copy()
        visible[position + 1 :] = False
        logits = self.keys[head] @ query_D / math.sqrt(query_D.shape[0])
        logits[~visible] = -math.inf
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        self.mass[head] += weights
        return np.asarray(weights @ self.values[head])

    def scores(self) -> Floats:
        """What the policy ranks by, [H, P]."""
        if self.policy.scorer == "mean":
            return self.mass / (self.num_tokens - np.arange(self.num_tokens))
        return self.mass

    def evict(self) -> None:
        """Cut every head that holds more than the budget down to it."""
        scores = self.scores()
        for head in range(self.live.shape[0]):
            if int(self.live[head].sum()) > self.policy.budget.tokens:
                self.live[head] = select_positions(scores[head], self.live[head], self.num_tokens, self.policy)
