"""Matrix products against float64: the twins here, the Triton kernels in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
import torch
from support.grouped_weights import grouped_problem

from trtkit.kernels import matmul, matmul_tiles, scaled_mm

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("triton was imported without its interpreter before this file", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"

from trtkit.kernels import matmul_configs, triton_matmul, triton_quantise

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "zeros"), [(4, False), (4, True), (8, False)])
def test_twin_of_grouped_scales_equals_the_float64_product(monkeypatch, dtype, bits, zeros):
    x, weight, scale, zero, bias, expected = grouped_problem(5, 48, 192, 64, bits, dtype, zeros=zeros, bias=True)
    monkeypatch.setattr(matmul, "_TWIN_ELEMENTS", 7 * 192)
    assert_close(matmul.linear(x, weight, scale, bias, zero=zero), expected, dtype)


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


@pytest.mark.parametrize("tokens", [1, 9, 33, 130])
@pytest.mark.parametrize("weight_type", [torch.int8, torch.float8_e4m3fn, None])
def test_kernel_equals_the_float64_product(weight_type, tokens):
    dtype = torch.float16
    x, weight, scale, bias, expected = random_problem(tokens, 40, 96, weight_type or dtype, dtype, bias=tokens == 9)
    out = torch.full((tokens, 40), torch.nan, dtype=dtype)
    triton_matmul.fused_linear(x, weight, scale, bias, out)
    assert_close(out, expected, dtype)


@pytest.mark.parametrize("tokens", [5, 70])
def test_kernel_with_the_weight_on_the_left_equals_the_float64_product(tokens):
    x, weight, scale, bias, expected = random_problem(tokens, 72, 1000, torch.int8, torch.float16, bias=True)
    tile = matmul_tiles.Tile(outputs=16, inputs=32, stages=1, warps=4, left=True)
    out = torch.full((tokens, 72), torch.nan, dtype=torch.float16)
    triton_matmul.fused_linear(x, weight, scale, bias, out, tile=tile)
    assert_close(out, expected, torch.float16)


def test_kernel_in_bf16_with_strided_rows_equals_the_float64_product():
    x, weight, scale, _, expected = random_problem(6, 33, 70, torch.int8, torch.bfloat16)
    wide_x, wide_out = torch.randn(6, 90).bfloat16(), torch.zeros(6, 50, dtype=torch.bfloat16)
    wide_x[:, :70] = x
    triton_matmul.fused_linear(wide_x[:, :70], weight, scale, None, wide_out[:, :33])
    assert_close(wide_out[:, :33], expected, torch.bfloat16)
    assert not wide_out[:, 33:].any()


def test_pieces_of_a_long_sum_are_added_by_the_last_program_and_the_counters_are_left_at_zero():
    x, weight, scale, _, expected = random_problem(3, 64, 1000, torch.int8, torch.float16)
    assert matmul_tiles.num_pieces(matmul_configs.INTERPRETED_TILE, 16, 2, 1000, 1, 132) > 2
    out = torch.empty(3, 64, dtype=torch.float16)
    for _ in range(2):
        triton_matmul.fused_linear(x, weight, scale, None, out)
        assert_close(out, expected, torch.float16)
    assert not triton_matmul.counters_of(x.device).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_byte_of_both_eight_bit_types_widens_exactly(dtype):
    """A row of the unit matrix reads one weight: all 256 values of a byte come out as they are."""
    unit = torch.eye(16, dtype=dtype)
    codes = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    ones = torch.ones(16, dtype=dtype)
    for weight in (codes.view(torch.int8), codes.masked_fill(codes % 128 == 127, 0).view(torch.float8_e4m3fn)):
        out = torch.empty(16, 16, dtype=dtype)
        triton_matmul.fused_linear(unit, weight, ones, None, out)
        torch.testing.assert_close(out.T.float(), weight.float(), rtol=0, atol=0)


def test_weights_widened_outside_the_product_give_the_same(monkeypatch):
    x, weight, scale, bias, expected = random_problem(600, 24, 48, torch.int8, torch.float16, bias=True)
    monkeypatch.setattr(matmul_tiles, "WORKSPACE_BYTES", 48 * 2 * 7)
    assert_close(triton_matmul.linear(x, weight, scale, bias), expected, torch.float16)


def test_fp32_activations_and_no_tokens_at_all_are_served():
    x, weight, scale, _, expected = random_problem(4, 24, 48, torch.int8, torch.float32)
    assert_close(triton_matmul.linear(x, weight, scale, None), expected, torch.float32)
    assert triton_matmul.linear(x[:0].half(), weight, scale, None).shape == (0, 24)


@pytest.mark.parametrize("inputs", [96, 8192 + 48])
def test_rows_quantised_by_the_kernel_equal_the_twin(inputs):
    x = torch.randn(4, inputs, generator=torch.Generator().manual_seed(2)) * torch.tensor([[1.0], [1e-3], [1e4], [0.0]])
    quantised, scale = triton_quantise.quantise_rows_fp8(x.bfloat16())
    expected, expected_scale = matmul.quantise_rows_twin(x.bfloat16())
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    assert (quantised.float() == expected.float()).float().mean() > 0.999


def test_fp8_product_equals_the_twin_and_falls_back_to_widening_the_weight(monkeypatch):
    x, weight, scale, bias, exact = random_problem(70, 32, 64, torch.float8_e4m3fn, torch.bfloat16, bias=True)
    expected = matmul.fp8_linear_twin(x, weight, scale, bias).float()
    monkeypatch.setattr(triton_matmul, "fp8_way", lambda *_: ("rowwise", 1))
    out = torch.empty(70, 32, dtype=torch.bfloat16)
    assert triton_matmul.fp8_linear(x, weight, scale, bias, out=out) is out
    assert (out.float() - expected).abs().max() <= 0.02 * expected.abs().max()
    monkeypatch.setattr(triton_matmul, "fp8_way", lambda *_: ("dequantise", 1))
    assert_close(triton_matmul.fp8_linear(x, weight, scale, bias), exact, torch.bfloat16)


def test_activations_that_are_fp8_already_give_the_same_product(monkeypatch):
    x, weight, scale, bias, exact = random_problem(70, 32, 64, torch.float8_e4m3fn, torch.bfloat16, bias=True)
    rows = matmul.quantise_rows_fp8(x)
    twins = matmul.fp8_product(*rows, weight, scale, bias, torch.bfloat16)
    assert torch.equal(twins, matmul.fp8_linear(x, weight, scale, bias))
    monkeypatch.setattr(triton_matmul, "fp8_way", lambda *_: ("rowwise", 1))
    found = triton_matmul.fp8_product(*rows, weight, scale, bias, torch.bfloat16)
    assert torch.equal(found, triton_matmul.fp8_linear(x, weight, scale, bias))
    monkeypatch.setattr(triton_matmul, "fp8_way", lambda *_: ("dequantise", 1))
    out = torch.empty(70, 32, dtype=torch.bfloat16)
    assert triton_matmul.fp8_product(*rows, weight, scale, bias, torch.bfloat16, out=out) is out
    assert (out.double() - exact).abs().max() <= 0.05 * exact.abs().max()


def test_activations_are_made_fp8_only_where_the_product_would(monkeypatch):
    weight = torch.empty(32, 64, dtype=torch.float8_e4m3fn)
    assert matmul.multiplies_fp8(65, weight)
    assert not matmul.multiplies_fp8(64, weight)
    assert not matmul.multiplies_fp8(65, torch.empty(32, 64, dtype=torch.int8))
    monkeypatch.setattr(matmul, "use_triton", lambda *_: True)
    for way, wanted in (("rowwise", True), ("tensorwise", True), ("dequantise", False)):
        monkeypatch.setattr(scaled_mm, "fp8_way", lambda *_, way=way: (way, 1))
        assert matmul.multiplies_fp8(65, weight) is wanted


@pytest.mark.parametrize("quicker", ["fused_linear", "_widened"])
def test_the_quicker_way_is_measured_once_for_a_shape(monkeypatch, quicker):
    """Tensors that say they are on CUDA; what is timed and taken is only counted."""
    calls = []
    for name in ("fused_linear", "_widened"):
        monkeypatch.setattr(triton_matmul, name, lambda *_, name=name: calls.append(name))

    def median_ms(call):
        call()
        return 1.0 if calls[-1] == quicker else 2.0

    class OnCuda:
        def __init__(self, *shape):
            self.shape, self.dtype, self.device = shape, torch.float16, torch.device("cuda", 0)

        def dim(self):
            return len(self.shape)

    monkeypatch.setattr(triton_matmul, "median_ms", median_ms)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    triton_matmul._quicker.cache_clear()
    weight, scale = OnCuda(8, 8), OnCuda(8)
    for tokens in (200, 256, 130):
        triton_matmul.linear(OnCuda(tokens, 8), weight, scale, None, out=OnCuda(tokens, 8))
    assert calls == ["fused_linear", "_widened", quicker, quicker, quicker]
    calls.clear()
    triton_matmul.linear(OnCuda(64, 8), weight, scale, None, out=OnCuda(64, 8))
    triton_matmul.linear(OnCuda(65, 8), weight, None, None, out=OnCuda(65, 8))
    assert calls == ["fused_linear", "_widened"], "8 bits for few and 16 bits for many need no clock"
    calls.clear()
    for tokens in (1, 1):
        triton_matmul.linear(OnCuda(tokens, 8), weight, None, None, out=OnCuda(tokens, 8))
    assert calls == ["fused_linear", "_widened", quicker, quicker]
    calls.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for tokens in (300, 513, 1025):
        triton_matmul.linear(OnCuda(tokens, 8), weight, scale, None, out=OnCuda(tokens, 8))
    assert calls == ["fused_linear", "_widened", "_widened"]
    triton_matmul._quicker.cache_clear()
