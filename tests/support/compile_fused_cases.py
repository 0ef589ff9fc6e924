"""Calls that compile the kernels of `trtkit.kernels.triton_fused` at Llama 3 70B's shapes."""

from __future__ import annotations

import torch
from triton.runtime import driver

from trtkit.kernels import triton_fused, triton_fused_fp8

TOKENS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, DIM = 32, 8192, 28672, 64, 8, 128


def _norm(dtype: torch.dtype, *, delta: bool, hidden: int = HIDDEN) -> None:
    residual = torch.empty(TOKENS, hidden, dtype=dtype)
    added = torch.empty_like(residual) if delta else None
    triton_fused.add_rms_norm(added, residual, torch.empty(hidden, dtype=dtype), 1e-5)


def _rope(dtype: torch.dtype, cache_dtype: torch.dtype, *, plain: bool) -> None:
    integers = torch.zeros(TOKENS, dtype=torch.int32)
    table, norm = torch.empty(64, DIM // 2, dtype=dtype), torch.empty(DIM, dtype=dtype)
    triton_fused.rope_write(
        torch.empty(TOKENS, HEADS + 2 * KV_HEADS, DIM, dtype=dtype), integers, table, table,
        torch.empty(4, 2, KV_HEADS, 32, DIM, dtype=cache_dtype), torch.zeros(TOKENS, 4, dtype=torch.int32),
        None if plain else integers, integers, num_heads=HEADS,
        q_norm_D=None if plain else norm, k_norm_D=None if plain else norm, epsilon=1e-6,
        ring=torch.empty(8, HEADS, DIM, dtype=dtype), ring_index_T=integers,
    )  # fmt: skip


def _norm_fp8(dtype: torch.dtype) -> None:
    residual = torch.empty(TOKENS, HIDDEN, dtype=dtype)
    if driver.active.get_current_device() >= 89:  # below, the hardware makes no FP8
        triton_fused_fp8.add_rms_norm_fp8(residual, residual, torch.empty(HIDDEN, dtype=dtype), 1e-5)


def _silu_fp8(dtype: torch.dtype, width: int = INTERMEDIATE) -> None:
    if driver.active.get_current_device() >= 89:
        triton_fused_fp8.silu_mul_fp8(torch.empty(TOKENS, 2 * width, dtype=dtype))


CASES = {
    "norm bf16 to fp8": lambda: _norm_fp8(torch.bfloat16),
    "norm fp32 to fp8": lambda: _norm_fp8(torch.float32),
    "silu bf16 to fp8": lambda: _silu_fp8(torch.bfloat16),
    "widest silu to fp8": lambda: _silu_fp8(torch.float16, triton_fused_fp8.MAX_SILU_BYTES // 2),
    "widest silu fp32 to fp8": lambda: _silu_fp8(torch.float32, triton_fused_fp8.MAX_SILU_BYTES // 4),
    "norm bf16": lambda: _norm(torch.bfloat16, delta=True),
    "first norm bf16": lambda: _norm(torch.bfloat16, delta=False),
    "norm of a row that does not fit registers": lambda: _norm(torch.float16, delta=True, hidden=2 * HIDDEN),
    "norm fp32": lambda: _norm(torch.float32, delta=True),
    "silu bf16": lambda: triton_fused.silu_mul(torch.empty(TOKENS, 2 * INTERMEDIATE, dtype=torch.bfloat16)),
    "rope bf16": lambda: _rope(torch.bfloat16, torch.bfloat16, plain=True),
    "rope bf16 into fp8": lambda: _rope(torch.bfloat16, torch.float8_e4m3fn, plain=True),
    "normed rope fp16 into fp8": lambda: _rope(torch.float16, torch.float8_e4m3fn, plain=False),
    "embed bf16": lambda: triton_fused.embed(
        torch.zeros(TOKENS, dtype=torch.int32), torch.empty(64, HIDDEN, dtype=torch.bfloat16)
    ),
}
