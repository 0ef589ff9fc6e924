"""Norm and activation that write FP8 rows: bit for bit what the two steps give that they stand for.

Triton's interpreter is chosen when triton is imported, so kernels run here only where nobody imported it before;
`test_kernel_interpreter.py` runs this file in a fresh process.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import numpy as np
import pytest
import torch

from trtkit.kernels import fused, matmul

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("triton was imported without its interpreter before this file", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"

from support.interpreter import round_bfloat16_to_nearest

from trtkit.kernels import triton_fused, triton_fused_fp8, triton_quantise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPSILON = 1e-5


@pytest.fixture(autouse=True)
def _round_as_gpus_do(monkeypatch):
    round_bfloat16_to_nearest(monkeypatch)


def randn(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_same(found, expected):
    """Every bit; of a NaN only that it is one."""
    for ours, right in zip(found, expected, strict=True):
        assert (ours.dtype, ours.shape) == (right.dtype, right.shape)
        torch.testing.assert_close(ours.float(), right.float(), rtol=0, atol=0, equal_nan=True)


def special_rows(x):
    """The second row of `x` is zeros, its third has a NaN."""
    x[1] = 0
    x[2, x.shape[1] // 3] = torch.nan
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 40, 333])
def test_public_functions_off_the_gpu_are_the_twins_of_both_steps(dtype, width):
    delta, ours = (special_rows(randn(4, width, dtype=dtype, seed=seed)) for seed in (1, 2))
    weight, theirs = randn(width, dtype=dtype, seed=3), ours.clone()
    found = fused.add_rms_norm_fp8(delta, ours, weight, EPSILON)
    assert_same(found, matmul.quantise_rows_twin(fused.add_rms_norm(delta, theirs, weight, EPSILON)))
    assert_same([ours], [theirs])
    both = special_rows(randn(4, 2 * width, dtype=dtype))
    assert_same(fused.silu_mul_fp8(both), matmul.quantise_rows_twin(fused.silu_mul(both)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 40, 333, 8192 - 24])
@pytest.mark.parametrize("has_delta", [True, False])
def test_norm_kernel_equals_norm_and_then_quantising(dtype, width, has_delta):
    ours = special_rows(randn(4, width, dtype=dtype))
    delta = special_rows(randn(4, width, dtype=dtype, seed=1)) if has_delta else None
    weight, theirs = randn(width, dtype=dtype, seed=2), ours.clone()
    found = triton_fused_fp8.add_rms_norm_fp8(delta, ours, weight, EPSILON)
    assert_same(found, matmul.quantise_rows_twin(triton_fused.add_rms_norm(delta, theirs, weight, EPSILON)))
    assert_same([ours], [theirs])
    assert found[1][1] == 1
    assert bool(found[0][2].float().isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 24, 333, 2 * 4096 + 40])
def test_activation_kernel_equals_activation_and_then_quantising(dtype, width):
    both = special_rows(randn(4, 2 * width, dtype=dtype, scale=4))
    found = triton_fused_fp8.silu_mul_fp8(both)
    assert_same(found, matmul.quantise_rows_twin(triton_fused.silu_mul(both)))
    assert found[1][1] == 1
    assert int(found[0][2].float().isnan().sum()) == 1


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_rows_follow_the_twins_whatever_their_size(scale):
    """Against the twins of torch, whose roots and exponentials may differ in their last bit before FP8 rounds."""
    residual, weight = randn(4, 500, dtype=torch.bfloat16, scale=scale), randn(500, dtype=torch.bfloat16, seed=1)
    gate_up = residual.clone()
    with np.errstate(over="ignore"):  # exp overflows to infinity, as on a GPU; NumPy would warn
        activated = triton_fused_fp8.silu_mul_fp8(gate_up)
    pairs = [
        (
            triton_fused_fp8.add_rms_norm_fp8(None, residual, weight, EPSILON),
            fused.rms_norm_twin(residual, weight, EPSILON),
        ),
        (activated, fused.silu_mul(gate_up)),
    ]
    for (rows, scales), plain in pairs:
        expected, right = matmul.quantise_rows_twin(plain)
        torch.testing.assert_close(scales, right, rtol=1 / 128, atol=0)
        assert (rows.float() == expected.float()).float().mean() > 0.95
        torch.testing.assert_close(rows.float() * scales, plain.float(), rtol=1 / 12, atol=float(right.max()) / 100)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_with_a_nan_keeps_it_when_quantised_alone(dtype):
    x = special_rows(randn(4, 96, dtype=dtype, scale=3))
    assert_same(triton_quantise.quantise_rows_fp8(x), matmul.quantise_rows_twin(x))


def test_infinities_are_quantised_as_by_the_twin():
    x = randn(2, 96)
    x[0, 7] = torch.inf
    with np.errstate(invalid="ignore"):
        found = triton_quantise.quantise_rows_fp8(x)
    assert_same(found, matmul.quantise_rows_twin(x))


def test_strided_inputs_are_read_as_they_are():
    turned, weight = randn(40, 3).T, randn(40, seed=1)
    ours = randn(3, 64, seed=2)[:, :40]
    theirs = ours.clone()
    found = triton_fused_fp8.add_rms_norm_fp8(turned, ours, weight, EPSILON)
    assert_same(found, matmul.quantise_rows_twin(triton_fused.add_rms_norm(turned, theirs, weight, EPSILON)))
    assert_same(
        triton_fused_fp8.silu_mul_fp8(turned), matmul.quantise_rows_twin(triton_fused.silu_mul(turned.contiguous()))
    )
    with pytest.raises(ValueError, match="contiguous"):
        fused.add_rms_norm_fp8(None, turned, weight, EPSILON)


def test_nothing_to_do_is_fine():
    none = torch.empty(0, 16)
    assert [part.shape for part in triton_fused_fp8.add_rms_norm_fp8(None, none, torch.ones(16), EPSILON)] == [
        (0, 16),
        (0, 1),
    ]
    assert [part.shape for part in triton_fused_fp8.silu_mul_fp8(none)] == [(0, 8), (0, 1)]


@pytest.mark.parametrize("reason", ["too wide", "switched off", "no FP8 in hardware"])
def test_where_one_kernel_cannot_two_do_the_same(monkeypatch, reason):
    """On a GPU, that is; here it is only said to be one."""
    monkeypatch.setattr(fused, "use_triton", lambda _, family: family != fused.FP8_ROWS or reason != "switched off")
    monkeypatch.setattr(fused, "has_fp8", lambda _: reason != "no FP8 in hardware")
    if reason == "too wide":
        monkeypatch.setattr(triton_fused_fp8, "MAX_NORM_WIDTH", 39)
        monkeypatch.setattr(triton_fused_fp8, "MAX_SILU_BYTES", 79)
    for name in ("_add_rms_norm_fp8", "_silu_mul_fp8"):
        monkeypatch.setattr(triton_fused_fp8, name, None)
    ours, weight = randn(3, 40, dtype=torch.bfloat16), randn(40, dtype=torch.bfloat16, seed=1)
    theirs = ours.clone()
    found = fused.add_rms_norm_fp8(ours.clone(), ours, weight, EPSILON)
    assert_same(found, matmul.quantise_rows_twin(triton_fused.add_rms_norm(theirs.clone(), theirs, weight, EPSILON)))
    both = randn(3, 80, dtype=torch.bfloat16)
    assert_same(fused.silu_mul_fp8(both), matmul.quantise_rows_twin(triton_fused.silu_mul(both)))
