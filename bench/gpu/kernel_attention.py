"""Attention over the paged cache, and one round of eviction: score, rank, compact."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.kernel_bench import MAIN, Bench, Case, Other, Pairs, Work, num_bytes
from trtkit.kernels import paged, ranking
from trtkit.kernels.paged_batch import MAX_SPLITS

BOUNDS = {"fp16": 0.003, "fp8": 0.003, "bf16": 0.01}
"""By the type of the cache: probabilities and outputs are rounded to the queries' 16 bits."""
SCORE_BOUND = 0.003
_CACHE_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
_MOST_COPIES = 96
_SINKS = 4


def decode(bench: Bench, kind: str, rows: int, context: int) -> None:
    """One query a sequence, all sequences of one length, blocks scattered over the pool."""
    session, scale = bench.session, bench.scale
    per_copy = rows * context * 2 * scale.kv_heads * scale.dim * _CACHE_TYPES[kind].itemsize
    copies = session.copies(per_copy, most=_MOST_COPIES)
    pools = batches(bench, kind, copies, [context] * rows)
    queries = session.randn(rows, scale.heads, scale.dim, dtype=_compute(kind))
    out, lse = torch.empty_like(queries), torch.empty(rows, scale.heads, device=session.device)
    scratch = workspace(bench, rows)

    def call(index: int) -> None:
        batch = pools[index % copies]
        paged.paged_decode_attention(queries, batch, out=out, lse=lse, workspace=scratch)

    def check() -> Pairs:
        call(0)
        expected, normal = zip(
            *(dense_attention(queries[row : row + 1], pools[0], row, context - 1) for row in range(rows)), strict=True
        )
        return [(out, torch.cat(expected)), (lse, torch.cat(normal))]

    contiguous = _contiguous(pools[: min(copies, 8)], [context] * rows, queries.dtype)

    def torchs(index: int) -> Tensor:
        keys, values = contiguous[index % len(contiguous)]
        return F.scaled_dot_product_attention(queries[:, :, None], keys, values, enable_gqa=True)

    bench.measure(
        Case(
            family="paged", name=f"decode attention, {kind} cache", dtype=kind,
            shape={"B": rows, "N": context, "Hq": scale.heads, "H": scale.kv_heads, "D": scale.dim},
            call=call, check=check, copies=copies, bound=BOUNDS[kind],
            work=Work(
                bytes_moved=per_copy + num_bytes(queries, out, lse),
                flops=4.0 * rows * scale.heads * scale.dim * context,
            ),
            other=Other(name="SDPA over contiguous 16 bits", call=torchs),
        )
    )  # fmt: skip


def prefill(bench: Bench, kind: str, count: int, cached: int) -> None:
    """A prompt's chunk of `count` tokens after `cached` ones."""
    session, scale = bench.session, bench.scale
    length = cached + count
    batch = batches(bench, kind, 1, [length])[0]
    queries = session.randn(count, scale.heads, scale.dim, dtype=_compute(kind))
    starts = torch.tensor([0, count], dtype=torch.int32, device=session.device)
    before = torch.tensor([cached], dtype=torch.int32, device=session.device)
    out, lse = torch.empty_like(queries), torch.empty(count, scale.heads, device=session.device)

    def call(_: int) -> None:
        paged.paged_prefill_attention(queries, starts, before, batch, max_count=count, out=out, lse=lse)

    def check() -> Pairs:
        call(0)
        expected, normal = dense_attention(queries, batch, 0, cached)
        return [(out, expected), (lse, normal)]

    keys, values = _contiguous([batch], [length], queries.dtype)[0]
    pairs = count * cached + count * (count + 1) / 2
    bench.measure(
        Case(
            family="paged", name=f"prefill attention, {kind} cache", dtype=kind,
            shape={"R": count, "N": length, "Hq": scale.heads, "H": scale.kv_heads, "D": scale.dim},
            call=call, check=check, bound=BOUNDS[kind],
            work=Work(
                bytes_moved=length * 2 * scale.kv_heads * scale.dim * _CACHE_TYPES[kind].itemsize
                + num_bytes(queries, out, lse),
                flops=4.0 * scale.heads * scale.dim * pairs,
            ),
            other=_causal(queries, keys, values, cached),
        )
    )  # fmt: skip


def score(bench: Bench) -> None:
    """The mass that one sequence's keys received from a ring of queries, all layers in one call."""
    session, scale = bench.session, bench.scale
    length, asked = scale.budget + scale.interval, scale.interval
    storage, table = _storage(bench, length)
    queries = session.randn(scale.layers, asked, scale.heads, scale.dim, dtype=MAIN)
    positions = torch.arange(length, device=session.device, dtype=torch.int32).expand(scale.layers, scale.kv_heads, -1)
    positions = positions.contiguous()
    query_positions = torch.arange(length - asked, length, device=session.device, dtype=torch.int32)
    weights = torch.ones(asked, device=session.device)
    keys = _gathered_keys(storage, table, length)
    expected, lse = _dense_mass(queries, keys, asked)
    out = torch.empty(scale.layers, scale.kv_heads, length, device=session.device)

    def call(_: int) -> None:
        paged.score_layers(queries, lse, weights, storage, table, length, positions, query_positions, out=out)

    def check() -> Pairs:
        call(0)
        return [(out, expected)]

    grouped = queries.view(scale.layers, asked, scale.kv_heads, -1, scale.dim).permute(0, 2, 1, 3, 4)
    grouped = grouped.flatten(2, 3).flatten(0, 1).contiguous()
    normal = lse.view(scale.layers, asked, scale.kv_heads, -1).permute(0, 2, 1, 3).flatten(2, 3).flatten(0, 1)
    flat_keys = keys.flatten(0, 1)

    def torchs(_: int) -> Tensor:
        logits = torch.bmm(grouped, flat_keys.transpose(1, 2)).float().mul_(scale.dim**-0.5)
        return logits.sub_(normal[:, :, None]).exp_().sum(1)

    bench.measure(
        Case(
            family="paged", name="score of one round, all layers", dtype="fp16",
            shape={"L": scale.layers, "R": asked, "N": length, "Hq": scale.heads, "D": scale.dim},
            call=call, check=check, bound=SCORE_BOUND,
            work=Work(
                bytes_moved=num_bytes(keys, queries, lse, positions, out),
                flops=2.0 * scale.layers * asked * scale.heads * scale.dim * length,
            ),
            other=Other(name="bmm, exp, sum over gathered keys, no causal mask", call=torchs),
        )
    )  # fmt: skip


def rank(bench: Bench, length: int) -> None:
    """Which of `length` slots stay, every layer and KV head of one sequence."""
    session, scale = bench.session, bench.scale
    rows = scale.layers * scale.kv_heads
    scores = session.randn(rows, length).exp_()
    positions = torch.arange(length, device=session.device, dtype=torch.int32).repeat(rows, 1)
    tokens, recent = scale.budget, scale.budget // 2

    def call(_: int) -> Tensor:
        return ranking.keep_best(scores, positions, length, tokens=tokens, sinks=_SINKS, recent=recent)

    def torchs(_: int) -> Tensor:
        return ranking.keep_best_twin(scores, positions, length, tokens=tokens, sinks=_SINKS, recent=recent)

    bench.measure(
        Case(
            family="ranking", name="ranking of one round", dtype="fp32",
            shape={"rows": rows, "N": length, "kept": tokens},
            call=call, check=lambda: [(call(0), torchs(0))], bound=0.0, reference="torch's sort, exact",
            work=Work(bytes_moved=num_bytes(scores, positions) + 8 * rows * tokens),
            other=Other(name="two sorts", call=torchs),
        )
    )  # fmt: skip


def compact(bench: Bench) -> None:
    """Moving what stays to the front after one round, all layers in one call."""
    session, scale = bench.session, bench.scale
    length, kept = scale.budget + scale.interval, scale.budget
    storage, table = _storage(bench, length)
    rows = scale.layers * scale.kv_heads
    order = session.randn(rows, length).argsort(dim=1)
    keep = order[:, :kept].sort(dim=1).values
    mass = session.randn(scale.layers, scale.kv_heads, length)
    positions = torch.arange(length, device=session.device, dtype=torch.int32).repeat(scale.layers, scale.kv_heads, 1)
    moves = int((keep >= kept).sum())

    def call(_: int) -> None:
        paged.compact_layers(storage, table, keep, length, mass, positions)

    def check() -> Pairs:
        twin = [tensor.clone() for tensor in (storage, mass, positions)]
        paged.compact_layers_twin(twin[0], table, keep, length, twin[1], twin[2])
        call(0)
        live = [(ours[:, :, :kept], theirs[:, :, :kept]) for ours, theirs in ((mass, twin[1]), (positions, twin[2]))]
        return [(storage, twin[0]), *live]

    flat = _gathered_keys(storage, table, length)
    index = keep.view(scale.layers, scale.kv_heads, kept, 1).expand(-1, -1, -1, scale.dim)
    per_move = 2 * (2 * scale.dim * storage.element_size() + 8)
    bench.measure(
        Case(
            family="paged", name="compaction of one round, all layers", dtype="fp16",
            shape={"L": scale.layers, "N": length, "kept": kept, "moves": moves},
            call=call, check=check, bound=0.0, reference="torch twin, exact",
            work=Work(bytes_moved=num_bytes(keep) + moves * per_move),
            other=Other(name="gather of all kept keys and values", call=lambda _: (flat.gather(2, index),) * 2),
            note="torch's way timed for keys alone: twice that is fair",
        )
    )  # fmt: skip


def _compute(kind: str) -> torch.dtype:
    """What queries are in beside a cache of `kind`."""
    return torch.bfloat16 if kind == "bf16" else MAIN


def workspace(bench: Bench, rows: int) -> paged.DecodeWorkspace:
    """Scratch of decode attention for so many sequences, kept between calls as the engine keeps it."""
    scale = bench.scale
    return paged.DecodeWorkspace.empty(rows, scale.heads, scale.dim, MAX_SPLITS, bench.session.device)


def batches(bench: Bench, kind: str, copies: int, lengths: list[int]) -> list[paged.PagedBatch]:
    """Sequences of `lengths`, `copies` times, in one shuffled pool."""
    session, scale = bench.session, bench.scale
    columns = math.ceil(max(lengths) / scale.block)
    count = copies * len(lengths) * columns
    cache = session.randn(count, 2, scale.kv_heads, scale.block, scale.dim, dtype=_CACHE_TYPES[kind])
    tables = torch.randperm(count, device=session.device, generator=session.generator).to(torch.int32)
    live = torch.tensor(lengths, dtype=torch.int32, device=session.device)
    shaped = tables.view(copies, len(lengths), columns)
    return [paged.PagedBatch(cache=cache, blocks_BM=shaped[i].contiguous(), lengths_B=live) for i in range(copies)]


def _gathered(batch: paged.PagedBatch, row: int, length: int) -> Tensor:
    """Keys and values of one sequence in slot order, [2, H, N, D], without asking the device for its length."""
    blocks = batch.blocks_BM[row].to(torch.int64)
    cache = batch.cache
    # torch cannot index 8-bit floats everywhere; bytes it can.
    raw = cache.view(torch.uint8) if cache.element_size() == 1 else cache
    found = raw[blocks].view(cache.dtype)
    return found.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]


def _contiguous(batches: list[paged.PagedBatch], lengths: list[int], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """The same keys and values as torch wants them, [B, H, N, D] in `dtype`."""
    found = []
    for batch in batches:
        rows = [_gathered(batch, row, length).to(dtype) for row, length in enumerate(lengths)]
        both = torch.stack(rows, dim=1)
        found.append((both[0].contiguous(), both[1].contiguous()))
    return found


def dense_attention(queries: Tensor, batch: paged.PagedBatch, row: int, cached: int) -> tuple[Tensor, Tensor]:
    """Attention in float64, a head at a time; query i sees `cached + i + 1` slots. Output [R, Hq, D] and lse [R, Hq]."""
    count, heads, dim = queries.shape
    keys, values = _gathered(batch, row, cached + count).float().double()
    group = heads // keys.shape[0]
    hidden = torch.ones(count, cached + count, dtype=torch.bool, device=queries.device).triu(cached + 1)
    out = torch.empty(count, heads, dim, dtype=torch.float64, device=queries.device)
    lse = torch.empty(count, heads, dtype=torch.float64, device=queries.device)
    for head in range(heads):
        logits = queries[:, head].double() @ keys[head // group].T * dim**-0.5
        logits.masked_fill_(hidden, -math.inf)
        lse[:, head] = logits.logsumexp(1)
        out[:, head] = logits.softmax(1) @ values[head // group]
    return out, lse


def _causal(queries: Tensor, keys: Tensor, values: Tensor, cached: int) -> Other:
    rows = queries.transpose(0, 1)[None].contiguous()
    if cached == 0:
        return Other(
            name="SDPA, causal, over contiguous 16 bits",
            call=lambda _: F.scaled_dot_product_attention(rows, keys, values, is_causal=True, enable_gqa=True),
        )
    from torch.nn.attention.bias import causal_lower_right

    group = rows.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    bias = causal_lower_right(rows.shape[2], keys.shape[2])
    return Other(
        name="SDPA, causal_lower_right, heads repeated beforehand",
        call=lambda _: F.scaled_dot_product_attention(rows, keys, values, attn_mask=bias),
    )


def _storage(bench: Bench, length: int) -> tuple[Tensor, Tensor]:
    """All layers' caches with room for one sequence, and its shuffled table."""
    session, scale = bench.session, bench.scale
    columns = math.ceil(length / scale.block)
    storage = session.randn(scale.layers, columns + 1, 2, scale.kv_heads, scale.block, scale.dim, dtype=MAIN)
    table = torch.randperm(columns + 1, device=session.device, generator=session.generator)[:columns]
    return storage, table.to(torch.int32)


def _gathered_keys(storage: Tensor, table: Tensor, length: int) -> Tensor:
    """[L, H, N, D]."""
    return storage[:, table.to(torch.int64), 0].transpose(1, 2).flatten(2, 3)[:, :, :length].contiguous()


def _dense_mass(queries: Tensor, keys: Tensor, asked: int) -> tuple[Tensor, Tensor]:
    """Column sums of the causal softmax in float64 [L, H, N], and the log-sum-exps in float32 [L, R, Hq]."""
    layers, heads, length, dim = keys.shape
    mass = torch.empty(layers, heads, length, dtype=torch.float64, device=keys.device)
    lse = torch.empty(layers, asked, queries.shape[2], dtype=torch.float32, device=keys.device)
    hidden = torch.ones(asked, length, dtype=torch.bool, device=keys.device).triu(length - asked + 1)
    for layer in range(layers):
        grouped = queries[layer].view(asked, heads, -1, dim).permute(1, 2, 0, 3).double()
        logits = grouped @ keys[layer].double()[:, None].transpose(2, 3) * dim**-0.5
        logits.masked_fill_(hidden, -math.inf)
        lse[layer] = logits.logsumexp(3).flatten(0, 1).T.float()
        mass[layer] = logits.softmax(3).sum((1, 2))
    return mass, lse
