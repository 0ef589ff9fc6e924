"""Scores and compaction over all layers: the kernels in Triton's interpreter, and their twins, against plain loops.

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

from support.paged_caches import FP8, dense_mass, make_layers

from trtkit.kernels import triton_compact, triton_score
from trtkit.kv.moves import plan_moves

SCORES = [triton_score.score_layers, paged.score_layers_twin]
COMPACTIONS = [triton_compact.compact_layers, paged.compact_layers_twin]


def assert_mass(found, case, tolerance=1e-5):
    torch.testing.assert_close(found.double(), dense_mass(case), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("implementation", SCORES)
@pytest.mark.parametrize(
    ("length", "shape"),
    [(8, {"group": 1}), (9, {"group": 3, "dim": 96}), (130, {"group": 8, "heads": 1, "block": 32}),
     (129, {"block": 128, "heads": 1}), (20, {"block": 1, "count": 20})],
)  # fmt: skip
def test_mass_equals_dense_column_sums_in_every_layer(implementation, length, shape):
    case = make_layers(length, **shape)
    assert_mass(implementation(*case.arguments), case)


@pytest.mark.parametrize("implementation", SCORES)
@pytest.mark.parametrize(
    ("compute", "stored"), [(torch.bfloat16, torch.bfloat16), (torch.float16, FP8), (torch.float32, torch.float16)]
)
def test_every_type_of_cache_is_scored(implementation, compute, stored):
    case = make_layers(70, heads=1, layers=2, compute=compute, dtype=stored)
    assert_mass(implementation(*case.arguments), case, 1e-4)


@pytest.mark.parametrize("implementation", SCORES)
def test_more_queries_than_a_tile_are_all_counted(implementation):
    case = make_layers(75, layers=1, heads=1, group=4, count=75)
    assert_mass(implementation(*case.arguments), case)


@pytest.mark.parametrize("turned", [False, True])
def test_tiles_in_the_past_of_their_keys_are_skipped_and_nothing_else(turned, monkeypatch):
    """A prompt nothing was evicted from, slots in order; the last tile of keys is seen by the last queries alone."""
    monkeypatch.setattr(triton_score, "_SKIP_FROM", 1)
    case = make_layers(300, layers=1, heads=1, group=2, count=300, block=64)
    case.positions[:, :, :300] = torch.arange(300, dtype=torch.int32)
    queries, lse, weights, *middle, asked = case.arguments
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0)) if turned else torch.arange(300)
    found = triton_score.score_layers(queries[:, order], lse[:, order], weights[order], *middle, asked[order])
    assert_mass(found, case)
    if not turned:
        weights[:256] = torch.nan  # where such a query is looked at all the same, its nothing becomes NaN
        found = triton_score.score_layers(queries, lse, weights, *middle, asked)
        assert found[:, :, :256].isnan().all()
        assert not found[:, :, 256:].isnan().any()


@pytest.mark.parametrize("implementation", SCORES)
def test_the_order_of_the_queries_is_free(implementation):
    case = make_layers(40, layers=1)
    queries, lse, weights, *middle, asked = case.arguments
    order = torch.randperm(len(asked))
    turned = implementation(queries[:, order], lse[:, order], weights[order], *middle, asked[order])
    torch.testing.assert_close(turned, implementation(*case.arguments))


@pytest.mark.parametrize("implementation", SCORES)
def test_mass_is_added_to_a_ledger_that_has_decayed(implementation):
    case = make_layers(23)
    ledger = case.mass.clone()
    live = ledger[:, :, : case.length]
    found = implementation(*case.arguments, out=live, carry=0.25)
    assert found is live
    expected = 0.25 * case.mass[:, :, : case.length].double() + dense_mass(case)
    torch.testing.assert_close(live.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(ledger[:, :, case.length :], case.mass[:, :, case.length :])


@pytest.mark.parametrize("implementation", SCORES)
def test_without_carry_what_was_in_the_ledger_is_not_read(implementation):
    case = make_layers(23)
    live = torch.full_like(case.mass, torch.nan)[:, :, : case.length]
    assert_mass(implementation(*case.arguments, out=live), case)


@pytest.mark.parametrize("on_triton", [True, False])
def test_some_layers_are_scored_as_among_all(on_triton, monkeypatch):
    monkeypatch.setattr(paged, "use_triton", lambda tensor, family: on_triton)
    case = make_layers(30)
    whole = paged.score_layers(*case.arguments)
    queries, lse, weights, storage, table, length, positions, asked = case.arguments
    some = slice(1, 3)
    part = paged.score_layers(
        queries[some], lse[some], weights, storage, table, length, positions[some], asked, layers=some
    )
    assert torch.equal(part, whole[some])


def keep_of(case, kept, seed=0):
    """Random ascending slots for each layer and head."""
    generator = torch.Generator().manual_seed(seed)
    rows = case.storage.shape[0] * case.storage.shape[3]
    return torch.stack([torch.randperm(case.length, generator=generator)[:kept].sort().values for _ in range(rows)])


def compacted_by_hand(case, keep):
    """Storage, mass and positions after the moves that `trtkit.kv.moves` plans, made one by one."""
    storage, mass, positions = case.storage.clone(), case.mass.clone(), case.positions.clone()
    heads, block = storage.shape[3:5]
    moves = plan_moves(keep, case.length)
    for row, source, target in zip(moves.rows.tolist(), moves.sources.tolist(), moves.targets.tolist(), strict=True):
        layer, head = divmod(row, heads)
        from_block, to_block = case.table[source // block], case.table[target // block]
        storage[layer, to_block, :, head, target % block] = case.storage[layer, from_block, :, head, source % block]
        mass[layer, head, target] = case.mass[layer, head, source]
        positions[layer, head, target] = case.positions[layer, head, source]
    return storage, mass, positions


@pytest.mark.parametrize("implementation", COMPACTIONS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(("length", "kept"), [(21, 1), (21, 10), (21, 20), (90, 41), (33, 32), (8, 7)])
def test_compaction_makes_the_moves_that_are_planned_and_no_others(implementation, length, kept, index):
    case = make_layers(length, layers=2)
    keep = keep_of(case, kept)
    expected = compacted_by_hand(case, keep)
    implementation(case.storage, case.table, keep.to(index), length, case.mass, case.positions)
    found = (case.storage, case.mass, case.positions)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("implementation", COMPACTIONS)
@pytest.mark.parametrize(("dtype", "dim"), [(FP8, 96), (torch.bfloat16, 64)])
def test_bits_move_unchanged(implementation, dtype, dim):
    case = make_layers(40, layers=1, dim=dim, dtype=dtype)
    keep = keep_of(case, 17)
    bits = {FP8: torch.uint8, torch.bfloat16: torch.int16}[dtype]
    expected = compacted_by_hand(case, keep)[0].view(bits)
    implementation(case.storage, case.table, keep, 40, None, None)
    assert torch.equal(case.storage.view(bits), expected)


@pytest.mark.parametrize("implementation", COMPACTIONS)
def test_keeping_everything_moves_nothing(implementation):
    case = make_layers(12, layers=1)
    before = case.storage.clone()
    implementation(case.storage, case.table, keep_of(case, 12), 12, case.mass, case.positions)
    torch.testing.assert_close(case.storage, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("implementation", COMPACTIONS)
@pytest.mark.parametrize("broken", [[0, 1, 500, 501], [-9, -8, 14, 15], [15, 14, 13, 12], [15, 15, 15, 15]])
def test_a_broken_answer_touches_no_block_but_the_sequences_own(implementation, broken):
    case = make_layers(16, layers=1, heads=1)
    own = case.table[:2].long()
    others = [block for block in range(case.storage.shape[1]) if block not in own.tolist()]
    case.storage[:, others] = 5.0
    tail = case.positions[:, :, 16:].clone()
    implementation(case.storage, case.table, torch.tensor([broken]), 16, case.mass, case.positions)
    assert case.storage[:, others].eq(5).all()
    assert torch.equal(case.positions[:, :, 16:], tail)
    assert not case.storage[:, own].isnan().any()


@pytest.mark.parametrize("on_triton", [True, False])
def test_one_layer_is_compacted_alone(on_triton, monkeypatch):
    monkeypatch.setattr(paged, "use_triton", lambda tensor, family: on_triton)
    case = make_layers(21)
    keep = keep_of(case, 9)
    expected = compacted_by_hand(case, keep)
    paged.compact_layers(case.storage[1:2], case.table, keep[2:4], 21, case.mass[1:2], case.positions[1:2])
    torch.testing.assert_close(case.storage[1], expected[0][1], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(case.positions[1], expected[2][1])
    assert not torch.equal(case.positions[2], expected[2][2])
