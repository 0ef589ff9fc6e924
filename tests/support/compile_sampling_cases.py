"""Calls that compile the kernels of `trtkit.kernels.triton_sampling` at Llama 3 70B's shapes."""

from __future__ import annotations

import torch

from trtkit.kernels import triton_sampling

CASES = {
    "greedy bf16": lambda: triton_sampling.greedy(torch.empty(2, 128_256, dtype=torch.bfloat16)),
    "greedy fp32": lambda: triton_sampling.greedy(torch.empty(2, 128_256)),
}
