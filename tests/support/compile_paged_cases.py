"""Calls that compile the kernels behind `trtkit.kernels.paged` at Llama 3 70B's shapes, and at some that are odd."""

from __future__ import annotations

import torch

from trtkit.kernels import paged, triton_compact, triton_decode, triton_paged, triton_prefill, triton_score

FP8 = torch.float8_e4m3fn


def _batch(dtype: torch.dtype, *, block: int = 32, dim: int = 128, heads: int = 8) -> paged.PagedBatch:
    return paged.PagedBatch(
        cache=torch.empty(16, 2, heads, block, dim, dtype=dtype),
        blocks_BM=torch.zeros(4, 4, dtype=torch.int32),
        lengths_B=torch.full((4,), 100, dtype=torch.int32),
    )


def _decode(dtype, cache=None, *, group=8, splits=16, ring=True, **shape):
    batch = _batch(cache or dtype, **shape)
    heads, dim = batch.cache.shape[2] * group, batch.cache.shape[4]
    triton_decode.paged_decode_attention(
        torch.empty(4, heads, dim, dtype=dtype),
        batch,
        splits=splits,
        ring_lse=torch.empty(9, heads) if ring else None,
        ring_index_B=torch.zeros(4, dtype=torch.int32) if ring else None,
    )


def _prefill(dtype, cache=None, *, group=8, **shape):
    batch = _batch(cache or dtype, **shape)
    queries = torch.empty(16, batch.cache.shape[2] * group, batch.cache.shape[4], dtype=dtype)
    starts, cached = torch.arange(5, dtype=torch.int32) * 4, torch.zeros(4, dtype=torch.int32)
    triton_prefill.paged_prefill_attention(queries, starts, cached, batch, max_count=4)


def _score(dtype, cache=None, *, group=8, carry=0.5, count=32, **shape):
    storage = _batch(cache or dtype, **shape).cache.unsqueeze(0).expand(2, -1, -1, -1, -1, -1).contiguous()
    heads, dim = storage.shape[3], storage.shape[5]
    triton_score.score_layers(
        torch.empty(2, count, heads * group, dim, dtype=dtype),
        torch.empty(2, count, heads * group),
        torch.empty(count),
        storage,
        torch.zeros(4, dtype=torch.int32),
        100,
        torch.zeros(2, heads, 100, dtype=torch.int32),
        torch.zeros(count, dtype=torch.int32),
        out=torch.zeros(2, heads, 100),
        carry=carry,
    )


def _compact(dtype, index=torch.int64, **shape):
    storage = _batch(dtype, **shape).cache.unsqueeze(0)
    keep = torch.zeros(storage.shape[3], 64, dtype=index)
    mass = torch.zeros(1, storage.shape[3], 100)
    triton_compact.compact_layers(storage, torch.zeros(4, dtype=torch.int32), keep, 96, mass, mass.int())


def _one_layer(dtype):
    batch = _batch(dtype)
    queries = paged.PagedQueries(
        heads_RHD=torch.empty(8, 64, 128, dtype=dtype),
        starts_B1=torch.arange(5, dtype=torch.int32) * 2,
        positions_R=torch.zeros(8, dtype=torch.int32),
    )
    positions = torch.zeros(4, 8, 100, dtype=torch.int32)
    triton_paged.score_paged(queries, torch.empty(8, 64), torch.empty(8), batch, positions)
    triton_paged.compact_paged(batch.cache, batch.blocks_BM, torch.zeros(3, 4, dtype=torch.int32))


CASES = {
    "decode bf16": lambda: _decode(torch.bfloat16),
    "decode bf16, fp8 cache": lambda: _decode(torch.bfloat16, FP8, splits=4),
    "decode fp16, odd shape, one part": lambda: _decode(
        torch.float16, group=3, splits=1, ring=False, dim=96, block=16, heads=2
    ),
    "decode fp32": lambda: _decode(torch.float32, group=4, splits=2, dim=64, heads=2),
    "prefill bf16": lambda: _prefill(torch.bfloat16),
    "prefill bf16, fp8 cache": lambda: _prefill(torch.bfloat16, FP8, block=64),
    "prefill fp16, blocks of 64": lambda: _prefill(torch.float16, block=64),
    "prefill fp32": lambda: _prefill(torch.float32, group=4, dim=64, heads=2),
    "score bf16": lambda: _score(torch.bfloat16),
    "score bf16, a piece of a prompt": lambda: _score(torch.bfloat16, count=256),
    "score bf16, fp8 cache": lambda: _score(torch.bfloat16, FP8, carry=0.0),
    "score fp32": lambda: _score(torch.float32, group=4, dim=64, heads=2),
    "compact bf16": lambda: _compact(torch.bfloat16),
    "compact fp8": lambda: _compact(FP8, torch.int32),
    "one layer bf16": lambda: _one_layer(torch.bfloat16),
}
