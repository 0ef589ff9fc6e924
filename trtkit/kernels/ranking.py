"""Keeping the best of a row: the one place that ranks, so that ties, NaN and protection mean the same everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from trtkit.kernels.dispatch import use_triton
from trtkit.kernels.fused_arguments import check_ranking


def keep_best(scores: Tensor, positions: Tensor, num_tokens: int, *, tokens: int, sinks: int, recent: int) -> Tensor:
    """Slots of sinks, recent window and best scores, exactly `tokens` per row.

    Sinks are positions below `sinks`, the recent window the last `recent` positions before `num_tokens`; the rest is
    ranked by score. Equal scores: the newer token stays. NaN ranks below every number, so it can push nothing out;
    infinities rank as the largest numbers do.

    Args:
        scores: [..., N], higher stays.
        positions: integers [..., N], original positions, distinct in a row, in any slot order.
        num_tokens: tokens of the sequence so far; the newest position is `num_tokens - 1`.
        tokens: slots that stay; N must be at least as many.
        sinks: oldest tokens that always stay.
        recent: newest tokens that always stay.

    Returns:
        int64 [..., tokens], ascending slots.

    Raises:
        ValueError: fewer slots than `tokens`, or shapes that differ.
    """
    check_ranking(scores, positions, tokens, sinks, recent)
    if use_triton(scores, "ranking"):
        from trtkit.kernels import triton_ranking

        return triton_ranking.keep_best(scores, positions, num_tokens, tokens=tokens, sinks=sinks, recent=recent)
    return keep_best_twin(scores, positions, num_tokens, tokens=tokens, sinks=sinks, recent=recent)


def keep_best_twin(
    scores: Tensor, positions: Tensor, num_tokens: int, *, tokens: int, sinks: int, recent: int
) -> Tensor:
    """Defines `keep_best`, by sorting."""
    largest = torch.finfo(torch.float32).max
    ranked = scores.to(torch.float32).nan_to_num(nan=-torch.inf, posinf=largest, neginf=-largest)
    protected = (positions < sinks) | (positions >= num_tokens - recent)
    ranked = ranked.masked_fill(protected, torch.inf)
    newest_first = positions.argsort(dim=-1, descending=True)
    # A stable sort of slots already ordered newest first leaves the newer of two equals in front.
    order = ranked.gather(-1, newest_first).argsort(dim=-1, descending=True, stable=True)
    kept = newest_first.gather(-1, order[..., :tokens])
    return kept.sort(dim=-1).values
