"""Calls that compile the kernels of `trtkit.kernels.triton_matmul` and its neighbours at Llama 3 70B's shapes."""

from __future__ import annotations

from functools import partial

import torch
from triton.runtime import driver

from trtkit.kernels import triton_matmul, triton_matmul_grouped, triton_quantise, triton_widen_groups


def _weight(outputs: int, inputs: int, dtype: torch.dtype):
    """An untouched weight and its scales; memory that nobody writes costs nothing."""
    scale = None if dtype in {torch.float16, torch.bfloat16} else torch.empty(outputs, dtype=torch.float16)
    return torch.empty(outputs, inputs, dtype=dtype), scale


def _linear(tokens: int, dtype: torch.dtype, weight_type: torch.dtype) -> None:
    weight, scale = _weight(8192, 8192, weight_type)
    x, out = torch.empty(tokens, 8192, dtype=dtype), torch.empty(tokens, 8192, dtype=dtype)
    triton_matmul.fused_linear(x, weight, scale, None, out)


def _grouped(tokens: int, dtype: torch.dtype, *, bits: int = 4, group: int = 128, zeros: bool = False) -> None:
    width = 4096 if bits == 4 else 8192
    weight = torch.empty(8192, width, dtype=torch.uint8 if bits == 4 else torch.int8)
    scale = torch.empty(8192, 8192 // group, dtype=dtype)
    x, out = torch.empty(tokens, 8192, dtype=dtype), torch.empty(tokens, 8192, dtype=dtype)
    triton_matmul_grouped.fused_linear(x, weight, scale, torch.empty_like(scale) if zeros else None, None, out)


def _dequantise_groups() -> None:
    scale = torch.empty(1024, 64, dtype=torch.bfloat16)
    out = torch.empty(1024, 8192, dtype=torch.bfloat16)
    triton_widen_groups.dequantise_groups(torch.empty(1024, 4096, dtype=torch.uint8), scale, scale, out)


def _early() -> None:
    """As where a product starts while the kernel before it ends; Ampere cannot."""
    products = (triton_matmul, triton_matmul_grouped)
    starts_early = triton_matmul.starts_early
    try:
        for module in products:
            module.starts_early = lambda _: driver.active.get_current_device() >= 90
        _linear(1, torch.float16, torch.int8)
        _grouped(1, torch.float16)
    finally:
        for module in products:
            module.starts_early = starts_early


def _dequantise() -> None:
    weight, scale = _weight(1024, 8192, torch.int8)
    triton_quantise.dequantise(weight, scale, torch.empty(1024, 8192, dtype=torch.float16))


def _quantise() -> None:
    if driver.active.get_current_device() >= 89:  # below, the hardware makes no FP8
        triton_quantise.quantise_rows_fp8(torch.empty(4, 28672, dtype=torch.bfloat16))


CASES = {
    "dequantise": _dequantise,
    "quantise rows": _quantise,
    "int8 and int4, 1 token, early": _early,
    "int8, 1 token": partial(_linear, 1, torch.float16, torch.int8),
    "int8, 32 tokens": partial(_linear, 32, torch.float16, torch.int8),
    "int8, 64 tokens": partial(_linear, 64, torch.float16, torch.int8),
    "int8, 128 tokens": partial(_linear, 128, torch.float16, torch.int8),
    "int8 in bf16, 32 tokens": partial(_linear, 32, torch.bfloat16, torch.int8),
    "fp8 in bf16, 1 token": partial(_linear, 1, torch.bfloat16, torch.float8_e4m3fn),
    "fp8, 64 tokens": partial(_linear, 64, torch.float16, torch.float8_e4m3fn),
    "fp16, 1 token": partial(_linear, 1, torch.float16, torch.float16),
    "bf16, 64 tokens": partial(_linear, 64, torch.bfloat16, torch.bfloat16),
    "dequantise groups": _dequantise_groups,
    "int4, 1 token": partial(_grouped, 1, torch.float16),
    "int4 in bf16 with zero points, 16 tokens": partial(_grouped, 16, torch.bfloat16, zeros=True),
    "int4 with zero points, 32 tokens": partial(_grouped, 32, torch.float16, zeros=True),
    "int4, 64 tokens": partial(_grouped, 64, torch.bfloat16),
    "int4, 128 tokens": partial(_grouped, 128, torch.bfloat16, zeros=True),
    "int4 in groups of 32, 1 token": partial(_grouped, 1, torch.bfloat16, group=32, zeros=True),
    "int8 in groups, 32 tokens": partial(_grouped, 32, torch.bfloat16, bits=8),
}
