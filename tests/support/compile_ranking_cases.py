"""Calls that compile the kernel of `trtkit.kernels.triton_ranking`: short rows, Llama 3 70B's, and long ones."""

from __future__ import annotations

import torch

from trtkit.kernels import triton_ranking


def _keep(length: int, tokens: int) -> None:
    positions = torch.zeros(640, length, dtype=torch.int32)
    triton_ranking.keep_best(torch.empty(640, length), positions, 9000, tokens=tokens, sinks=4, recent=9)


CASES = {
    "64 slots": lambda: _keep(64, 48),
    "2080 slots": lambda: _keep(2080, 2048),
    "8,224 slots": lambda: _keep(8224, 8192),
    "20,000 slots": lambda: _keep(20000, 16384),
}
