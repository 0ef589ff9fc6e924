from __future__ import annotations

import pytest
import torch

from trtkit.kernels import matmul, scaled_mm

CPU = torch.device("cpu")


def emulated(refuse):
    """A stand-in for `torch._scaled_mm` that refuses what `refuse(left, left_scale)` says."""

    def multiply(left, right, *, scale_a, scale_b, out_dtype, use_fast_accum):
        assert use_fast_accum
        if refuse(left, scale_a):
            raise RuntimeError("not for this GPU")
        return ((left.float() * scale_a) @ (right.float() * scale_b)).to(out_dtype)

    return multiply


@pytest.fixture(autouse=True)
def forget_what_was_probed():
    scaled_mm._probed.cache_clear()
    yield
    scaled_mm._probed.cache_clear()


@pytest.mark.parametrize(
    ("refuse", "way"),
    [
        (lambda *_: False, ("rowwise", 1)),
        (lambda left, _: left.shape[0] % 16, ("rowwise", 16)),
        (lambda _, scale: scale.numel() > 1, ("tensorwise", 1)),
        (lambda left, scale: scale.numel() > 1 or left.shape[0] % 16, ("tensorwise", 16)),
        (lambda *_: True, ("dequantise", 1)),
    ],
)
def test_the_first_way_that_works_is_taken_and_gives_the_twins_product(monkeypatch, refuse, way):
    monkeypatch.setattr(torch, "_scaled_mm", emulated(refuse))
    assert scaled_mm.fp8_way(CPU) == way
    if way[0] == "dequantise":
        return
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(70, 64, generator=generator).bfloat16()
    weight = torch.randn(48, 64, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(48, generator=generator).bfloat16() + 0.5
    found = scaled_mm.scaled_product(*matmul.quantise_rows_fp8(x), weight, scale, *way)
    expected = matmul.fp8_linear_twin(x, weight, scale)
    assert found.shape == (70, 48)
    assert (found.float() - expected.float()).abs().max() <= 0.01 * expected.float().abs().max()


def test_a_product_that_runs_and_is_wrong_is_not_taken(monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", lambda left, right, **_: torch.ones(left.shape[0], right.shape[1]))
    assert scaled_mm.fp8_way(CPU) == ("dequantise", 1)


def test_channels_that_are_not_a_multiple_of_sixteen_are_dequantised(monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", emulated(lambda *_: False))
    assert scaled_mm.fp8_way(CPU, 40, 64) == ("dequantise", 1)
    assert scaled_mm.fp8_way(CPU, 48, 24) == ("dequantise", 1)
