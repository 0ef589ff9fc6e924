"""Checks of norms, rotation, activation, embedding and sampling, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from trtkit.kernels import fused, sampling
from trtkit.kernels.dispatch import disable
from trtkit.kernels.selfcheck import Answers, Check, CheckShape, Draws

BOUNDS = {torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}
"""Two or three roundings to the type."""

_FP8_BOUND = 0.07
_TOKENS = 7
_EPSILON = 1e-5


def checks(device: torch.device, shape: CheckShape) -> Iterator[Check]:
    """Everything between the matrix products."""
    bound = BOUNDS[shape.dtype]
    cached = max(bound, _FP8_BOUND) if shape.kv_dtype is torch.float8_e4m3fn else bound
    yield Check(family="fused", name="norm", bound=bound, run=partial(norm, device, shape))
    yield Check(family="fused", name="activation", bound=bound, run=partial(activation, device, shape))
    if torch.float8_e4m3fn in shape.weight_dtypes:
        rows = partial(Check, family="fused", bound=_FP8_BOUND, on_failure=_two_kernels_instead)
        yield rows(name="norm to fp8", run=partial(_norm_fp8, device, shape))
        yield rows(name="activation to fp8", run=partial(_activation_fp8, device, shape))
    yield Check(family="fused", name="rotation and cache write", bound=cached, run=partial(rotation, device, shape))
    yield Check(family="fused", name="embedding", bound=0.0, run=partial(_embedding, device, shape))
    yield Check(family="sampling", name="greedy", bound=0.0, run=partial(largest, device, shape))
    yield Check(family="sampling", name="drawn at random", bound=0.0, run=partial(_drawn, device))


def norm(device: torch.device, shape: CheckShape) -> Answers:
    """The sum and its norm, with and without something to add."""
    draws = Draws(device)
    residual, delta = (draws.normal(_TOKENS, shape.hidden_size, dtype=shape.dtype) for _ in range(2))
    weight = draws.normal(shape.hidden_size, dtype=shape.dtype)
    for added in (None, delta):
        before = residual.clone()
        normed = fused.add_rms_norm(added, residual, weight, _EPSILON)
        wide = before.double() if added is None else before.double() + added.double()
        yield residual, wide
        yield normed, wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPSILON) * weight.double()


def activation(device: torch.device, shape: CheckShape) -> Answers:
    """The gate times what it lets through."""
    both = Draws(device).normal(_TOKENS, 2 * shape.intermediate_size, dtype=shape.dtype)
    gate, up = both.double().chunk(2, dim=-1)
    yield fused.silu_mul(both), gate * torch.sigmoid(gate) * up


def _norm_fp8(device: torch.device, shape: CheckShape) -> Answers:
    draws = Draws(device)
    residual, delta = (draws.normal(_TOKENS, shape.hidden_size, dtype=shape.dtype) for _ in range(2))
    residual[3], delta[3] = 0, 0
    weight = draws.normal(shape.hidden_size, dtype=shape.dtype)
    for added in (None, delta):
        wide = residual.double() if added is None else residual.double() + added.double()
        quantised, scale = fused.add_rms_norm_fp8(added, residual, weight, _EPSILON)
        yield residual, wide
        yield from _in_rows(
            quantised, scale, wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPSILON) * weight
        )


def _activation_fp8(device: torch.device, shape: CheckShape) -> Answers:
    both = Draws(device).normal(_TOKENS, 2 * shape.intermediate_size, dtype=shape.dtype)
    both[1] *= 1e-2
    both[3] = 0
    gate, up = both.double().chunk(2, dim=-1)
    yield from _in_rows(*fused.silu_mul_fp8(both), gate * torch.sigmoid(gate) * up)
    both[0, 5] = torch.nan
    quantised, _ = fused.silu_mul_fp8(both)
    not_numbers = quantised.float().isnan().sum(1).double()
    yield not_numbers, torch.eye(_TOKENS, dtype=torch.float64, device=device)[0]


def _in_rows(quantised: Tensor, scale_T1: Tensor, expected: Tensor) -> Answers:
    """Each row on its own, for errors are held against the largest value compared."""
    top = expected.abs().amax(1, keepdim=True)
    yield scale_T1, torch.where(top > 0, top / fused.FP8_MAX, 1.0)
    for row in range(expected.shape[0]):
        yield quantised[row].float() * scale_T1[row], expected[row]


def _two_kernels_instead() -> bool:
    disable(fused.FP8_ROWS, "wrong on this device: rows are quantised by a kernel of their own")
    return True


def rotation(device: torch.device, shape: CheckShape) -> Answers:
    """Queries, keys and values where they belong, and nothing elsewhere."""
    draws, size, half = Draws(device), shape.tokens_per_block, shape.head_dim // 2
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    qkv = draws.normal(_TOKENS, heads + 2 * kv_heads, shape.head_dim, dtype=shape.dtype)
    angles = draws.uniform(64, half) * 6.28
    cos, sin = angles.cos().to(shape.dtype), angles.sin().to(shape.dtype)
    positions = torch.arange(9, 9 + _TOKENS, dtype=torch.int32, device=device)
    cache = torch.zeros(9, 2, kv_heads, size, shape.head_dim, device=device).to(shape.kv_dtype)
    tables = draws.order(8).view(2, 4).contiguous()
    rows = torch.tensor([0, 0, 0, 1, 1, 1, 0], dtype=torch.int32, device=device)
    slots = torch.tensor([0, 1, size, 5, size + 3, 3 * size, -1], dtype=torch.int32, device=device)
    ring = torch.zeros(4, heads, shape.head_dim, dtype=shape.dtype, device=device)
    places = torch.tensor([-1, 2, -1, 0, -1, -1, 3], dtype=torch.int32, device=device)
    found = fused.rope_write(
        qkv, positions, cos, sin, cache, tables, rows, slots, num_heads=heads, ring=ring, ring_index_T=places
    )
    queries, keys, values = torch.split(qkv.double(), [heads, kv_heads, kv_heads], dim=1)
    at = positions.long()
    queries, keys = (_rotated(part, cos[at].double(), sin[at].double()) for part in (queries, keys))
    yield found, queries
    for token in range(_TOKENS - 1):
        block, slot = int(tables[int(rows[token]), int(slots[token]) // size]), int(slots[token]) % size
        yield cache[block][:, :, slot].float(), torch.stack((keys[token], values[token]))
    written = torch.tensor([float(cache.float().abs().amax(-1).count_nonzero())], device=device)
    yield written, torch.tensor([2.0 * kv_heads * (_TOKENS - 1)], device=device)
    yield ring[[2, 0, 3]], queries[[1, 3, 6]]


def _rotated(x_THD: Tensor, cos_TD2: Tensor, sin_TD2: Tensor) -> Tensor:
    first, second = x_THD.chunk(2, dim=-1)
    cos, sin = cos_TD2[:, None], sin_TD2[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _embedding(device: torch.device, shape: CheckShape) -> Answers:
    table = Draws(device).normal(50, shape.hidden_size, dtype=shape.dtype)
    ids = torch.tensor([49, 0, -1, 7], dtype=torch.int32, device=device)
    right = table[[49, 0, 0, 7]].clone()
    right[2] = 0
    yield fused.embed(ids, table), right


def largest(device: torch.device, shape: CheckShape) -> Answers:
    """The largest logit, the lower of two, and rows that are no numbers."""
    logits = Draws(device).normal(5, shape.vocab_size, dtype=shape.dtype)
    last = shape.vocab_size - 1
    logits[0, last], logits[1, 3], logits[1, last], logits[2, 5] = 99, 99, 99, torch.nan
    logits[3, last] = torch.inf
    right = [last, 3, sampling.NOT_A_NUMBER, sampling.NOT_A_NUMBER, int(logits[4].float().argmax())]
    logits[4, right[4]] = 99
    yield sampling.greedy(logits), torch.tensor(right, device=device)


def _drawn(device: torch.device) -> Answers:
    """A distribution whose steps are known: tokens 3, 1, 2, 0 with 0.5, 0.25, 0.15 and 0.1."""
    logits = torch.tensor([0.1, 0.25, 0.15, 0.5], device=device).log().repeat(6, 1)
    temperature = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64, device=device)
    top_k = torch.tensor([0, 0, 0, 0, 2, 0], dtype=torch.int32, device=device)
    top_p = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.6], dtype=torch.float64, device=device)
    uniform = torch.tensor([0.2, 0.6, 0.95, 0.9, 0.95, 0.95], dtype=torch.float64, device=device)
    found = sampling.sample_rows(logits, temperature, top_k, top_p, uniform)
    yield found, torch.tensor([3, 1, 0, 3, 1, 1], device=device)
