"""Calls that compile the kernels of the family `ranking`: short rows, Llama 3 70B's, and long ones."""

from __future__ import annotations

import torch

from trtkit.kernels import triton_ranking, triton_slots


def _keep(length: int, tokens: int) -> None:
    positions = torch.zeros(640, length, dtype=torch.int32)
    triton_ranking.keep_best(torch.empty(640, length), positions, 9000, tokens=tokens, sinks=4, recent=9)


def _flag(dtype: torch.dtype) -> None:
    flag = torch.zeros(1, dtype=torch.int32)
    triton_slots.flag_bad_slots(torch.zeros(80, 8, 2048, dtype=dtype), 2080, flag)


CASES = {
    "64 slots": lambda: _keep(64, 48),
    "2080 slots": lambda: _keep(2080, 2048),
    "8,224 slots": lambda: _keep(8224, 8192),
    "slots that are judged, int64": lambda: _flag(torch.int64),
    "slots that are judged, int32": lambda: _flag(torch.int32),
    "20,000 slots": lambda: _keep(20000, 16384),
}
