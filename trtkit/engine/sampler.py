"""From logits to the next token: greedy for a whole batch at once, sampling row by row.

The draw for a request's n-th token depends on its seed and n alone, so neighbours, batching and preemption
cannot change it. Filters in the usual order: temperature, then top-k, then top-p.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from trtkit.spec.engine import Sampling

NOT_A_NUMBER = -1
"""Stands for a token where the logits hold NaN or infinity."""


def sample(
    logits_RV: Tensor,
    sampling: Sequence[Sampling],
    draws: Sequence[tuple[int, int]],
    guesses: Sequence[int | None] | None = None,
) -> list[int]:
    """One token per row, or `NOT_A_NUMBER`.

    Args:
        logits_RV: [rows, vocabulary].
        sampling: how each row is sampled; temperature 0 takes the first of the largest logits.
        draws: (seed, index of the token) of each row.
        guesses: the token that a row was fed as a guess of what the row before it draws, None where it was no guess.
            After a wrong guess nobody asks for a row's token: it is whatever costs least.
    """
    best = logits_RV.max(dim=-1)
    tokens: list[int] = torch.where(best.values.isfinite(), best.indices, NOT_A_NUMBER).tolist()
    wanted = True
    for row, (how, (seed, index)) in enumerate(zip(sampling, draws, strict=True)):
        guess = None if guesses is None else guesses[row]
        wanted = guess is None or (wanted and tokens[row - 1] == guess)
        if wanted and how.temperature > 0 and tokens[row] != NOT_A_NUMBER:
            tokens[row] = _draw(logits_RV[row], how, uniform(seed, index))
    return tokens


def uniform(seed: int, index: int) -> float:
    """The `index`-th number in [0, 1) of a stream that is a function of `seed` alone."""
    return float(np.random.default_rng((seed, index)).random())


def fresh_seed() -> int:
    """A seed for a request that gave none."""
    return int(np.random.SeedSequence().generate_state(1)[0])


def _draw(logits_V: Tensor, how: Sampling, u: float) -> int:
    """Inverse transform over the tokens that pass the filters, most likely first, the lower id first of equals.

    Equals are common in 16 bits, and the order of `topk` among them is nobody's promise; the device path orders alike.
    """
    values, ids = (logits_V.double() / how.temperature).sort(descending=True, stable=True)
    count = min(how.top_k or values.numel(), values.numel())
    values, ids = values[:count], ids[:count]
    cumulative = values.softmax(dim=0).cumsum(dim=0)
    if how.top_p < 1:
        # The nucleus is the shortest head whose mass reaches top_p; the first token is always in it.
        size = int(torch.searchsorted(cumulative, how.top_p)) + 1
        cumulative = cumulative[: min(size, count)]
    position = int(torch.searchsorted(cumulative, u * float(cumulative[-1]), right=True))
    return int(ids[min(position, cumulative.numel() - 1)])
