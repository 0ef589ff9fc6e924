"""Kernels on shapes and values that no engine of ours has yet, in Triton's interpreter, against plain float64.

Slots past a length hold NaN, and table columns past the last block point nowhere, so a kernel that reads either fails.
The interpreter is chosen when triton is imported; `test_kernel_interpreter.py` runs this file where that is too late.
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
from support.paged_caches import FP8, dense_decode, dense_mass, dense_prefill, make_batch, make_layers, randn

from trtkit.kernels import paged, triton_compact, triton_decode, triton_prefill, triton_score

DIMS = (8, 64, 72, 80, 96, 100, 112, 128, 256)
GROUPS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 71)
BLOCKS = (1, 8, 16, 24, 32, 64, 128)
TYPES = (
    (torch.float32, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16),
    (torch.float16, FP8), (torch.bfloat16, FP8), (torch.float32, torch.bfloat16),
)  # fmt: skip
BOUNDS = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Beside numbers of about one: probabilities and results are rounded to the type."""


@pytest.fixture(autouse=True)
def _round_as_gpus_do(monkeypatch):
    round_bfloat16_to_nearest(monkeypatch)


class Case:
    """Shapes and types drawn by number; all that the number decides is the same on every machine."""

    def __init__(self, seed: int) -> None:
        self.seed, self._numbers = seed, np.random.default_rng(seed)
        self.compute, self.stored = TYPES[seed % len(TYPES)]
        self.dim, self.group = self.draw(DIMS), GROUPS[seed % len(GROUPS)]
        self.block, self.heads = self.draw(BLOCKS), self.draw((1, 2, 3))
        self.shape = {"dim": self.dim, "heads": self.heads, "block": self.block, "dtype": self.stored}

    def draw(self, among):
        """One of a few."""
        return among[int(self._numbers.integers(len(among)))]

    def lengths(self, count: int) -> tuple[int, ...]:
        edges = [0, 1, max(1, self.block - 1), self.block, self.block + 1, 62, 62, 63, 64, 129]
        return tuple(self.draw([*edges, int(self._numbers.integers(2, 300))]) for _ in range(count))

    def sliced(self, rows: int) -> torch.Tensor:
        """Queries as a slice of a fused projection that begins nowhere in particular."""
        wide = randn(1 + rows * (self.heads * self.group + 3) * self.dim, dtype=self.compute, seed=self.seed)
        return wide[1:].view(rows, -1, self.dim)[:, 2 : 2 + self.heads * self.group]

    def near(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        bound = BOUNDS[self.compute]
        torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound, msg=lambda text: f"{self}: {text}")

    def __str__(self) -> str:
        return f"{self.compute} over {self.shape}, {self.group} query heads per KV head"


@pytest.mark.parametrize("seed", range(24))
def test_decode_attention_at_odd_shapes(seed):
    case = Case(seed)
    lengths = case.lengths(3)
    batch = make_batch((*lengths, 0), **case.shape)
    queries = case.sliced(4)
    splits = case.draw((None, 1, 2, 3, 5, 7, 16))
    out, lse = triton_decode.paged_decode_attention(queries, batch, splits=splits)
    expected, normal = dense_decode(queries, batch)
    case.near(out, expected)
    torch.testing.assert_close(lse.double(), normal, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(24))
def test_prefill_attention_at_odd_shapes(seed):
    case = Case(seed)
    counts = [case.draw((0, 1, 2, 17, 33)) for _ in range(2)] + [1]
    cached = case.lengths(3)
    batch = make_batch([old + new for old, new in zip(cached, counts, strict=True)], **case.shape)
    starts, before = torch.tensor([0, *counts]).cumsum(0).int(), torch.tensor(cached, dtype=torch.int32)
    queries = case.sliced(sum(counts))
    out, lse = triton_prefill.paged_prefill_attention(queries, starts, before, batch, max_count=max(counts))
    expected, normal = dense_prefill(queries, starts, before, batch)
    case.near(out, expected)
    torch.testing.assert_close(lse.double(), normal, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(16))
def test_scores_at_odd_shapes(seed):
    case = Case(seed)
    length, count = case.draw((1, case.block, case.block + 1, 130)), case.draw((1, 5, 140))
    layers = make_layers(
        max(length, count), layers=2, heads=case.heads, group=case.group, dim=case.dim, block=case.block, count=count,
        dtype=case.stored, compute=case.compute,
    )  # fmt: skip
    layers.weights[0] = 0
    found = triton_score.score_layers(*layers.arguments)
    expected = dense_mass(layers)
    bound = BOUNDS[case.compute] * float(expected.max())
    torch.testing.assert_close(found.double(), expected, rtol=BOUNDS[case.compute], atol=bound, msg=str(case))


@pytest.mark.parametrize("in_order", [True, False])
def test_scores_of_a_prompt_that_nothing_was_evicted_from(in_order):
    """Tiles of keys then lie in the future of many queries, which are left out, whatever the order of the queries."""
    case = make_layers(300, layers=1, heads=1, group=3, dim=16, block=16, count=300)
    case.positions[:, :, :300] = torch.arange(300)
    if not in_order:
        case.asked.copy_(case.asked[torch.randperm(300, generator=torch.Generator().manual_seed(0))])
    expected = dense_mass(case)
    found = triton_score.score_layers(*case.arguments)
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("keep", [range(9), range(1, 10), range(12, 21), (), range(20), (0, *range(13, 21)), (20,)])
@pytest.mark.parametrize("stored", [torch.float32, FP8])
def test_compaction_where_all_or_nothing_moves(keep, stored):
    ours, twins = (make_layers(21, heads=3, dim=80, dtype=stored) for _ in range(2))
    kept = torch.tensor(list(keep), dtype=torch.int32).repeat(9, 1)
    triton_compact.compact_layers(ours.storage, ours.table, kept, 21, ours.mass, ours.positions)
    paged.compact_layers_twin(
        twins.storage.view(torch.uint8) if stored is FP8 else twins.storage, twins.table, kept, 21, twins.mass,
        twins.positions,
    )  # fmt: skip
    for found, expected in zip(live(ours, len(kept[0])), live(twins, len(kept[0])), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for head in range(3):
        slots = ours.positions[1, head, : len(kept[0])]
        fresh = make_layers(21, heads=3, dim=80, dtype=stored).positions[1, head]
        assert sorted(slots.tolist()) == sorted(fresh[kept[0].long()].tolist())


def live(case, kept):
    """Keys, values, mass and positions of the slots that stayed."""
    batch = [
        paged.PagedBatch(cache=layer, blocks_BM=case.table[None], lengths_B=torch.tensor([kept]))
        for layer in case.storage.float()
    ]
    return [*(paged.gather_sequence(one, 0) for one in batch), case.mass[..., :kept], case.positions[..., :kept]]


def test_a_nan_among_live_keys_is_not_lost():
    batch = make_batch((300, 70), heads=1)
    batch.cache[batch.blocks_BM[0, 20].long(), 0, 0, 3, 5] = math.nan
    queries = randn(2, 4, 64)
    for splits in (1, 4):
        out, lse = triton_decode.paged_decode_attention(queries, batch, splits=splits)
        assert out[0].isnan().all()
        assert lse[0].isnan().all()
        assert out[1].isfinite().all()


@pytest.mark.slow
def test_many_sequences_and_one_that_is_long():
    """More rows than SMs, and tiles enough in each of a sequence's parts."""
    lengths = [1, 9, 64, *([5] * 138)]
    batch = make_batch(lengths, heads=1)
    queries = randn(141, 3, 64)
    out, lse = triton_decode.paged_decode_attention(queries, batch)
    expected, normal = dense_decode(queries, batch)
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(lse.double(), normal, rtol=2e-5, atol=2e-5)
    batch = make_batch((32_768,), heads=1, dim=16, block=128)
    queries = randn(1, 2, 16)
    out, lse = triton_decode.paged_decode_attention(queries, batch)
    expected, normal = dense_decode(queries, batch)
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(lse.double(), normal, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_caches_of_more_elements_than_32_bits_count():
    """The sequence lies behind 2^31 elements; the memory before it is never touched."""
    size, dim = 64, 128
    blocks = (1 << 31) // (2 * size * dim) + 4
    cache = torch.empty(blocks, 2, 1, size, dim, dtype=torch.uint8).view(FP8)
    table = torch.tensor([[blocks - 1, blocks - 3]], dtype=torch.int32)
    drawn = randn(2, 2, 1, size, dim).to(FP8)
    for place in range(2):
        cache[int(table[0, place])] = drawn[place]
    batch = paged.PagedBatch(cache=cache, blocks_BM=table, lengths_B=torch.tensor([100], dtype=torch.int32))
    small = paged.PagedBatch(
        cache=drawn, blocks_BM=torch.tensor([[0, 1]], dtype=torch.int32), lengths_B=batch.lengths_B
    )
    queries = randn(1, 4, dim, dtype=torch.float16)
    assert torch.equal(
        triton_decode.paged_decode_attention(queries, batch, splits=1)[0],
        triton_decode.paged_decode_attention(queries, small, splits=1)[0],
    )
    keep = torch.arange(50, 100)[None]
    triton_compact.compact_layers(cache[None], table[0], keep, 100, None, None)
    triton_compact.compact_layers(drawn[None], small.blocks_BM[0], keep, 100, None, None)
    for place in range(2):
        assert torch.equal(cache[int(table[0, place])].view(torch.uint8), drawn[place].view(torch.uint8))


def test_scratch_that_is_too_small_is_refused_where_it_is_used():
    workspace = paged.DecodeWorkspace.empty(1, 6, 64, 4, torch.device("cpu"))
    with pytest.raises(ValueError, match="too small for 2 sequences in 4 parts of 6 heads of 64"):
        triton_decode.paged_decode_attention(randn(2, 6, 64), make_batch((9, 20)), splits=4, workspace=workspace)
