"""The Triton kernels in Triton's interpreter on a CPU, against dense float64 attention and their torch twins.

The interpreter is chosen when triton is imported, so this file works only where nobody imported it before.
"""

from __future__ import annotations

import importlib.util
import math
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

from trtkit.kernels import triton_decode, triton_paged

BLOCK = 8
SHAPES = [(64, 1), (64, 4), (128, 8), (48, 3)]
LENGTHS = (1, 7, 8, 65, 90)


def make_batch(dim, kv_heads=2, lengths=LENGTHS, seed=0):
    """A cache of scattered blocks whose free slots hold NaN, so that a read past a length shows."""
    generator = torch.Generator().manual_seed(seed)
    columns = math.ceil(max(lengths) / BLOCK)
    need = [math.ceil(n / BLOCK) for n in lengths]
    order = torch.randperm(sum(need) + 3, generator=generator)
    cache = torch.full((len(order), 2, kv_heads, BLOCK, dim), math.nan)
    blocks = torch.zeros(len(lengths), columns, dtype=torch.int32)
    used = 0
    for index, length in enumerate(lengths):
        for column in range(need[index]):
            block = int(order[used])
            used += 1
            blocks[index, column] = block
            count = min(BLOCK, length - column * BLOCK)
            cache[block, :, :, :count] = torch.randn(2, kv_heads, count, dim, generator=generator)
    return paged.PagedBatch(cache=cache, blocks_BM=blocks, lengths_B=torch.tensor(lengths, dtype=torch.int32))


def make_queries(batch, group, counts, seed=1):
    """The last `counts[b]` tokens of each sequence as queries; slots are shuffled, positions say which is which."""
    generator = torch.Generator().manual_seed(seed)
    kv_heads, dim = batch.cache.shape[2], batch.cache.shape[4]
    lengths = batch.lengths_B.tolist()
    positions = torch.zeros(len(lengths), kv_heads, max(lengths), dtype=torch.int32)
    for index, length in enumerate(lengths):
        for head in range(kv_heads):
            positions[index, head, :length] = torch.randperm(length, generator=generator)
    starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    asked = torch.cat([torch.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)]).to(torch.int32)
    heads = torch.randn(int(starts[-1]), group * kv_heads, dim, generator=generator)
    return paged.PagedQueries(heads_RHD=heads, starts_B1=starts, positions_R=asked), positions


def dense_mass(queries, weights, batch, positions):
    """Column sums of the masked softmax in float64, one query and head at a time."""
    mass = torch.zeros(positions.shape, dtype=torch.float64)
    kv_heads = positions.shape[1]
    group = queries.heads_RHD.shape[1] // kv_heads
    starts = queries.starts_B1.tolist()
    for index in range(len(starts) - 1):
        keys = paged.gather_sequence(batch, index)[0].double()
        live = positions[index, :, : keys.shape[1]]
        for row in range(starts[index], starts[index + 1]):
            for head in range(queries.heads_RHD.shape[1]):
                logits = keys[head // group] @ queries.heads_RHD[row, head].double() / math.sqrt(keys.shape[-1])
                logits[live[head // group] > queries.positions_R[row]] = -math.inf
                mass[index, head // group, : keys.shape[1]] += weights[row].double() * torch.softmax(logits, 0)
    return mass


@pytest.mark.parametrize(("dim", "group"), SHAPES)
@pytest.mark.parametrize("implementation", [triton_decode.paged_decode_attention, paged.decode_attention_twin])
def test_decode_attention_and_its_lse_equal_dense_attention(implementation, dim, group):
    batch = make_batch(dim)
    queries = torch.randn(len(LENGTHS), 2 * group, dim, generator=torch.Generator().manual_seed(3))
    out, lse = implementation(queries, batch)
    for index in range(len(LENGTHS)):
        keys, values = paged.gather_sequence(batch, index).double()
        keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
        logits = (keys @ queries[index].double()[..., None])[..., 0] / math.sqrt(dim)
        expected = (torch.softmax(logits, -1)[:, None] @ values)[:, 0]
        torch.testing.assert_close(out[index].double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[index].double(), torch.logsumexp(logits, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dim", "group"), SHAPES)
@pytest.mark.parametrize("implementation", [triton_paged.score_paged, paged.score_twin])
def test_scored_mass_equals_dense_column_sums_over_ragged_lengths(implementation, dim, group):
    batch = make_batch(dim)
    queries, positions = make_queries(batch, group, counts=(1, 3, 0, 11, 5))
    weights = torch.linspace(0.5, 1, len(queries.positions_R))
    mass = implementation(queries, paged.lse_twin(queries, batch, positions), weights, batch, positions)
    expected = dense_mass(queries, weights, batch, positions)
    torch.testing.assert_close(mass.double(), expected, rtol=1e-5, atol=1e-6)
    for index, length in enumerate(LENGTHS):
        assert not mass[index, :, length:].any()


def test_mass_of_a_step_is_the_group_size_per_query_and_kv_head():
    batch = make_batch(64)
    queries, positions = make_queries(batch, 4, counts=(1, 2, 3, 4, 5))
    ones = torch.ones(15)
    mass = paged.score_twin(queries, paged.lse_twin(queries, batch, positions), ones, batch, positions)
    expected = torch.tensor([1.0, 2, 3, 4, 5])[:, None].expand(5, 2) * 4
    torch.testing.assert_close(mass.sum(-1), expected, rtol=1e-5, atol=1e-5)


def test_scores_ignore_the_order_of_query_heads_inside_a_group_only():
    batch = make_batch(64)
    queries, positions = make_queries(batch, 4, counts=(1, 1, 1, 1, 1))
    ones = torch.ones(5)

    def mass_of(order):
        moved = paged.PagedQueries(
            heads_RHD=queries.heads_RHD[:, order], starts_B1=queries.starts_B1, positions_R=queries.positions_R
        )
        return paged.score_twin(moved, paged.lse_twin(moved, batch, positions), ones, batch, positions)

    plain = mass_of([0, 1, 2, 3, 4, 5, 6, 7])
    torch.testing.assert_close(mass_of([3, 1, 0, 2, 4, 5, 6, 7]), plain)
    assert (mass_of([4, 1, 2, 3, 0, 5, 6, 7]) - plain).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", [triton_paged.score_paged, paged.score_twin])
def test_bfloat16_caches_score_within_a_hundredth(implementation):
    batch = make_batch(64)
    queries, positions = make_queries(batch, 4, counts=(1, 3, 2, 7, 4))
    ones = torch.ones(17)
    expected = dense_mass(queries, ones, batch, positions)
    half = paged.PagedBatch(cache=batch.cache.bfloat16(), blocks_BM=batch.blocks_BM, lengths_B=batch.lengths_B)
    rounded = paged.PagedQueries(
        heads_RHD=queries.heads_RHD.bfloat16(), starts_B1=queries.starts_B1, positions_R=queries.positions_R
    )
    mass = implementation(rounded, paged.lse_twin(rounded, half, positions), ones, half, positions)
    torch.testing.assert_close(mass.double(), expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("implementation", [triton_paged.compact_paged, paged.compact_twin])
def test_compaction_moves_exactly_the_named_rows(implementation):
    batch = make_batch(48)
    moves = torch.tensor([[3, 0, 64, 2], [3, 1, 60, 63 - 8], [4, 0, 89, 0], [1, 1, 6, 5]], dtype=torch.int32)
    expected = batch.cache.clone()
    for sequence, head, source, target in moves.tolist():
        at_source = int(batch.blocks_BM[sequence, source // BLOCK])
        at_target = int(batch.blocks_BM[sequence, target // BLOCK])
        expected[at_target, :, head, target % BLOCK] = batch.cache[at_source, :, head, source % BLOCK]
    implementation(batch.cache, batch.blocks_BM, moves)
    torch.testing.assert_close(batch.cache, expected, rtol=0, atol=0, equal_nan=True)


def test_compaction_without_moves_changes_nothing():
    batch = make_batch(48)
    before = batch.cache.clone()
    for implementation in (triton_paged.compact_paged, paged.compact_twin):
        implementation(batch.cache, batch.blocks_BM, torch.zeros(0, 4, dtype=torch.int32))
    torch.testing.assert_close(batch.cache, before, rtol=0, atol=0, equal_nan=True)
