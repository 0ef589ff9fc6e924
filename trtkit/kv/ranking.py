"""Keeping the best of a row within a `Budget`; `trtkit.kernels.ranking` says what that means."""

from __future__ import annotations

from torch import Tensor

from trtkit.kernels import ranking
from trtkit.kv.policy import Budget


def keep_best(scores: Tensor, positions: Tensor, num_tokens: int, budget: Budget) -> Tensor:
    """Slots of sinks, recent window and best scores, exactly `budget.tokens` per row.

    Equal scores: the newer token stays. NaN ranks below every number.

    Args:
        scores: [..., N], higher stays.
        positions: [..., N] original positions, distinct in a row, in any slot order.
        num_tokens: tokens of the sequence so far; the newest position is `num_tokens - 1`.
        budget: counts; N must be at least `budget.tokens`.

    Returns:
        int64 [..., budget.tokens], ascending slots.
    """
    return ranking.keep_best(
        scores, positions, num_tokens, tokens=budget.tokens, sinks=budget.sinks, recent=budget.recent
    )
