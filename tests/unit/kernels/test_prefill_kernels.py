"""Prefill attention in Triton's interpreter and its torch twin, against float64 attention query by query.

The interpreter is chosen when triton is imported; `test_kernel_interpreter.py` runs this file where that is too late.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
import torch

from trtkit.kernels import paged

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("triton was imported without its interpreter before this file", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"

from support.paged_caches import FP8, dense_prefill, make_batch, randn

from trtkit.kernels import triton_prefill

BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
BOTH = ["kernel", "twin"]


def attend(which, queries, starts, cached, batch):
    if which == "twin":
        return paged.prefill_attention_twin(queries, starts, cached, batch)
    most = int(starts.diff().max())
    return triton_prefill.paged_prefill_attention(queries, starts, cached, batch, max_count=most)


def pieces(cached, counts):
    """Bounds of the queries, and live slots before them."""
    return torch.tensor([0, *counts]).cumsum(0).to(torch.int32), torch.tensor(cached, dtype=torch.int32)


def assert_attends(which, cached, counts, *, group=4, compute=torch.float32, stored=None, **shape):
    lengths = [before + count for before, count in zip(cached, counts, strict=True)]
    batch = make_batch(lengths, dtype=stored or compute, **shape)
    starts, before = pieces(cached, counts)
    heads, dim = batch.cache.shape[2] * group, batch.cache.shape[4]
    queries = randn(sum(counts), heads, dim, dtype=compute)
    out, lse = attend(which, queries, starts, before, batch)
    expected, expected_lse = dense_prefill(queries, starts, before, batch)
    bound = BOUNDS[compute]
    torch.testing.assert_close(out.double(), expected, rtol=bound, atol=bound)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", BOTH)
@pytest.mark.parametrize(("dim", "group"), [(64, 1), (64, 4), (128, 8), (96, 3)])
def test_a_prompt_attends_causally_to_itself(which, dim, group):
    assert_attends(which, [0], [41], dim=dim, group=group)


@pytest.mark.parametrize("which", BOTH)
def test_pieces_of_any_length_share_a_step_with_what_is_cached(which):
    """A fresh prompt, one query, a piece after a long cache, nobody's turn, and lengths around a tile of 64."""
    assert_attends(which, [0, 30, 100, 12, 63, 64, 65], [33, 1, 5, 0, 1, 1, 64])


@pytest.mark.parametrize("block", [1, 16, 32, 64, 128])
def test_tiles_of_keys_may_be_larger_or_smaller_than_blocks(block):
    assert_attends("kernel", [0, 70], [66, 20], block=block, heads=1)


@pytest.mark.parametrize("which", BOTH)
@pytest.mark.parametrize(
    ("compute", "stored"),
    [(torch.float16, None), (torch.bfloat16, None), (torch.bfloat16, FP8), (torch.float32, FP8)],
)
def test_every_type_of_cache_is_read(which, compute, stored):
    assert_attends(which, [3, 70], [20, 4], group=8, heads=1, compute=compute, stored=stored)


def test_a_prompt_of_several_tiles_of_rows_is_masked_only_where_it_must_be():
    """150 queries x 4 heads are five tiles of 128 rows, whose diagonals begin inside tiles of keys."""
    assert_attends("kernel", [37], [150], heads=1)


def test_the_future_does_not_leak_into_the_past():
    batch = make_batch([90], heads=1)
    starts, before = pieces([10], [80])
    queries = randn(80, 4, 64)
    out, lse = attend("kernel", queries, starts, before, batch)
    block, size = int(batch.blocks_BM[0, 80 // 8]), 8
    batch.cache[block, :, :, 80 % size :] = 1e4
    again, lse_again = attend("kernel", queries, starts, before, batch)
    assert torch.equal(out[:70], again[:70])
    assert torch.equal(lse[:70], lse_again[:70])
    assert not torch.equal(out[70:], again[70:])


def test_attention_of_one_query_is_decode_attention():
    batch = make_batch([50, 7], heads=2)
    queries = randn(2, 8, 64)
    starts, before = pieces([49, 6], [1, 1])
    out, lse = attend("kernel", queries, starts, before, batch)
    expected, expected_lse = paged.decode_attention_twin(queries, batch)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("on_triton", [True, False])
def test_results_go_where_the_caller_wants_them(on_triton, monkeypatch):
    monkeypatch.setattr(paged, "use_triton", lambda tensor, family: on_triton)
    batch = make_batch([9], heads=1)
    starts, before = pieces([4], [5])
    queries, out, lse = randn(5, 4, 64), torch.empty(5, 4, 64), torch.empty(5, 4)
    found = paged.paged_prefill_attention(queries, starts, before, batch, max_count=5, out=out, lse=lse)
    assert found[0] is out
    assert found[1] is lse
    torch.testing.assert_close(out.double(), dense_prefill(queries, starts, before, batch)[0], rtol=1e-5, atol=1e-5)


def test_no_queries_are_no_launch():
    batch = make_batch([9], heads=1)
    starts, before = pieces([9], [0])
    out, lse = triton_prefill.paged_prefill_attention(torch.empty(0, 4, 64), starts, before, batch, max_count=0)
    assert out.numel() == lse.numel() == 0
