"""`torch._scaled_mm`, the FP8 tensor-core product, behind a probe: what it takes differs by GPU and torch version.

Three ways, tried in this order once per device and type; which one runs is asked with `fp8_way`:

- `rowwise`: scales per row and per output channel go into the product, which torch offers with bf16 results only;
  other types are cast afterwards, far below FP8's own rounding.
- `tensorwise`: the product runs with scales of one and is scaled afterwards: one more pass over the result.
- `dequantise`: no FP8 product; the weight is widened and activations keep their 16 bits.

Rows are padded to a multiple of 16 only where the product refuses other counts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from trtkit.kernels.dispatch import has_fp8
from trtkit.kernels.matmul import fp8_linear_twin, quantise_rows_fp8

_MULTIPLE = 16
_PROBE_ROWS = 77
_PROBE_SIZE = 256
_PROBE_TOLERANCE = 0.02


def scaled_product(
    quantised: Tensor, scale_T1: Tensor, weight_OI: Tensor, scale_O: Tensor, way: str, padding: int
) -> Tensor:
    """`(quantised * scale_T1) @ (weight * scale_O).T` with both operands in FP8, bf16 [T, O]."""
    rows = quantised.shape[0]
    missing = -rows % padding
    if missing:
        quantised = F.pad(quantised.view(torch.uint8), (0, 0, 0, missing)).view(quantised.dtype)
        scale_T1 = F.pad(scale_T1, (0, 0, 0, missing), value=1.0)
    wide_scale = scale_O.float()
    if way == "rowwise":
        product = _multiply(quantised, weight_OI, scale_T1, wide_scale[None, :])
        return product[:rows]
    one = torch.ones((), dtype=torch.float32, device=quantised.device)
    product = _multiply(quantised, weight_OI, one, one)
    return (product[:rows].float() * (scale_T1[:rows] * wide_scale)).to(torch.bfloat16)


def fp8_way(device: torch.device, outputs: int = _PROBE_SIZE, inputs: int = _PROBE_SIZE) -> tuple[str, int]:
    """The way that works here for a weight of this shape, and what rows are padded to a multiple of.

    Runs small products the first time it meets a device, and waits for them: ask before capturing a CUDA graph.
    """
    if outputs % _MULTIPLE or inputs % _MULTIPLE:
        return "dequantise", 1
    return _probed(device)


@cache
def _probed(device: torch.device) -> tuple[str, int]:
    if device.type == "cuda" and not has_fp8(device):
        return "dequantise", 1
    for way in ("rowwise", "tensorwise"):
        for padding in (1, _MULTIPLE):
            if _works(device, way, padding):
                return way, padding
    return "dequantise", 1


def _works(device: torch.device, way: str, padding: int) -> bool:
    """Whether this way exists here and gives what the twin gives, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBE_ROWS, _PROBE_SIZE, generator=generator).to(torch.bfloat16).to(device)
    weight = torch.randn(_PROBE_SIZE, _PROBE_SIZE, generator=generator).to(torch.float8_e4m3fn).to(device)
    scale = torch.rand(_PROBE_SIZE, generator=generator).to(device) + 0.5
    try:
        found = scaled_product(*quantise_rows_fp8(x), weight, scale, way, padding).float()
    except (RuntimeError, ValueError, AttributeError, NotImplementedError):
        return False
    expected = fp8_linear_twin(x, weight, scale).float()
    return bool((found - expected).abs().max() <= _PROBE_TOLERANCE * expected.abs().max())


def _multiply(left: Tensor, weight_OI: Tensor, left_scale: Tensor, right_scale: Tensor) -> Tensor:
    product: Callable[..., Tensor] = torch._scaled_mm
    return product(
        left, weight_OI.T, scale_a=left_scale, scale_b=right_scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )
