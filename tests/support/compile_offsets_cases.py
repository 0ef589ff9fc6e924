"""Calls that differ only in where they begin and how wide their tables are: each case must compile once."""

from __future__ import annotations

import torch

from trtkit.kernels import triton_fused, triton_sampling

HEADS, KV_HEADS, DIM = 8, 2, 64


def _rope(first: int, columns: int) -> None:
    integers = torch.zeros(64, dtype=torch.int32)[first : first + 8]
    table = torch.empty(64, DIM // 2, dtype=torch.bfloat16)
    triton_fused.rope_write(
        torch.empty(64, HEADS + 2 * KV_HEADS, DIM, dtype=torch.bfloat16)[first : first + 8], integers, table, table,
        torch.empty(4, 2, KV_HEADS, 32, DIM, dtype=torch.bfloat16), torch.zeros(64, columns, dtype=torch.int32),
        integers, integers, num_heads=HEADS, ring=torch.empty(8, HEADS, DIM, dtype=torch.bfloat16),
        ring_index_T=integers, q_out=torch.empty(64, HEADS, DIM, dtype=torch.bfloat16)[first : first + 8],
    )  # fmt: skip


def _rope_everywhere() -> None:
    for first, columns in ((0, 16), (1, 1), (5, 7)):
        _rope(first, columns)


def _embed_everywhere() -> None:
    for first in (0, 1):
        triton_fused.embed(torch.zeros(9, dtype=torch.int32)[first:], torch.empty(64, 64, dtype=torch.bfloat16))


def _norm_for_any_count() -> None:
    for tokens in (1, 7, 16):
        residual = torch.empty(tokens, 64, dtype=torch.bfloat16)
        triton_fused.add_rms_norm(torch.empty_like(residual), residual, residual[0].clone(), 1e-5)


def _greedy_for_any_count() -> None:
    for rows in (1, 7, 16):
        triton_sampling.greedy(
            torch.empty(rows, 8192, dtype=torch.bfloat16), out=torch.zeros(17, dtype=torch.int32)[:rows]
        )


CASES = {
    "rope": _rope_everywhere,
    "embed": _embed_everywhere,
    "norm": _norm_for_any_count,
    "greedy": _greedy_for_any_count,
}
