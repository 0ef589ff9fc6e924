"""Matrix products against float64: the twins here, the Triton kernels in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from trtkit.kernels import matmul

EPS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def random_problem(tokens, outputs, inputs, weight_type, dtype, *, bias=False, seed=0):
    """Activations, a weight, its scales (None without quantisation) and a bias; the float64 product beside them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=generator).to(dtype)
    scale = None
    if weight_type is torch.int8:
        weight = torch.randint(-128, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
        scale = torch.rand(outputs, generator=generator) / 127 + 1e-3
    elif weight_type is torch.float8_e4m3fn:
        weight = (torch.randn(outputs, inputs, generator=generator) * 100).clamp(-448, 448).to(weight_type)
        scale = torch.rand(outputs, generator=generator) / 400 + 1e-4
    else:
        weight = torch.randn(outputs, inputs, generator=generator).to(weight_type)
    addend = torch.randn(outputs, generator=generator).to(dtype) if bias else None
    expected = x.double() @ weight.double().T
    if scale is not None:
        expected = expected * scale.double()
    if addend is not None:
        expected = expected + addend.double()
    return x, weight, scale, addend, expected


def assert_close(found, expected, dtype):
    """Within the type's rounding of the size that the row's values have."""
    size = expected.abs().amax()
    assert (found.double() - expected).abs().max() <= EPS[dtype] * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight_type", [torch.int8, torch.float8_e4m3fn, None])
def test_twin_equals_the_float64_product(dtype, weight_type):
    x, weight, scale, bias, expected = random_problem(5, 48, 64, weight_type or dtype, dtype, bias=True)
    assert_close(matmul.linear(x, weight, scale, bias), expected, dtype)


def test_twin_in_tiles_of_channels_is_the_same(monkeypatch):
    x, weight, scale, bias, _ = random_problem(3, 50, 64, torch.int8, torch.float32, bias=True)
    whole = matmul.linear(x, weight, scale, bias)
    monkeypatch.setattr(matmul, "_TWIN_ELEMENTS", 7 * 64)
    torch.testing.assert_close(matmul.linear(x, weight, scale, bias), whole, rtol=1e-6, atol=1e-6)


def test_out_is_written_and_returned():
    x, weight, scale, _, expected = random_problem(3, 32, 64, torch.int8, torch.float16)
    out = torch.full((3, 32), torch.nan, dtype=torch.float16)
    assert matmul.linear(x, weight, scale, out=out) is out
    assert_close(out, expected, torch.float16)


def test_rows_brought_to_fp8_come_back_within_its_rounding():
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1.0], [1e-3], [1e4], [0.0]])
    quantised, scale = matmul.quantise_rows_fp8(x)
    assert quantised.dtype is torch.float8_e4m3fn
    assert scale.shape == (4, 1)
    back = quantised.float() * scale
    assert ((back - x).abs() <= x.abs() / 16 + scale * 2**-9).all()
    assert scale[3] == 1
    torch.testing.assert_close(quantised.float().abs().amax(1)[:3], torch.full((3,), 448.0))


def test_fp8_keeps_sixteen_bit_activations_for_few_tokens():
    x, weight, scale, _, expected = random_problem(64, 32, 64, torch.float8_e4m3fn, torch.float32)
    assert_close(matmul.fp8_linear(x, weight, scale), expected, torch.float32)


def test_fp8_rounds_both_operands_for_many_tokens():
    x, weight, scale, bias, expected = random_problem(65, 32, 64, torch.float8_e4m3fn, torch.float32, bias=True)
    found = matmul.fp8_linear(x, weight, scale, bias)
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert 1e-4 < error < 0.05
