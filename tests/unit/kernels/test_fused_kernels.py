"""Fused kernels: the twins bit for bit like the embedded engine's own arithmetic, the Triton kernels like the twins.

Triton's interpreter is chosen when triton is imported, so kernels run here only where nobody imported it before;
`test_kernel_interpreter_fused.py` runs this file in a fresh process.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trtkit.engine import llama
from trtkit.engine.rope import RopeTable, rotate_
from trtkit.kernels import fused
from trtkit.spec.model import RopeSpec

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("triton was imported without its interpreter before this file", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"

from support.interpreter import round_bfloat16_to_nearest

from trtkit.kernels import triton_fused

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPSILON = 1e-5


@pytest.fixture(autouse=True)
def _round_as_gpus_do(monkeypatch):
    round_bfloat16_to_nearest(monkeypatch)


def randn(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def assert_same_to_rounding(actual, expected):
    """Equal up to a last bit before and after a product: sums and exponentials are not rounded alike everywhere."""
    assert actual.dtype is expected.dtype
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 1 / 128, torch.float16: 1 / 512}[expected.dtype]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_adds_and_rounds_as_the_engine_does(dtype):
    delta, residual, weight = randn(3, 40, dtype=dtype), randn(3, 40, dtype=dtype, seed=1), randn(40, dtype=dtype)
    expected_residual = residual + delta
    expected = llama.rms_norm(expected_residual, weight, EPSILON)
    normed = fused.add_rms_norm(delta, residual, weight, EPSILON)
    assert torch.equal(residual, expected_residual)
    assert torch.equal(normed, expected)
    assert torch.equal(fused.add_rms_norm(None, residual, weight, EPSILON, out=delta), expected)
    assert torch.equal(delta, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (3, 40), (2, 96), (2, 8192 + 24)])
@pytest.mark.parametrize("has_delta", [True, False])
def test_norm_kernel_follows_its_twin(dtype, shape, has_delta):
    tokens, width = shape
    delta = randn(tokens, width, dtype=dtype, seed=1) if has_delta else None
    weight = randn(width, dtype=dtype, seed=2)
    ours, twins = randn(tokens, width, dtype=dtype), randn(tokens, width, dtype=dtype)
    normed = triton_fused.add_rms_norm(delta, ours, weight, EPSILON)
    assert_same_to_rounding(normed, fused.add_rms_norm(delta, twins, weight, EPSILON))
    assert torch.equal(ours, twins)


def test_norm_kernel_takes_rows_of_wider_tensors_and_writes_over_its_input():
    wide, residual = randn(4, 64), randn(4, 48, seed=1)[:, :32]
    delta, weight = wide[:, 32:], randn(32, seed=2)
    expected = fused.rms_norm_twin(residual + delta, weight, EPSILON)
    untouched = wide[:, :32].clone()
    assert triton_fused.add_rms_norm(delta, residual, weight, EPSILON, out=delta) is delta
    assert_same_to_rounding(delta, expected)
    assert torch.equal(wide[:, :32], untouched)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_rounds_as_the_engine_does(dtype):
    both = randn(5, 2 * 24, dtype=dtype, scale=4)
    gate, up = both.chunk(2, dim=-1)
    assert torch.equal(fused.silu_mul(both), F.silu(gate).mul_(up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 24, 1500])
def test_silu_kernel_follows_its_twin(dtype, width):
    both = randn(3, 2 * width, dtype=dtype, scale=4)
    out = torch.empty(3, width, dtype=dtype)
    assert triton_fused.silu_mul(both, out=out) is out
    assert_same_to_rounding(out, fused.silu_mul(both))


def test_silu_kernel_stays_finite_far_out():
    gate = torch.tensor([[-200.0, -90.0, 0.0, 90.0, 200.0]])
    with np.errstate(over="ignore"):  # exp overflows to infinity, as on a GPU; NumPy would warn
        result = triton_fused.silu_mul(torch.cat((gate, torch.ones_like(gate)), dim=1))
    assert result.tolist() == [[0.0, pytest.approx(0.0, abs=1e-30), 0.0, 90.0, 200.0]]


class Step:
    """Tokens of three sequences with scattered blocks, and everything a rotation needs."""

    def __init__(self, dtype=torch.float32, cache_dtype=None, *, dim=16, heads=6, kv_heads=2, scale=1.0):
        generator = torch.Generator().manual_seed(7)
        self.num_heads, size = heads, 4
        self.qkv = randn(9, heads + 2 * kv_heads, dim, dtype=dtype, seed=3, scale=scale)
        self.positions = torch.tensor([0, 1, 2, 3, 4, 11, 12, 30, 5], dtype=torch.int32)
        self.rows = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 2], dtype=torch.int32)
        self.slots = torch.tensor([0, 1, 2, 3, 4, 7, 8, 11, -1], dtype=torch.int32)
        self.tables = torch.randperm(9, generator=generator).view(3, 3).to(torch.int32)
        self.rope = RopeTable(RopeSpec(theta=500.0), dim, 40, dtype, "cpu")
        self.ring = torch.full((6, heads, dim), -7.0, dtype=dtype)
        self.ring_index = torch.tensor([-1, 4, -1, 0, -1, 2, 5, 3, -1])
        self.cache = torch.full((10, 2, kv_heads, size, dim), 9.0).to(cache_dtype or dtype)
        self.norms = {}

    def run(self, write, **more):
        return write(
            self.qkv, self.positions, self.rope.cos, self.rope.sin, self.cache, self.tables, self.rows, self.slots,
            num_heads=self.num_heads, ring=self.ring, ring_index_T=self.ring_index, **self.norms, **more,
        )  # fmt: skip

    def with_norms(self):
        dim, dtype = self.qkv.shape[-1], self.qkv.dtype
        self.norms = {
            "q_norm_D": randn(dim, dtype=dtype, seed=4),
            "k_norm_D": randn(dim, dtype=dtype, seed=5),
            "epsilon": 1e-6,
        }
        return self


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
def test_rotation_and_cache_hold_what_the_engine_writes(dtype, normed):
    step = Step(dtype).with_norms() if normed else Step(dtype)
    expected = step.qkv.clone()
    q, k = expected[:, :6], expected[:, 6:8]
    if normed:
        q.copy_(llama.rms_norm(q, step.norms["q_norm_D"], 1e-6))
        k.copy_(llama.rms_norm(k, step.norms["k_norm_D"], 1e-6))
    rotate_(expected[:, :8], *step.rope.at(step.positions.long()))
    before = step.qkv.clone()
    assert torch.equal(step.run(fused.rope_write), q)
    assert torch.equal(step.qkv, before)
    written = set()
    for token in range(8):
        slot = int(step.slots[token])
        block = int(step.tables[step.rows[token], slot // 4])
        written.add((block, slot % 4))
        assert torch.equal(step.cache[block, 0, :, slot % 4], k[token])
        assert torch.equal(step.cache[block, 1, :, slot % 4], expected[token, 8:])
    for block in range(10):
        for place in range(4):
            if (block, place) not in written:
                assert bool((step.cache[block, :, :, place] == 9).all())
    for token, place in enumerate(step.ring_index.tolist()):
        if place >= 0:
            assert torch.equal(step.ring[place], q[token])
    assert bool((step.ring[1] == -7).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16, 6, 2), (24, 3, 3), (64, 8, 1)])
@pytest.mark.parametrize("normed", [False, True])
def test_rotation_kernel_follows_its_twin(dtype, shape, normed):
    dim, heads, kv_heads = shape
    ours, twins = (Step(dtype, dim=dim, heads=heads, kv_heads=kv_heads) for _ in range(2))
    if normed:
        ours.with_norms()
        twins.with_norms()
    assert_same_to_rounding(ours.run(triton_fused.rope_write), twins.run(fused.rope_write))
    assert_same_to_rounding(ours.cache, twins.cache)
    assert_same_to_rounding(ours.ring, twins.ring)


def test_rotation_kernel_without_ring_takes_one_token_a_row():
    ours, twins = Step(), Step()
    for step in (ours, twins):
        step.ring_index, step.rows, unused = None, None, step.ring
        step.ring = None
        step.qkv, step.positions, step.slots = step.qkv[:3], step.positions[:3], step.slots[:3] + 4
    out = torch.empty(3, 6, 16)
    assert ours.run(triton_fused.rope_write, q_out=out) is out
    assert_same_to_rounding(out, twins.run(fused.rope_write))
    assert_same_to_rounding(ours.cache, twins.cache)
    assert bool((unused == -7).all())


def test_rotation_kernel_takes_a_slice_of_a_wider_projection():
    ours, twins = Step(), Step()
    padded = torch.zeros(9, 12, 16)
    padded[:, :10] = ours.qkv
    ours.qkv = padded[:, :10]
    assert_same_to_rounding(ours.run(triton_fused.rope_write), twins.run(fused.rope_write))
    assert_same_to_rounding(ours.cache, twins.cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.004, 1.0, 300.0])
def test_eight_bit_cache_is_rounded_saturated_and_keeps_nan(dtype, scale):
    ours, twins = (Step(dtype, torch.float8_e4m3fn, scale=scale) for _ in range(2))
    for step in (ours, twins):
        step.qkv[5, 9, 3] = torch.nan
        step.qkv[5, 8, 0] = torch.inf
    ours.run(triton_fused.rope_write)
    twins.run(fused.rope_write)
    torch.testing.assert_close(ours.cache.float(), twins.cache.float(), rtol=0, atol=0, equal_nan=True)
    value = twins.cache[twins.tables[1, 1].long(), 1, :, 3].float()
    assert torch.isnan(value[1, 3])
    assert value[0, 0] == fused.FP8_MAX
    clean = value[~torch.isnan(value)]
    assert torch.equal(clean, clean.clamp(-448, 448))
    wanted = twins.qkv[5, 8:10].float().clamp(-448, 448)
    torch.testing.assert_close(value, wanted, rtol=1 / 16, atol=2**-10, equal_nan=True)


def test_every_bfloat16_becomes_the_nearest_eight_bit_value():
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).view(64, 8, 128)
    qkv = torch.cat((torch.zeros(64, 9, 128, dtype=torch.bfloat16), every), dim=1)
    cache = torch.zeros(8, 2, 8, 8, 128, dtype=torch.float8_e4m3fn)
    tables, places = torch.arange(8, dtype=torch.int32)[None], torch.arange(64, dtype=torch.int32)
    table = torch.ones(1, 64, dtype=torch.bfloat16)
    zeros = torch.zeros_like(places)
    with np.errstate(all="ignore"):  # values are rotated too, though nobody keeps that
        triton_fused.rope_write(qkv, zeros, table, table, cache, tables, zeros, places, num_heads=1)
    written = cache[:, 1].float().transpose(1, 2).reshape(64, 8, 128)
    expected = fused.to_cache_type(every, torch.float8_e4m3fn).float()
    torch.testing.assert_close(written, expected, rtol=0, atol=0, equal_nan=True)
    assert int(torch.isnan(expected).sum()) == 254
    assert written[every == torch.inf].item() == fused.FP8_MAX


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("run", [fused.embed, triton_fused.embed])
def test_embedding_gives_zeros_for_what_is_no_token(run, dtype):
    table = randn(7, 40, dtype=torch.bfloat16)
    ids = torch.tensor([6, -1, 0, 7, 3], dtype=dtype)
    out = torch.full((5, 40), 9.0, dtype=torch.bfloat16)
    assert run(ids, table, out=out) is out
    assert torch.equal(out[[0, 2, 4]], table[[6, 0, 3]])
    assert bool((out[[1, 3]] == 0).all())


@pytest.mark.parametrize("seed", range(12))
def test_kernels_follow_their_twins_at_any_shape(seed):
    """Shapes nobody thought of: odd widths, heads that fill no tile, blocks of any size, several tokens a row."""
    draw = np.random.default_rng(seed)
    dtype = DTYPES[seed % 3]
    tokens, width = int(draw.integers(1, 6)), int(draw.integers(1, 9000 if seed % 4 == 0 else 300))
    residual, delta = randn(tokens, width, dtype=dtype), randn(tokens, width, dtype=dtype, seed=1)
    twins, weight = residual.clone(), randn(width, dtype=dtype, seed=2)
    normed = triton_fused.add_rms_norm(delta, residual, weight, 1e-5)
    assert_same_to_rounding(normed, fused.add_rms_norm(delta, twins, weight, 1e-5))
    assert torch.equal(residual, twins)
    both = randn(tokens, 2 * width, dtype=dtype)
    assert_same_to_rounding(triton_fused.silu_mul(both), fused.silu_mul(both))

    heads, kv_heads, dim, size = (int(draw.integers(1, most)) for most in (20, 12, 140, 40))
    dim *= 2
    qkv = randn(tokens, heads + 2 * kv_heads, dim, dtype=dtype, seed=3)
    table = randn(50, dim // 2, dtype=dtype, seed=4)
    places = torch.from_numpy(draw.permutation(3 * 4 * size)[:tokens])
    rows, slots = (places // (4 * size)).to(torch.int32), (places % (4 * size)).to(torch.int32)
    tables = torch.from_numpy(draw.permutation(12)).view(3, 4).to(torch.int32)
    positions = torch.from_numpy(draw.integers(0, 50, tokens)).to(torch.int32)
    ours, theirs = (torch.zeros(12, 2, kv_heads, size, dim, dtype=dtype) for _ in range(2))
    arguments = (qkv, positions, table, table.flip(0))
    q = triton_fused.rope_write(*arguments, ours, tables, rows, slots, num_heads=heads)
    assert_same_to_rounding(q, fused.rope_write(*arguments, theirs, tables, rows, slots, num_heads=heads))
    assert_same_to_rounding(ours, theirs)


def test_strided_inputs_are_read_as_they_are():
    turned, weight = randn(40, 3).T, randn(40, seed=1)
    residual = randn(3, 40, seed=2)
    twin = residual.clone()
    normed = triton_fused.add_rms_norm(turned, residual, weight, EPSILON)
    assert_same_to_rounding(normed, fused.add_rms_norm(turned, twin, weight, EPSILON))
    assert_same_to_rounding(triton_fused.silu_mul(turned), fused.silu_mul(turned))
    with pytest.raises(ValueError, match="contiguous"):
        fused.add_rms_norm(None, turned, weight, EPSILON)
    ours, twins = Step(), Step()
    for step in (ours, twins):
        step.qkv = step.qkv.transpose(1, 2).contiguous().transpose(1, 2)
        for name in ("positions", "rows", "slots", "ring_index"):
            setattr(step, name, torch.stack((getattr(step, name), torch.zeros(9).int()), dim=1)[:, 0])
    assert_same_to_rounding(ours.run(triton_fused.rope_write), twins.run(fused.rope_write))
    assert_same_to_rounding(ours.cache, twins.cache)
    assert_same_to_rounding(ours.ring, twins.ring)
    table, ids = randn(9, 40), torch.tensor([3, 9, 5, 9, 8, 9])[::2]
    assert torch.equal(triton_fused.embed(ids, table), table[[3, 5, 8]])


def test_nothing_to_do_is_fine():
    none = torch.empty(0, 16)
    assert triton_fused.add_rms_norm(None, none, torch.ones(16), EPSILON).shape == (0, 16)
    assert triton_fused.silu_mul(none).shape == (0, 8)
    assert triton_fused.embed(torch.empty(0, dtype=torch.int32), torch.ones(3, 16)).shape == (0, 16)
    step = Step()
    step.qkv = step.qkv[:0]
    assert step.run(triton_fused.rope_write).shape == (0, 6, 16)
