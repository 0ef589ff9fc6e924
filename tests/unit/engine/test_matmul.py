"""The product through oneDNN, and the way back when it is missing or wrong."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from trtkit.engine import matmul
from trtkit.engine.matmul import linear, onednn_works


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


@pytest.mark.parametrize("fault", ["missing", "wrong"])
def test_a_missing_or_wrong_operator_is_not_used(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def operator(x: torch.Tensor, weight: torch.Tensor, *rest: object) -> torch.Tensor:
        if fault == "missing":
            raise AttributeError("no such operator")
        return torch.zeros(x.shape[0], weight.shape[0])

    ops = SimpleNamespace(mkldnn=SimpleNamespace(_linear_pointwise=operator))
    monkeypatch.setattr(matmul.torch, "ops", ops)
    x, weight = torch.ones(2, 4), torch.ones(3, 4)
    assert not onednn_works()
    assert linear(x, weight).tolist() == [[4.0] * 3] * 2
