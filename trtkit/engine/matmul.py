"""`x @ weight.T + bias`, by the quicker of torch's two CPU libraries.

In float32 torch multiplies through MKL, which on CPUs of other makers is about half as fast as oneDNN (AMD EPYC, one
thread, 4096 x 768: 3.1 ms against 1.6 ms for 32 rows). oneDNN's product is reached through an operator that torch
does not document, so it is probed once, and everything falls back to `F.linear`.

Given a plain matrix, oneDNN brings it into its own blocked order again in every call, which at few rows is a third of
the time. `pack` does that once, at load (same CPU, two threads, 4096 x 768: 8 rows 635 us plain, 379 us packed; 2048
rows 40.8 ms and 39.5 ms).
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

_PACKED_FOR_ROWS = 32  # oneDNN picks one order for a single row and another, good for all counts, from a few rows up


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """[T, in] -> [T, out]; `weight_OI` is plain or from `pack`."""
    if x_TI.dtype is torch.float32 and x_TI.device.type == "cpu" and onednn_works():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, weight_OI, bias_O, "none", [], "")
        return product
    return F.linear(x_TI, weight_OI, bias_O)


def pack(weight_OI: Tensor) -> Tensor:
    """`weight_OI` in the order that `linear` reads fastest; itself where there is none. Only `linear` takes it."""
    if weight_OI.dtype is torch.float32 and weight_OI.device.type == "cpu" and onednn_works():
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI, _PACKED_FOR_ROWS)
        return packed
    return weight_OI


def plain(weight_OI: Tensor) -> Tensor:
    """A matrix from `pack` as an ordinary tensor again; an ordinary one as it is."""
    return weight_OI.to_dense() if weight_OI.is_mkldnn else weight_OI


@cache
def onednn_works() -> bool:
    """Whether the operators exist here and agree with `F.linear` in float32 on a small example."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 64, generator=generator), torch.randn(32, 64, generator=generator)
    bias = torch.randn(32, generator=generator)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
        products = [torch.ops.mkldnn._linear_pointwise(x, w, bias, "none", [], "") for w in (weight, packed)]
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    expected = F.linear(x, weight, bias)
    return all(torch.allclose(product, expected, rtol=1e-5, atol=1e-5) for product in products)
