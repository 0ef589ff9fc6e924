"""Calls that compile attention at shapes where tiles are hard to fit: wide and narrow heads, many query heads, fp32."""

from __future__ import annotations

import dataclasses

import torch
from support.compile_paged_cases import FP8, _batch, _decode, _prefill, _score

from trtkit.kernels import paged, triton_decode, triton_paged, triton_sampling


def _decode_anywhere() -> None:
    """int64 tables, a cache that begins one element past where memory is aligned, and three parts."""
    aligned = _batch(torch.bfloat16)
    moved = torch.empty(1 + aligned.cache.numel(), dtype=torch.bfloat16)[1:].view(aligned.cache.shape)
    batch = dataclasses.replace(
        aligned, cache=moved, blocks_BM=aligned.blocks_BM.long(), lengths_B=aligned.lengths_B.long()
    )
    triton_decode.paged_decode_attention(torch.empty(4, 64, 128, dtype=torch.bfloat16), batch, splits=3)


def _one_layer(dim: int) -> None:
    batch = _batch(torch.float32, dim=dim, heads=2)
    queries = paged.PagedQueries(
        heads_RHD=torch.empty(8, 4, dim), starts_B1=torch.arange(5, dtype=torch.int32) * 2,
        positions_R=torch.zeros(8, dtype=torch.int32),
    )  # fmt: skip
    positions = torch.zeros(4, 2, 100, dtype=torch.int32)
    triton_paged.score_paged(queries, torch.empty(8, 4), torch.empty(8), batch, positions)


def _one_token() -> None:
    real = torch.ones(2, dtype=torch.float64)
    triton_sampling.sample_rows(torch.empty(2, 1), real, torch.zeros(2, dtype=torch.int64), real, real)


CASES = {
    "decode, heads of 256 in fp32": lambda: _decode(torch.float32, dim=256, heads=2),
    "decode, heads of 8": lambda: _decode(torch.bfloat16, dim=8, group=1, heads=2, block=1),
    "decode from anywhere": _decode_anywhere,
    "prefill, heads of 256": lambda: _prefill(torch.bfloat16, dim=256, heads=2, block=128),
    "prefill, heads of 256 in fp32": lambda: _prefill(torch.float32, dim=256, heads=2, group=3),
    "prefill, heads of 100 over fp8": lambda: _prefill(torch.float16, FP8, dim=100, block=24, group=5, heads=2),
    "score, heads of 256 in fp32": lambda: _score(torch.float32, dim=256, heads=2),
    "score, heads of 512": lambda: _score(torch.bfloat16, dim=512, heads=2, block=8),
    "one layer, heads of 256 in fp32": lambda: _one_layer(256),
    "sampling of one token": _one_token,
}
