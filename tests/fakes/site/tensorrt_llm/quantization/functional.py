"""The one function of `tensorrt_llm.quantization.functional` that is called, with a layout of the fake's own.

The real layout depends on the GPU; what matters here is that plain weights and packed ones cannot be taken for each other.
"""

from __future__ import annotations

import os

import torch


def preprocess_weights_for_mixed_gemm(
    tensor: torch.Tensor,
    quant_mode: torch.dtype,
    act_dtype: torch.dtype,
    sm_: int = -1,
    do_weight_interleave: bool = True,
) -> torch.Tensor:
    assert tensor.dtype == torch.int8, tensor.dtype
    assert tensor.is_contiguous()
    assert quant_mode == torch.int8, quant_mode
    assert act_dtype == torch.float16, act_dtype
    rows, cols = tensor.shape
    assert rows % 64 == 0, f"{rows} rows are no multiple of the tile's 64"
    assert cols % 8 == 0, cols
    columns_first = tensor.T.contiguous().flip(0).reshape(rows, cols)
    return (columns_first.view(torch.uint8) ^ 0x80).view(torch.int8).contiguous()


if os.environ.get("FAKE_TRTLLM_PACK") == "missing":
    del preprocess_weights_for_mixed_gemm


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """The other way, for the fake's engine: [in, out / 2] of a 16-bit type to int8 [in, out]."""
    numbers = (packed.contiguous().view(torch.uint8) ^ 0x80).view(torch.int8)
    rows, cols = numbers.shape
    return numbers.reshape(cols, rows).flip(0).T.contiguous()
