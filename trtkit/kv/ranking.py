"""Keeping the best of a row: the one place that sorts, so that ties, NaN and protection mean the same everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from trtkit.kv.policy import Budget


def keep_best(scores: Tensor, positions: Tensor, num_tokens: int, budget: Budget) -> Tensor:
    """Slots of sinks, recent window and best scores, exactly `budget.tokens` per row.

    Sinks are positions below `budget.sinks`, the recent window the last `budget.recent` positions before
    `num_tokens`; the rest is ranked by score. Equal scores: the newer token stays. NaN ranks below every number,
    so it can push nothing out; infinities rank as numbers do.

    Args:
        scores: [..., N], higher stays.
        positions: [..., N] original positions, distinct in a row, in any slot order.
        num_tokens: tokens of the sequence so far; the newest position is `num_tokens - 1`.
        budget: counts; N must be at least `budget.tokens`.

    Returns:
        int64 [..., budget.tokens], ascending slots.
    """
    largest = torch.finfo(torch.float32).max
    ranked = scores.to(torch.float32).nan_to_num(nan=-torch.inf, posinf=largest, neginf=-largest)
    protected = (positions < budget.sinks) | (positions >= num_tokens - budget.recent)
    ranked = ranked.masked_fill(protected, torch.inf)
    newest_first = positions.argsort(dim=-1, descending=True)
    # A stable sort of slots already ordered newest first leaves the newer of two equals in front.
    order = ranked.gather(-1, newest_first).argsort(dim=-1, descending=True, stable=True)
    kept = newest_first.gather(-1, order[..., : budget.tokens])
    return kept.sort(dim=-1).values
