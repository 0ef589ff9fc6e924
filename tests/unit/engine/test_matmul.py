"""The product through oneDNN, and the way back when it is missing or wrong."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from trtkit.engine import matmul
from trtkit.engine.matmul import linear, onednn_works, pack, plain


@pytest.fixture(autouse=True)
def _probe_again() -> Iterator[None]:
    onednn_works.cache_clear()
    yield
    onednn_works.cache_clear()


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_equals_the_product_in_double_precision(rows: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, 64, generator=generator), torch.randn(80, 64, generator=generator)
    bias = torch.randn(80, generator=generator) if with_bias else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert torch.allclose(linear(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(linear(x, pack(weight), bias).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(80, 64), (3, 5)])
def test_a_packed_matrix_takes_the_same_bytes_and_comes_back_exactly(shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    packed = pack(weight)
    assert packed.is_mkldnn == onednn_works()
    assert packed.numel() * packed.element_size() == weight.numel() * weight.element_size()
    assert torch.equal(plain(packed), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8])
def test_other_types_are_not_packed(dtype: torch.dtype) -> None:
    weight = torch.ones(32, 64).to(dtype)
    assert pack(weight) is weight
    assert plain(weight) is weight


@pytest.mark.parametrize("fault", ["missing", "wrong", "no packing", "wrong packing"])
def test_a_missing_or_wrong_operator_is_not_used(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def reorder(weight: torch.Tensor, rows: int) -> torch.Tensor:
        if fault == "no packing":
            raise AttributeError("no such operator")
        return weight + 1 if fault == "wrong packing" else weight

    def operator(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *rest: object) -> torch.Tensor:
        if fault == "missing":
            raise AttributeError("no such operator")
        return torch.zeros(x.shape[0], weight.shape[0]) if fault == "wrong" else F.linear(x, weight, bias)

    ops = SimpleNamespace(mkldnn=SimpleNamespace(_linear_pointwise=operator, _reorder_linear_weight=reorder))
    monkeypatch.setattr(matmul.torch, "ops", ops)
    x, weight = torch.ones(2, 4), torch.ones(3, 4)
    assert not onednn_works()
    assert pack(weight) is weight
    assert linear(x, weight).tolist() == [[4.0] * 3] * 2
