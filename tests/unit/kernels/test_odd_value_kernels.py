"""Norms, rotation, sampling and ranking on widths and values that are awkward, in Triton's interpreter.

Answers come from float64, written out here. `test_kernel_interpreter.py` runs this file where triton came first.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("triton was imported without its interpreter before this file", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"

from support.interpreter import round_bfloat16_to_nearest
from support.paged_caches import FP8, NOWHERE, randn

from trtkit.kernels import triton_fused, triton_ranking, triton_sampling
from trtkit.kernels.ranking import keep_best_twin

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STEP = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def _round_as_gpus_do(monkeypatch):
    round_bfloat16_to_nearest(monkeypatch)


@pytest.mark.parametrize("width", [1, 7, 3584, 8191, 8193])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_any_width_and_size(width, dtype):
    """Rows of zeros, of numbers near the end of fp16's range, and of numbers near nothing."""
    residual = randn(4, width, dtype=dtype)
    residual[1], residual[2], residual[3] = 0, residual[2].sign() * 60_000, residual[3] * 1e-4
    weight = randn(1 + width, dtype=dtype, seed=2)[1:]
    wide = residual.double()
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-12) * weight.double()
    normed = triton_fused.add_rms_norm(None, residual, weight, 1e-12)
    torch.testing.assert_close(normed.double(), expected, rtol=2 * STEP[dtype], atol=1e-4)
    assert not normed[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gate_of_odd_width_saturates_on_both_sides(dtype):
    both = randn(3, 2 * 1025, dtype=dtype) * 30
    gate, up = both.double().chunk(2, dim=-1)
    with np.errstate(over="ignore"):
        found = triton_fused.silu_mul(both)
    expected = gate * torch.sigmoid(gate) * up
    torch.testing.assert_close(found.double(), expected, rtol=2 * STEP[dtype], atol=1e-5)


@pytest.mark.parametrize("dim", [2, 64, 80, 96, 112, 128, 256])
@pytest.mark.parametrize(("dtype", "stored"), [(torch.float32, FP8), (torch.bfloat16, torch.bfloat16)])
def test_rotation_at_the_end_of_a_long_context(dim, dtype, stored):
    """Positions up to 131,071; a table with nothing behind its live columns; one KV head of seven query heads."""
    positions = torch.tensor([131_071, 0, 99_999], dtype=torch.int32)
    angles = torch.arange(131_072)[:, None] * 500_000.0 ** (-torch.arange(dim // 2) / (dim // 2))
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    qkv = randn(3, 9, dim, dtype=dtype)
    cache = torch.zeros(4, 2, 1, 24, dim).to(stored)
    tables = torch.tensor([[2, 3, NOWHERE], [1, NOWHERE, NOWHERE], [NOWHERE] * 3], dtype=torch.int32)
    slots = torch.tensor([47, 23, -1], dtype=torch.int32)
    found = triton_fused.rope_write(qkv, positions, cos, sin, cache, tables, None, slots, num_heads=7)
    first, second = qkv[:, :8].double().chunk(2, dim=-1)
    turn, lift = (part[positions.long()].double()[:, None] for part in (cos, sin))
    expected = torch.cat((first * turn - second * lift, second * turn + first * lift), dim=-1)
    torch.testing.assert_close(found.double(), expected[:, :7], rtol=2 * STEP[dtype], atol=4 * STEP[dtype])
    coarse = 0.07 if stored is FP8 else 2 * STEP[dtype]
    for token, (block, slot) in enumerate([(3, 23), (1, 23)]):
        kept = cache.float()[block, :, 0, slot].double()
        torch.testing.assert_close(kept[0], expected[token, 7], rtol=coarse, atol=coarse)
        torch.testing.assert_close(kept[1], qkv[token, 8].double(), rtol=coarse, atol=coarse)
    assert cache.float().abs().amax(-1).count_nonzero() == 4


@pytest.mark.parametrize("vocab_size", [1, 2, 4095, 4097, 32_001, 151_936])
def test_the_largest_logit_is_found_in_any_vocabulary(vocab_size):
    logits = randn(3, vocab_size, dtype=torch.bfloat16)
    logits[0, vocab_size - 1] = 100
    logits[1] = 3.0
    right = [vocab_size - 1, 0, int(logits[2].float().argmax())]
    assert triton_sampling.greedy(logits).tolist() == right
    assert triton_sampling.greedy(logits.double()).tolist() == right


def drawn(logits, temperature, top_k, top_p, uniform):
    """One token by inverse transform, most likely first, lower id first among equals; plain Python in float64."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    order = order[: top_k or len(order)]
    mass = [math.exp((logits[token] - logits[order[0]]) / temperature) for token in order]
    whole, reached = sum(mass), 0.0
    if top_p < 1:
        kept = 0
        while reached < top_p * whole:
            reached += mass[kept]
            kept += 1
        order, mass = order[: max(kept, 1)], mass[: max(kept, 1)]
    target, below = uniform * sum(mass), 0.0
    for token, weight in zip(order, mass, strict=True):
        below += weight
        if below > target:
            return token
    return order[-1]


@pytest.mark.parametrize("temperature", [1e-45, 1e-6, 0.6, 1e6, 1e39])
def test_any_temperature_draws_what_float64_draws(temperature):
    """Logits that differ clearly, so that sums in float32 cannot fall on another side; some are minus infinity."""
    logits = torch.randperm(50, generator=torch.Generator().manual_seed(3)).float() / 4
    logits[7] = logits[30] = -math.inf
    how = [
        (0, 1.0, 0.0),
        (0, 1.0, 0.999),
        (1, 1.0, 0.5),
        (50, 1.0, 0.77),
        (0, 1e-9, 0.9),
        (0, 0.8, 0.311),
        (20, 0.5, 0.6),
    ]
    top_k, top_p, uniform = (torch.tensor(column, dtype=torch.float64) for column in zip(*how, strict=True))
    with np.errstate(over="ignore"):
        found = triton_sampling.sample_rows(
            logits.repeat(len(how), 1), torch.full_like(uniform, temperature), top_k.int(), top_p, uniform
        )
    assert found.tolist() == [drawn(logits.tolist(), temperature, *one) for one in how]


@pytest.mark.parametrize("scores", ["equal", "nan", "drawn"])
@pytest.mark.parametrize(
    "budget",
    [
        {"tokens": 1, "sinks": 0, "recent": 0}, {"tokens": 77, "sinks": 4, "recent": 8},
        {"tokens": 76, "sinks": 30, "recent": 46}, {"tokens": 40, "sinks": 0, "recent": 40},
        {"tokens": 20, "sinks": 15, "recent": 30}, {"tokens": 0, "sinks": 0, "recent": 0},
    ],
)  # fmt: skip
@pytest.mark.parametrize("chunk", [None, 32])
def test_ranking_of_rows_without_an_order(scores, budget, chunk, monkeypatch):
    """All slots stay, only protected ones stay, more are protected than stay, and none stays."""
    if chunk:
        monkeypatch.setattr(triton_ranking, "_IN_REGISTERS", 32)
        monkeypatch.setattr(triton_ranking, "_CHUNK", 32)
    values = {"equal": 0.5, "nan": math.nan, "infinite": math.inf}
    rows = torch.full((2, 77), values[scores]) if scores in values else randn(2, 77)
    positions = torch.stack([torch.randperm(90, generator=torch.Generator().manual_seed(row))[:77] for row in range(2)])
    found = triton_ranking.keep_best(rows, positions, 90, **budget)
    assert torch.equal(found, keep_best_twin(rows, positions, 90, **budget))
