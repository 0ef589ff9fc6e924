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

from support.paged_caches import FP8, dense_decode, make_batch, randn

from trtkit.kernels import triton_decode, triton_paged

BLOCK = 8
SHAPES = [(64, 1), (64, 4), (128, 8), (48, 3)]
LENGTHS = (1, 7, 8, 65, 90)
DECODES = [triton_decode.paged_decode_attention, paged.decode_attention_twin]
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


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


def assert_decodes(found, queries, batch):
    """Output and log-sum-exp as float64 attention over the rounded inputs gives them."""
    expected, expected_lse = dense_decode(queries, batch)
    bound = BOUNDS[queries.dtype]
    torch.testing.assert_close(found[0].double(), expected, rtol=bound, atol=bound)
    torch.testing.assert_close(found[1].double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dim", "group"), SHAPES)
@pytest.mark.parametrize("implementation", DECODES)
def test_decode_attention_and_its_lse_equal_dense_attention(implementation, dim, group):
    batch = make_batch(LENGTHS, dim=dim)
    queries = randn(len(LENGTHS), 2 * group, dim)
    assert_decodes(implementation(queries, batch), queries, batch)


@pytest.mark.parametrize(
    ("compute", "stored"),
    [(torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float16, FP8), (torch.bfloat16, FP8),
     (torch.float32, FP8), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
)  # fmt: skip
@pytest.mark.parametrize("implementation", DECODES)
def test_decode_attention_takes_every_type_of_cache(implementation, compute, stored):
    batch = make_batch((9, 70), dim=96, block=32, heads=1, dtype=stored)
    queries = randn(2, 8, 96, dtype=compute)
    assert_decodes(implementation(queries, batch), queries, batch)


@pytest.mark.parametrize("block", [1, 16, 32, 64, 128])
def test_tiles_may_be_larger_or_smaller_than_blocks(block):
    batch = make_batch((1, block, block + 1, 130), block=block, heads=1)
    queries = randn(4, 4, 64)
    assert_decodes(triton_decode.paged_decode_attention(queries, batch), queries, batch)


@pytest.mark.parametrize("splits", [1, 2, 4, 16])
def test_any_number_of_parts_gives_the_same_attention(splits):
    """Lengths around a tile and around what one part takes; a long row beside short ones; 8 heads per KV head."""
    batch = make_batch((63, 64, 65, 700, 1), block=32, heads=1)
    queries = randn(5, 8, 64)
    assert_decodes(triton_decode.paged_decode_attention(queries, batch, splits=splits), queries, batch)


@pytest.mark.parametrize(("group", "dim", "splits"), [(3, 48, 4), (16, 128, 16), (1, 64, 16)])
def test_parts_add_up_for_odd_groups_and_in_several_stretches(group, dim, splits):
    batch = make_batch((400, 1100), dim=dim, block=32, heads=1)
    queries = randn(2, group, dim)
    assert_decodes(triton_decode.paged_decode_attention(queries, batch, splits=splits), queries, batch)


def test_a_workspace_serves_launch_after_launch_and_smaller_batches():
    batch = make_batch((300, 129), heads=1)
    workspace = paged.DecodeWorkspace.empty(2, 4, 64, 4, torch.device("cpu"))
    workspace.partial.fill_(math.nan)
    workspace.lse.fill_(math.nan)
    for seed in range(2):
        queries = randn(2, 4, 64, seed=seed)
        found = triton_decode.paged_decode_attention(queries, batch, splits=4, workspace=workspace)
        assert_decodes(found, queries, batch)
    one = paged.PagedBatch(cache=batch.cache, blocks_BM=batch.blocks_BM[:1], lengths_B=batch.lengths_B[:1])
    assert_decodes(
        triton_decode.paged_decode_attention(queries[:1], one, splits=8, workspace=workspace), queries[:1], one
    )
    assert not workspace.arrived.any()


@pytest.mark.parametrize("splits", [1, 4])
def test_a_row_of_no_length_gives_zeros_and_reads_nothing(splits):
    batch = make_batch((0, 70, 0), heads=1)
    queries = randn(3, 4, 64)
    out, lse = triton_decode.paged_decode_attention(queries, batch, splits=splits)
    twin, twin_lse = paged.decode_attention_twin(queries, batch)
    assert not out[[0, 2]].any()
    assert lse[[0, 2]].eq(-math.inf).all()
    torch.testing.assert_close(out, twin)
    torch.testing.assert_close(lse, twin_lse)


@pytest.mark.parametrize("on_triton", [True, False])
@pytest.mark.parametrize("splits", [1, 4])
def test_the_ring_gets_the_lse_of_watched_rows_only(on_triton, splits, monkeypatch):
    monkeypatch.setattr(paged, "use_triton", lambda tensor, family: on_triton)
    batch = make_batch((300, 20, 0, 9), heads=1)
    ring = torch.full((5, 4), 77.0)
    places = torch.tensor([3, -1, 0, 1], dtype=torch.int32)
    out, lse = torch.empty(4, 4, 64), torch.empty(4, 4)
    found = paged.paged_decode_attention(
        randn(4, 4, 64), batch, out=out, lse=lse, splits=splits, ring_lse=ring, ring_index_B=places
    )
    assert found[0] is out
    assert found[1] is lse
    assert ring[[2, 4]].eq(77).all()
    assert torch.equal(ring[[3, 0, 1]], lse[[0, 2, 3]])


def test_splits_fill_the_processors_and_stay_a_power_of_two():
    assert [paged.decode_splits(rows, 8, 132) for rows in (1, 4, 8, 16, 32, 48, 64, 1000)] == [16, 16, 8, 4, 2, 1, 1, 1]


def test_no_rows_are_no_launch():
    batch = make_batch((3,), heads=1)
    none = paged.PagedBatch(cache=batch.cache, blocks_BM=batch.blocks_BM[:0], lengths_B=batch.lengths_B[:0])
    out, lse = triton_decode.paged_decode_attention(torch.empty(0, 4, 64), none)
    assert out.shape == (0, 4, 64)
    assert lse.shape == (0, 4)


@pytest.mark.parametrize(("dim", "group"), SHAPES)
@pytest.mark.parametrize("implementation", [triton_paged.score_paged, paged.score_twin])
def test_scored_mass_equals_dense_column_sums_over_ragged_lengths(implementation, dim, group):
    batch = make_batch(LENGTHS, dim=dim)
    queries, positions = make_queries(batch, group, counts=(1, 3, 0, 11, 5))
    weights = torch.linspace(0.5, 1, len(queries.positions_R))
    mass = implementation(queries, paged.lse_twin(queries, batch, positions), weights, batch, positions)
    expected = dense_mass(queries, weights, batch, positions)
    torch.testing.assert_close(mass.double(), expected, rtol=1e-5, atol=1e-6)
    for index, length in enumerate(LENGTHS):
        assert not mass[index, :, length:].any()


def test_mass_of_a_step_is_the_group_size_per_query_and_kv_head():
    batch = make_batch(LENGTHS)
    queries, positions = make_queries(batch, 4, counts=(1, 2, 3, 4, 5))
    ones = torch.ones(15)
    mass = paged.score_twin(queries, paged.lse_twin(queries, batch, positions), ones, batch, positions)
    expected = torch.tensor([1.0, 2, 3, 4, 5])[:, None].expand(5, 2) * 4
    torch.testing.assert_close(mass.sum(-1), expected, rtol=1e-5, atol=1e-5)


def test_scores_ignore_the_order_of_query_heads_inside_a_group_only():
    batch = make_batch(LENGTHS)
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
    batch = make_batch(LENGTHS)
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
    batch = make_batch(LENGTHS, dim=48)
    moves = torch.tensor([[3, 0, 64, 2], [3, 1, 60, 63 - 8], [4, 0, 89, 0], [1, 1, 6, 5]], dtype=torch.int32)
    expected = batch.cache.clone()
    for sequence, head, source, target in moves.tolist():
        at_source = int(batch.blocks_BM[sequence, source // BLOCK])
        at_target = int(batch.blocks_BM[sequence, target // BLOCK])
        expected[at_target, :, head, target % BLOCK] = batch.cache[at_source, :, head, source % BLOCK]
    implementation(batch.cache, batch.blocks_BM, moves)
    torch.testing.assert_close(batch.cache, expected, rtol=0, atol=0, equal_nan=True)


def test_compaction_without_moves_changes_nothing():
    batch = make_batch(LENGTHS, dim=48)
    before = batch.cache.clone()
    for implementation in (triton_paged.compact_paged, paged.compact_twin):
        implementation(batch.cache, batch.blocks_BM, torch.zeros(0, 4, dtype=torch.int32))
    torch.testing.assert_close(batch.cache, before, rtol=0, atol=0, equal_nan=True)


def test_tuning_runs_once_on_long_sequences_whatever_the_launch_has(monkeypatch):
    batch = make_batch((0, 0), heads=1)
    batch.cache[:] = torch.randn(batch.cache.shape)
    launches = []

    class Launches:
        def __getitem__(self, grid):
            return lambda queries, cache, tables, lengths, *rest, **constants: launches.append((tables, lengths))

    monkeypatch.setattr(triton_decode, "_tunes", lambda device: True)
    monkeypatch.setattr(triton_decode, "_decode", Launches())
    triton_decode._tuned.cache_clear()
    for _ in range(2):
        triton_decode.paged_decode_attention(randn(2, 4, 64), batch)
    triton_decode._tuned.cache_clear()
    assert [lengths.tolist() for _, lengths in launches] == [[2048, 2048], [0, 0], [0, 0]]
    tables = launches[0][0]
    assert tables.shape == (2, 2048 // BLOCK)
    assert 0 <= int(tables.min()) <= int(tables.max()) < len(batch.cache)
