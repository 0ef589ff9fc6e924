"""From logits to tokens without waiting for the device: torch twins, which define it, and the choice of the kernel.

Shapes: R rows, V vocabulary. A row whose largest logit is NaN or infinite gives `NOT_A_NUMBER`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trtkit.kernels.dispatch import use_triton
from trtkit.kernels.fused_arguments import check_draws, check_greedy

NOT_A_NUMBER = -1
"""Stands for a token where the logits hold NaN or infinity."""

GREEDY_TILE = 4096
"""Logits one program reads; a vocabulary of 128,256 makes 32 programs a row."""

_FAMILY = "sampling"


def greedy(logits_RV: Tensor, *, out: Tensor | None = None, workspace: Tensor | None = None) -> Tensor:
    """The largest logit's token of each row, the lowest of equals; int32 [R].

    Args:
        logits_RV: any floating-point type, contiguous rows.
        out: int32 [R] for the result.
        workspace: int64, at least `workspace_size` elements; only the kernel needs it.
    """
    check_greedy(logits_RV, out, workspace, workspace_size(*logits_RV.shape))
    if use_triton(logits_RV, _FAMILY):
        from trtkit.kernels import triton_sampling

        return triton_sampling.greedy(logits_RV, out=out, workspace=workspace)
    best = logits_RV.max(dim=-1)
    tokens = torch.where(best.values.isfinite(), best.indices, NOT_A_NUMBER).to(torch.int32)
    return tokens if out is None else out.copy_(tokens)


def workspace_size(rows: int, vocab_size: int) -> int:
    """Elements `greedy` needs for partial results of this many rows."""
    return rows * -(-vocab_size // GREEDY_TILE)


def sample_rows(
    logits_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, uniform_R: Tensor
) -> Tensor:
    """One token a row: temperature, then top-k, then top-p, then inverse transform, most likely token first.

    What the engine draws row by row, for all rows at once and without a synchronisation. Equal logits are ordered by
    token id. The kernel sums in float32 where the twin uses float64: a draw within about 1e-6 of the border between two
    tokens may fall on either side.

    Args:
        logits_RV: any floating-point type.
        temperature_R: 0 is greedy. This, `top_p_R` and `uniform_R` are best given in float64, as the CPU computes.
        top_k_R: integers; 0 is off.
        top_p_R: in (0, 1].
        uniform_R: the draw of each row, in [0, 1).

    Returns:
        int32 [R].
    """
    check_draws(logits_RV, temperature_R=temperature_R, top_k_R=top_k_R, top_p_R=top_p_R, uniform_R=uniform_R)
    if use_triton(logits_RV, _FAMILY):
        from trtkit.kernels import triton_sampling

        return triton_sampling.sample_rows(logits_RV, temperature_R, top_k_R, top_p_R, uniform_R)
    return sample_twin(logits_RV, temperature_R, top_k_R, top_p_R, uniform_R)


def sample_twin(
    logits_RV: Tensor, temperature_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, uniform_R: Tensor
) -> Tensor:
    """Defines `sample_rows`, by sorting."""
    tokens = greedy(logits_RV)
    is_drawn_R = (temperature_R > 0) & (tokens != NOT_A_NUMBER)
    temperature = torch.where(is_drawn_R, temperature_R.double(), 1.0)
    ranked = logits_RV.float().sort(dim=-1, descending=True, stable=True)
    scaled = ranked.values.double() / temperature[:, None]
    vocab_size = logits_RV.shape[1]
    kept_R = torch.where(top_k_R > 0, top_k_R, vocab_size).clamp(max=vocab_size)
    rank_V = torch.arange(vocab_size, device=logits_RV.device)
    scaled = scaled.masked_fill(rank_V >= kept_R[:, None], -torch.inf)
    cumulative_RV = scaled.softmax(dim=-1).cumsum(dim=-1)
    # The nucleus is the shortest head whose mass reaches top_p; the first token is always in it.
    nucleus_R = (cumulative_RV < top_p_R.double()[:, None]).sum(dim=-1) + 1
    kept_R = torch.where(top_p_R < 1, torch.minimum(nucleus_R, kept_R), kept_R)
    mass_R1 = cumulative_RV.gather(1, (kept_R - 1).to(torch.int64)[:, None])
    target_R1 = uniform_R.double()[:, None] * mass_R1
    place_R = torch.minimum((cumulative_RV <= target_R1).sum(dim=-1), kept_R - 1)
    drawn_R = ranked.indices.gather(1, place_R.to(torch.int64)[:, None]).squeeze(1).to(torch.int32)
    return torch.where(is_drawn_R, drawn_R, tokens)
