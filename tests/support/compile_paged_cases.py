"""Calls that compile the kernels of `trtkit.kernels.triton_paged` at Llama 3 70B's shapes."""

from __future__ import annotations

import torch

from trtkit.kernels import paged, triton_paged


def _batch(dtype: torch.dtype, sequences: int = 4) -> paged.PagedBatch:
    return paged.PagedBatch(
        cache=torch.empty(16, 2, 8, 32, 128, dtype=dtype),
        blocks_BM=torch.zeros(sequences, 4, dtype=torch.int32),
        lengths_B=torch.full((sequences,), 100, dtype=torch.int32),
    )


def _decode(dtype: torch.dtype) -> None:
    triton_paged.paged_decode_attention(torch.empty(4, 64, 128, dtype=dtype), _batch(dtype))


CASES = {
    "decode fp16": lambda: _decode(torch.float16),
}
