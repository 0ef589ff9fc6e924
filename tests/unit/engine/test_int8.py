"""INT8 weight-only products against the dequantised matrix."""

from __future__ import annotations

import pytest
import torch

from trtkit.engine import int8
from trtkit.engine.int8 import fused_int8_works, int8_linear, tiled_int8_linear


def _case(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 64, generator=generator).to(dtype)
    weight = torch.randint(-127, 128, (80, 64), dtype=torch.int8, generator=generator)
    scale = (torch.rand(80, generator=generator) / 127).to(dtype)
    return x, weight, scale


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_equals_that_of_the_dequantised_matrix(rows: int, dtype: torch.dtype) -> None:
    x, weight, scale = _case(rows, dtype)
    expected = x.double() @ (weight.double() * scale.double()[:, None]).T
    tolerance = 1e-5 if dtype is torch.float32 else 0.03
    assert torch.allclose(int8_linear(x, weight, scale).double(), expected, rtol=tolerance, atol=tolerance)


def test_tiles_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, scale = _case(3, torch.float32)
    whole = tiled_int8_linear(x, weight, scale)
    monkeypatch.setattr(int8, "_TILE_ELEMENTS", 64 * 7)
    assert torch.allclose(tiled_int8_linear(x, weight, scale), whole, rtol=1e-6, atol=1e-6)


def test_the_fused_kernel_is_used_only_where_it_was_probed_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch.zeros(x.shape[0], weight.shape[0], dtype=x.dtype)

    x, weight, scale = _case(2, torch.bfloat16)
    expected = tiled_int8_linear(x, weight, scale)
    monkeypatch.setattr(torch, "_weight_int8pack_mm", wrong, raising=False)
    fused_int8_works.cache_clear()
    try:
        assert not fused_int8_works("cpu", torch.bfloat16)
        assert torch.equal(int8_linear(x, weight, scale), expected)
    finally:
        fused_int8_works.cache_clear()


def test_a_missing_fused_kernel_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_weight_int8pack_mm", raising=False)
    fused_int8_works.cache_clear()
    try:
        x, weight, scale = _case(2, torch.bfloat16)
        assert torch.equal(int8_linear(x, weight, scale), tiled_int8_linear(x, weight, scale))
    finally:
        fused_int8_works.cache_clear()
