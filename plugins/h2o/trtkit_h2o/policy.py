"""H2O (Zhang et al., NeurIPS 2023, arXiv 2306.14048): keep sinks, the recent window and the heavy hitters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from trtkit.kv.policy import Budget, CachedTokens, Watch, resolve_budget
from trtkit.kv.ranking import keep_best
from trtkit.spec.errors import UsageError
from trtkit.spec.kv import KVPolicySpec

SCORERS = ("sum", "mean", "decay")
DEFAULT_SCORER = "mean"
DECAY = 0.98


@dataclass(frozen=True, kw_only=True)
class H2O:
    """Ranks a key by the attention it has received, summed over the query heads of its KV head.

    `scorer` says how mass adds up over time: "sum" (the paper; favours old tokens, which had more queries), "mean"
    (divided by the number of queries that could see the key) or "decay" (each query first multiplies what is
    there by `decay`). Equal scores: the newer token stays. NaN mass ranks last.
    """

    budget: Budget
    scorer: str = DEFAULT_SCORER
    decay: float = DECAY

    def __post_init__(self) -> None:
        if self.scorer not in SCORERS:
            raise UsageError(f"KV policy 'h2o': unknown scorer {self.scorer!r}; allowed are {', '.join(SCORERS)}")
        if not 0 < self.decay < 1:
            raise UsageError(f"KV policy 'h2o': decay is {self.decay}, must be between 0 and 1")

    @classmethod
    def from_spec(cls, spec: KVPolicySpec) -> H2O:
        """Build from a resolved spec."""
        return cls(budget=resolve_budget(spec), scorer=spec.scorer or DEFAULT_SCORER)

    @property
    def watch(self) -> Watch:
        """Every query counts."""
        return Watch(queries="all", decay=self.decay if self.scorer == "decay" else 1.0)

    def select(self, tokens: CachedTokens) -> Tensor:
        """Exactly the budget per row, ascending."""
        scores = tokens.mass
        if self.scorer == "mean":
            # A key is seen by its own query first, so no lifetime is below one.
            scores = scores / (tokens.num_tokens - tokens.positions)
        return keep_best(scores, tokens.positions, tokens.num_tokens, self.budget)
