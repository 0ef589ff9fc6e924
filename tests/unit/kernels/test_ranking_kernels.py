"""Ranking without sorting, in Triton's interpreter, against the sorting twin.

The interpreter is chosen when triton is imported; `test_kernel_interpreter.py` runs this file where that is too late.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys

import pytest
import torch

from trtkit.kernels import ranking

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("triton was imported without its interpreter before this file", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trtkit.kernels import triton_ranking
from trtkit.kv import ranking as kv_ranking
from trtkit.kv.policy import Budget

LARGEST = torch.finfo(torch.float32).max
AWKWARD = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, LARGEST, -LARGEST, 1e-45, -1e-45, 1.0000001]


def both(scores, positions, num_tokens, **budget):
    """What the kernel keeps, held against the twin."""
    found = triton_ranking.keep_best(scores, positions, num_tokens, **budget)
    expected = ranking.keep_best_twin(scores, positions, num_tokens, **budget)
    assert found.dtype is torch.int64
    assert torch.equal(found, expected)
    return found


@st.composite
def rows(draw):
    """A row of awkward scores at distinct positions, and a budget it can meet."""
    length = draw(st.integers(1, 24))
    scores = draw(st.lists(st.sampled_from(AWKWARD), min_size=length, max_size=length))
    num_tokens = length + draw(st.integers(0, 5))
    positions = draw(st.permutations(range(num_tokens)))[:length]
    tokens = draw(st.integers(1, length))
    sinks = draw(st.integers(0, tokens))
    recent = draw(st.integers(0, tokens - sinks))
    return scores, positions, num_tokens, {"tokens": tokens, "sinks": sinks, "recent": recent}


@given(rows())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
def test_any_row_keeps_what_sorting_keeps(case):
    scores, positions, num_tokens, budget = case
    both(torch.tensor([scores]), torch.tensor([positions]), num_tokens, **budget)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_nan_ranks_below_minus_infinity_however_new_it_is(tokens):
    scores = torch.tensor([[math.nan, -math.inf, math.nan, -LARGEST, math.nan]])
    both(scores, torch.tensor([[4, 0, 3, 1, 2]]), 5, tokens=tokens, sinks=0, recent=0)


@pytest.mark.parametrize("positions", [torch.int32, torch.int64])
@pytest.mark.parametrize("scores", [torch.float32, torch.bfloat16])
def test_layers_and_heads_decide_alone_whatever_the_types(scores, positions):
    generator = torch.Generator().manual_seed(0)
    mass = torch.rand(2, 2, 70, generator=generator).to(scores)
    places = torch.stack([torch.randperm(90, generator=generator)[:70] for _ in range(4)]).view(2, 2, 70)
    found = both(mass, places.to(positions), 90, tokens=33, sinks=4, recent=7)
    assert found.shape == (2, 2, 33)


def test_a_ledgers_live_part_is_ranked_where_it_lies():
    mass = torch.rand(2, 3, 50, generator=torch.Generator().manual_seed(0))
    places = torch.arange(50, dtype=torch.int32).expand(2, 3, 50).contiguous()
    both(mass[:, :, :40], places[:, :, :40], 40, tokens=20, sinks=2, recent=5)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64])
def test_rows_may_end_anywhere_in_a_chunk(length):
    scores = torch.rand(1, length, generator=torch.Generator().manual_seed(length))
    both(scores, torch.arange(length)[None], length, tokens=max(1, length // 2), sinks=0, recent=0)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_longer_than_registers_are_read_in_chunks(monkeypatch, tied):
    monkeypatch.setattr(triton_ranking, "_IN_REGISTERS", 32)
    monkeypatch.setattr(triton_ranking, "_CHUNK", 16)
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 77, generator=generator)
    if tied:
        scores = (scores * 3).round()
    places = torch.stack([torch.randperm(77, generator=generator) for _ in range(2)])
    both(scores, places, 77, tokens=40, sinks=3, recent=5)


def test_one_row_without_leading_axes_and_no_rows_at_all():
    scores = torch.tensor([0.5, 0.1, 0.9])
    assert both(scores, torch.arange(3), 3, tokens=2, sinks=0, recent=0).tolist() == [0, 2]
    none = triton_ranking.keep_best(
        torch.empty(0, 3), torch.empty(0, 3, dtype=torch.int32), 3, tokens=2, sinks=0, recent=0
    )
    assert none.shape == (0, 2)


def test_policies_rank_with_the_kernel_where_kernels_run(monkeypatch):
    monkeypatch.setattr(ranking, "use_triton", lambda tensor, family: family == "ranking")
    monkeypatch.setattr(ranking, "keep_best_twin", None)
    budget = Budget(tokens=3, sinks=1, recent=1, interval=1)
    kept = kv_ranking.keep_best(torch.tensor([[0.0, 9, 1, 8, 2, 0]]), torch.arange(6)[None], 6, budget)
    assert kept.tolist() == [[0, 1, 5]]
