"""Checks of attention over the paged cache and of a round of eviction, against dense float64 attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from trtkit.kernels import paged, ranking, slots
from trtkit.kernels.selfcheck import Answers, Check, CheckShape, Draws

BOUNDS = {torch.float16: 5e-3, torch.bfloat16: 2e-2, torch.float32: 1e-4}
"""Probabilities and outputs are rounded to the type."""

_LAYERS = 2
_LENGTHS = (1, 31, 0, 300, 1111)
_EVICTED = 96


def checks(device: torch.device, shape: CheckShape) -> Iterator[Check]:
    """Decode, prefill, scores, compaction and ranking."""
    bound = BOUNDS[shape.dtype]
    yield Check(family="decode", name="decode attention", bound=bound, run=partial(decode, device, shape))
    yield Check(family="prefill", name="prefill attention", bound=bound, run=partial(prefill, device, shape))
    yield Check(family="score", name="scores of all layers", bound=bound, run=partial(scores, device, shape))
    yield Check(family="compact", name="compaction", bound=0.0, run=partial(compaction, device, shape))
    yield Check(family="ranking", name="keeping the best", bound=0.0, run=partial(_ranking, device, shape))
    yield Check(family="ranking", name="bad slots are flagged", bound=0.0, run=partial(_flags, device))


def decode(
    device: torch.device, shape: CheckShape, lengths: tuple[int, ...] = _LENGTHS, *, others: tuple[int, ...] = (1, 4)
) -> Answers:
    """Decode attention over five sequences, and again in `others` parts each."""
    draws = Draws(device)
    storage, tables = _cache(draws, shape, lengths)
    live = torch.tensor(lengths, dtype=torch.int32, device=device)
    batch = paged.PagedBatch(cache=storage[1], blocks_BM=tables, lengths_B=live)
    queries = draws.normal(len(lengths), shape.num_heads, shape.head_dim, dtype=shape.dtype)
    ring = torch.full((8, shape.num_heads), torch.nan, device=device)
    places = torch.tensor([3, -1, 0, 7, 5], dtype=torch.int32, device=device)
    out, lse = paged.paged_decode_attention(queries, batch, ring_lse=ring, ring_index_B=places)
    for row, length in enumerate(lengths):
        expected, normal = dense(queries[row : row + 1], batch, row, length - 1)
        yield out[row : row + 1], expected
        yield lse[row : row + 1], normal
    for row in (0, 3, 4):
        yield ring[int(places[row])], lse[row]
    for splits in others:
        yield paged.paged_decode_attention(queries, batch, splits=splits)[0], out.double()


def prefill(device: torch.device, shape: CheckShape) -> Answers:
    """Pieces of three prompts, one of which begins."""
    draws = Draws(device)
    cached, counts = (0, 300, 77), (130, 37, 1)
    lengths = tuple(before + new for before, new in zip(cached, counts, strict=True))
    storage, tables = _cache(draws, shape, lengths)
    batch = paged.PagedBatch(
        cache=storage[0], blocks_BM=tables, lengths_B=torch.tensor(lengths, dtype=torch.int32, device=device)
    )
    starts = torch.tensor([0, *counts], device=device).cumsum(0).to(torch.int32)
    queries = draws.normal(sum(counts), shape.num_heads, shape.head_dim, dtype=shape.dtype)
    before = torch.tensor(cached, dtype=torch.int32, device=device)
    out, lse = paged.paged_prefill_attention(queries, starts, before, batch, max_count=max(counts))
    first = 0
    for row, count in enumerate(counts):
        rows = slice(first, first + count)
        expected, normal = dense(queries[rows], batch, row, cached[row])
        yield out[rows], expected
        yield lse[rows], normal
        first += count


def scores(device: torch.device, shape: CheckShape) -> Answers:
    """What the last queries give to the keys of all layers, set and added up."""
    draws, length, asked = Draws(device), 333, 64
    storage, tables = _cache(draws, shape, (length,))
    queries = draws.normal(_LAYERS, asked, shape.num_heads, shape.head_dim, dtype=shape.dtype)
    positions = torch.stack(
        [draws.order(length) for _ in range(_LAYERS * shape.num_kv_heads)]
    ).view(_LAYERS, shape.num_kv_heads, length)  # fmt: skip
    times = torch.arange(length - asked, length, dtype=torch.int32, device=device)
    weights = draws.uniform(asked) + 0.5
    lengths = torch.tensor([length], dtype=torch.int32, device=device)
    normal = torch.empty(_LAYERS, asked, shape.num_heads, device=device)
    expected = torch.zeros(_LAYERS, shape.num_kv_heads, length, dtype=torch.float64, device=device)
    for layer in range(_LAYERS):
        batch = paged.PagedBatch(cache=storage[layer], blocks_BM=tables, lengths_B=lengths)
        logits = _logits(queries[layer], _gathered(batch, 0)[0])
        logits.masked_fill_((positions[layer][:, None, :] > times[None, :, None])[:, None], -math.inf)
        normal[layer] = torch.logsumexp(logits, -1).flatten(0, 1).T
        expected[layer] = torch.einsum("hgtn,t->hn", torch.softmax(logits, -1), weights.double())
    found = paged.score_layers(queries, normal, weights, storage, tables[0], length, positions, times)
    yield found, expected
    halves = paged.score_layers(
        queries, normal, weights, storage, tables[0], length, positions, times, out=found.clone(), carry=0.5
    )
    yield halves, 1.5 * expected


def compaction(device: torch.device, shape: CheckShape) -> Answers:
    """Moves, bit for bit, of keys, values and ledgers."""
    draws, length = Draws(device), 433
    kept, heads = length - _EVICTED, shape.num_kv_heads
    storage, tables = _cache(draws, shape, (length,))
    keep = torch.stack([draws.order(length)[:kept].sort().values for _ in range(_LAYERS * heads)])
    ledgers = draws.normal(_LAYERS, heads, length), draws.integers(0, 9999, _LAYERS, heads, length)
    bits = storage.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[storage.element_size()]).clone()
    expected = tuple(ledger.clone() for ledger in ledgers)
    paged.compact_layers_twin(bits, tables[0], keep, length, *expected)
    paged.compact_layers(storage, tables[0], keep, length, *ledgers)
    live = torch.tensor([kept], dtype=torch.int32, device=device)
    for layer in range(_LAYERS):
        pair = [
            paged.gather_sequence(paged.PagedBatch(cache=cache, blocks_BM=tables, lengths_B=live), 0)
            for cache in (storage.view(bits.dtype)[layer], bits[layer])
        ]
        yield pair[0], pair[1]
    for ledger, right in zip(ledgers, expected, strict=True):
        yield ledger[..., :kept], right[..., :kept]


def _ranking(device: torch.device, shape: CheckShape) -> Answers:
    draws, rows = Draws(device), 4 * shape.num_kv_heads
    for length, tokens in ((64, 48), (2080, 2048), (1500, 700)):
        scores = draws.normal(rows, length).abs()
        scores[:, ::5] = 0.25
        scores[0, :9] = torch.nan
        positions = torch.stack([draws.order(length) for _ in range(rows)])
        keywords = {"tokens": tokens, "sinks": 4, "recent": 9}
        found = ranking.keep_best(scores, positions, length, **keywords)
        yield found, ranking.keep_best_twin(scores, positions, length, **keywords)


def _flags(device: torch.device) -> Answers:
    good = torch.arange(40, dtype=torch.int32, device=device).repeat(6, 1)
    for change, right in ((None, 0), ((2, 7, 6), 1), ((5, 39, 64), 1), ((0, 0, -1), 1)):
        keep, flag = good.clone(), torch.zeros(1, dtype=torch.int32, device=device)
        if change is not None:
            keep[change[0], change[1]] = change[2]
        slots.flag_bad_slots(keep, 64, flag)
        yield flag, torch.tensor([right], device=device)


def _cache(draws: Draws, shape: CheckShape, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Storage of a few layers and block tables that scatter the sequences over it."""
    size = shape.tokens_per_block
    columns = max(-(-length // size) for length in lengths)
    order = draws.order(len(lengths) * columns + 2)
    tables = order[: len(lengths) * columns].view(len(lengths), columns).contiguous()
    drawn = draws.normal(_LAYERS, len(order), 2, shape.num_kv_heads, size, shape.head_dim)
    return drawn.to(shape.kv_dtype), tables


def _gathered(batch: paged.PagedBatch, row: int) -> Tensor:
    """Keys and values of one sequence in float64, [2, H, N, D]."""
    length, size = int(batch.lengths_B[row]), batch.tokens_per_block
    blocks = batch.blocks_BM[row, : -(-length // size)].tolist()
    if not blocks:
        _, _, heads, _, dim = batch.cache.shape
        return torch.zeros(2, heads, 0, dim, dtype=torch.float64, device=batch.cache.device)
    whole = torch.cat([batch.cache[block].to(torch.float32) for block in blocks], dim=2)
    return whole[:, :, :length].to(torch.float64)


def _logits(queries_THD: Tensor, keys_HND: Tensor) -> Tensor:
    """float64 [H, G, T, N]."""
    count, _, dim = queries_THD.shape
    grouped = queries_THD.double().reshape(count, keys_HND.shape[0], -1, dim).permute(1, 2, 0, 3)
    return grouped @ keys_HND[:, None].transpose(-1, -2) / math.sqrt(dim)


def dense(queries_THD: Tensor, batch: paged.PagedBatch, row: int, cached: int) -> tuple[Tensor, Tensor]:
    """Attention of consecutive queries over one sequence in float64: output [T, Hq, D], log-sum-exp [T, Hq]."""
    keys, values = _gathered(batch, row)
    logits = _logits(queries_THD, keys)
    last = cached + torch.arange(len(queries_THD), device=keys.device)
    logits.masked_fill_(torch.arange(keys.shape[1], device=keys.device) > last[:, None], -math.inf)
    normal = torch.logsumexp(logits, -1).flatten(0, 1).T
    out = (torch.softmax(logits, -1) @ values[:, None]).flatten(0, 1).transpose(0, 1)
    return out, normal
