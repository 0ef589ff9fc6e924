"""Calls that compile the kernels of `trtkit.kernels.triton_sampling` at Llama 3 70B's shapes."""

from __future__ import annotations

import torch

from trtkit.kernels import triton_sampling


def _sample(dtype: torch.dtype) -> None:
    real, whole = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int32)
    triton_sampling.sample_rows(torch.empty(2, 128_256, dtype=dtype), real, whole, real, real)


CASES = {
    "sampling fp16": lambda: _sample(torch.float16),
    "sampling bf16": lambda: _sample(torch.bfloat16),
    "sampling fp32": lambda: _sample(torch.float32),
    "greedy bf16": lambda: triton_sampling.greedy(torch.empty(2, 128_256, dtype=torch.bfloat16)),
    "greedy fp32": lambda: triton_sampling.greedy(torch.empty(2, 128_256)),
}
