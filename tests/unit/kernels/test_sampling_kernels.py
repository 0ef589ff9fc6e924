"""Greedy and batched sampling: like the engine's row-by-row sampler, and the Triton kernels like their twins.

Triton's interpreter is chosen when triton is imported, so kernels run here only where nobody imported it before.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
import torch

from trtkit.engine.sampler import sample, uniform
from trtkit.kernels import sampling
from trtkit.spec.engine import Sampling

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("triton was imported without its interpreter before this file", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"

from trtkit.kernels import triton_sampling

INFINITY = float("inf")
GREEDY = [sampling.greedy, triton_sampling.greedy]


def logits(rows, vocab_size, seed=0, dtype=torch.float32):
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("greedy", GREEDY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [1, 5, 4096, 4097, 12_300])
def test_greedy_takes_the_first_of_the_largest(greedy, dtype, vocab_size):
    rows = logits(3, vocab_size, dtype=dtype)
    expected = sample(rows.float(), [Sampling()] * 3, [(0, 0)] * 3)
    result = greedy(rows)
    assert result.dtype is torch.int32
    assert result.tolist() == expected


@pytest.mark.parametrize("greedy", GREEDY)
@pytest.mark.parametrize("values", [(2.0, 2.0), (-3.0, -3.0), (0.0, -0.0), (-0.0, 0.0)])
def test_equal_logits_give_the_lowest_token_in_one_tile_and_across_tiles(greedy, values):
    rows = torch.full((2, 9000), -50.0)
    rows[0, 17], rows[0, 4000] = values
    rows[1, 4095], rows[1, 8999] = values
    assert greedy(rows).tolist() == [17, 4095]


@pytest.mark.parametrize("greedy", GREEDY)
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), INFINITY])
def test_greedy_marks_rows_that_are_no_numbers_and_spares_the_others(greedy, bad):
    rows = logits(3, 5000)
    rows[1, 4500] = bad
    rows[2, 0] = -INFINITY
    result = greedy(rows).tolist()
    assert result[1] == sampling.NOT_A_NUMBER
    assert result[0] == int(rows[0].argmax())
    assert result[2] == int(rows[2].argmax())


@pytest.mark.parametrize("greedy", GREEDY)
def test_a_row_of_nothing_but_minus_infinity_has_no_token(greedy):
    assert greedy(torch.full((1, 40), -INFINITY)).tolist() == [sampling.NOT_A_NUMBER]


@pytest.mark.parametrize("greedy", GREEDY)
def test_the_largest_and_the_smallest_finite_logits_count(greedy):
    rows = torch.full((2, 10), -INFINITY)
    rows[0, 3] = torch.finfo(torch.float32).min
    rows[1, 4] = torch.finfo(torch.float32).max
    assert greedy(rows).tolist() == [3, 4]


def test_greedy_kernel_writes_where_it_is_told_and_reads_rows_of_a_wider_tensor():
    wide = logits(3, 6000)
    out = torch.zeros(3, dtype=torch.int32)
    workspace = torch.zeros(sampling.workspace_size(3, 5000), dtype=torch.int64)
    assert triton_sampling.greedy(wide[:, :5000], out=out, workspace=workspace) is out
    assert out.tolist() == wide[:, :5000].argmax(-1).tolist()
    assert triton_sampling.greedy(wide[:0]).shape == (0,)
    assert triton_sampling.greedy(wide[:, :9].T).tolist() == wide[:, :9].argmax(0).tolist()


HOW = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=1.3, top_k=7),
    Sampling(temperature=1.0, top_p=0.4),
    Sampling(temperature=0.9, top_k=20, top_p=0.9),
    Sampling(temperature=5.0, top_k=5000),
    Sampling(temperature=1.0, top_p=1e-6),
]


SAMPLERS = [sampling.sample_rows, triton_sampling.sample_rows]


def draw(sampler, rows, how, uniforms):
    return sampler(
        rows,
        torch.tensor([one.temperature for one in how], dtype=torch.float64),
        torch.tensor([one.top_k for one in how], dtype=torch.int32),
        torch.tensor([one.top_p for one in how], dtype=torch.float64),
        torch.tensor(uniforms, dtype=torch.float64),
    )


@pytest.mark.parametrize(("sampler", "seed"), [*((SAMPLERS[0], seed) for seed in range(8)), (SAMPLERS[1], 8)])
def test_a_batch_draws_what_the_engine_draws_row_by_row(sampler, seed):
    rows = logits(len(HOW), 97, seed=seed) * 3
    expected = sample(rows, HOW, [(seed, index) for index in range(len(HOW))])
    result = draw(sampler, rows, HOW, [uniform(seed, index) for index in range(len(HOW))])
    assert result.dtype is torch.int32
    assert result.tolist() == expected


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_draws_reach_both_ends_of_the_distribution(sampler):
    rows = torch.tensor([[0.0, 3.0, 2.0, 1.0]] * 4)
    how = [Sampling(temperature=1.0)] * 3 + [Sampling(temperature=1.0, top_k=3)]
    last = 1 - 2**-53
    assert draw(sampler, rows, how, [0.0, last, 0.7, last]).tolist() == [1, 0, 2, 3]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_equal_logits_are_drawn_in_the_order_of_their_ids(sampler):
    how = [Sampling(temperature=1.0)] * 4
    assert draw(sampler, torch.zeros(4, 4), how, [0.1, 0.3, 0.6, 0.9]).tolist() == [0, 1, 2, 3]
    assert draw(sampler, torch.zeros(4, 4), how, [0.0, 0.25, 0.5, 0.75]).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rows_that_are_no_numbers_are_marked_whatever_the_temperature(sampler):
    rows = logits(3, 10)
    rows[0, 3], rows[1, 3] = float("nan"), INFINITY
    result = draw(sampler, rows, [Sampling(temperature=1.0), Sampling(), Sampling(temperature=0.5, top_k=1)], [0.5] * 3)
    assert result.tolist() == [-1, -1, int(rows[2].argmax())]


@pytest.mark.parametrize(
    ("dtype", "vocab_size"), [(torch.bfloat16, 1), (torch.float32, 3), (torch.bfloat16, 200), (torch.float16, 4500)]
)
def test_sampling_kernel_follows_its_twin_through_ties_and_tiles(dtype, vocab_size):
    how = [
        Sampling(),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=2.0, top_k=9),
        Sampling(temperature=0.7, top_k=8, top_p=0.6),
        Sampling(temperature=0.01),
        Sampling(temperature=1.0, top_p=0.93),
    ]
    rows = (logits(len(how), vocab_size, seed=vocab_size) * 2).to(dtype)
    rows[2] = 0.0  # every logit a tie, also at the edge of top-k
    rows[2, vocab_size // 2] = -0.0
    rows[5] = rows[5].round()
    rows[4, : vocab_size // 2] = -INFINITY
    for index in range(1 if dtype is torch.float32 else 2):
        uniforms = [uniform(index, row) for row in range(len(how))]
        expected = draw(sampling.sample_rows, rows, how, uniforms).tolist()
        assert draw(triton_sampling.sample_rows, rows, how, uniforms).tolist() == expected


def test_sampling_kernel_reads_rows_of_a_wider_tensor_and_any_order_of_axes():
    how = [Sampling(temperature=1.0)] * 3
    wide = logits(3, 60)
    expected = draw(sampling.sample_rows, wide[:, :40], how, [0.2, 0.5, 0.9]).tolist()
    assert draw(triton_sampling.sample_rows, wide[:, :40], how, [0.2, 0.5, 0.9]).tolist() == expected
    assert draw(triton_sampling.sample_rows, wide[:, :40].T.contiguous().T, how, [0.2, 0.5, 0.9]).tolist() == expected
    assert draw(triton_sampling.sample_rows, wide[:0], [], []).shape == (0,)
