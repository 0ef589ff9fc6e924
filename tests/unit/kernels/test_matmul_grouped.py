"""Products of weights with a scale for each group of inputs against float64, the kernels in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
import torch
from support.grouped_weights import grouped_problem

from trtkit.kernels import matmul

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("triton was imported without its interpreter before this file", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"


EPS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def kernels_instead_of_twins(monkeypatch):
    monkeypatch.setattr(matmul, "use_triton", lambda *_: True)


def assert_close(found, expected, dtype):
    assert not found.isnan().any()
    assert (found.double() - expected).abs().max() <= EPS[dtype] * expected.abs().max()


@pytest.mark.parametrize("tokens", [1, 3, 17, 64, 65, 130])
@pytest.mark.parametrize(("bits", "zeros"), [(4, False), (4, True), (8, False)])
def test_any_number_of_tokens_gives_the_float64_product(tokens, bits, zeros):
    dtype = torch.float16
    x, weight, scale, zero, bias, expected = grouped_problem(tokens, 40, 256, 128, bits, dtype, zeros=zeros, bias=True)
    assert_close(matmul.linear(x, weight, scale, bias, zero=zero), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("group", "groups"), [(32, 2), (32, 3), (64, 3), (64, 2), (128, 3), (128, 5), (256, 3), (96, 2)]
)
@pytest.mark.parametrize(("bits", "zeros"), [(4, False), (4, True), (8, False)])
def test_any_group_in_any_number_gives_the_float64_product(dtype, group, groups, bits, zeros):
    x, weight, scale, zero, _, expected = grouped_problem(3, 33, group * groups, group, bits, dtype, zeros=zeros)
    assert_close(matmul.linear(x, weight, scale, zero=zero), expected, dtype)
