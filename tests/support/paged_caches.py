"""Paged caches with poison in every slot that is not live, and attention over them in plain float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trtkit.kernels import paged

FP8 = torch.float8_e4m3fn
NOWHERE = -(1 << 20)
"""In table columns that must not be read: following it leaves any cache."""


def make_batch(lengths, *, dim=64, heads=2, block=8, dtype=torch.float32, seed=0) -> paged.PagedBatch:
    """Sequences in shuffled blocks; slots past a length, and blocks of nobody, hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    need = [math.ceil(length / block) for length in lengths]
    order = torch.randperm(sum(need) + 3, generator=generator).tolist()
    cache = torch.full((len(order), 2, heads, block, dim), math.nan)
    tables = torch.full((len(lengths), max(need) + 1), NOWHERE, dtype=torch.int32)
    for row, length in enumerate(lengths):
        for column in range(need[row]):
            mine = tables[row, column] = order.pop()
            count = min(block, length - column * block)
            cache[mine, :, :, :count] = torch.randn(2, heads, count, dim, generator=generator)
    return paged.PagedBatch(cache=cache.to(dtype), blocks_BM=tables, lengths_B=torch.tensor(lengths, dtype=torch.int32))


def randn(*shape, dtype=torch.float32, seed=1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense_attention(query_HD: Tensor, kv: Tensor) -> tuple[Tensor, Tensor]:
    """One query over keys and values [2, H, N, D], float64: output [Hq, D] and log-sum-exp [Hq]."""
    group = query_HD.shape[0] // kv.shape[1]
    keys, values = kv.double().repeat_interleave(group, dim=1)
    logits = torch.einsum("hnd,hd->hn", keys, query_HD.double()) / math.sqrt(query_HD.shape[-1])
    attended = torch.einsum("hn,hnd->hd", torch.softmax(logits, dim=-1), values)
    return attended, torch.logsumexp(logits, dim=-1)


def dense_decode(queries: Tensor, batch: paged.PagedBatch) -> tuple[Tensor, Tensor]:
    """What decode attention should give, float64."""
    rows = [dense_attention(query, paged.gather_sequence(batch, row)) for row, query in enumerate(queries)]
    return torch.stack([out for out, _ in rows]), torch.stack([lse for _, lse in rows])


def dense_prefill(queries: Tensor, starts: Tensor, cached: Tensor, batch: paged.PagedBatch) -> tuple[Tensor, Tensor]:
    """What prefill attention should give, float64, query by query."""
    rows = []
    for sequence, (start, end) in enumerate(itertools.pairwise(starts.tolist())):
        kv = paged.gather_sequence(batch, sequence)
        seen = int(cached[sequence]) + 1
        rows += [dense_attention(queries[start + i], kv[:, :, : seen + i]) for i in range(end - start)]
    return torch.stack([out for out, _ in rows]), torch.stack([lse for _, lse in rows])


@dataclass(frozen=True, kw_only=True)
class Layers:
    """One sequence in several layers, with its ledger and queries that lie in a ring."""

    storage: Tensor
    table: Tensor
    length: int
    positions: Tensor
    mass: Tensor
    queries: Tensor
    lse: Tensor
    weights: Tensor
    asked: Tensor

    @property
    def arguments(self) -> tuple:
        """What `score_layers` takes."""
        live = self.positions[:, :, : self.length]
        return self.queries, self.lse, self.weights, self.storage, self.table, self.length, live, self.asked


def make_layers(
    length, *, layers=3, heads=2, group=4, dim=64, block=8, count=7, dtype=torch.float32, compute=torch.float32
) -> Layers:
    """The last `count` tokens as queries; slots are shuffled head by head, and one layer's log-sum-exps are exact."""
    generator = torch.Generator().manual_seed(length)
    columns = math.ceil(length / block)
    table = torch.full((columns + 2,), NOWHERE, dtype=torch.int32)
    table[:columns] = torch.randperm(columns + 2, generator=generator)[:columns]
    storage = torch.full((layers, columns + 2, 2, heads, block, dim), math.nan)
    for slot in range(length):
        storage[:, table[slot // block], :, :, slot % block] = torch.randn(layers, 2, heads, dim, generator=generator)
    room = length + 5
    positions = torch.full((layers, heads, room), 1 << 20, dtype=torch.int32)
    for layer, head in itertools.product(range(layers), range(heads)):
        positions[layer, head, :length] = torch.randperm(length, generator=generator)
    ring = torch.randn(layers, count + 4, heads * group, dim, generator=generator).to(compute)
    lse = torch.randn(layers, count + 4, heads * group, generator=generator) + 3
    return Layers(
        storage=storage.to(dtype), table=table, length=length, positions=positions,
        mass=torch.randn(layers, heads, room, generator=generator),
        queries=ring[:, 2 : 2 + count], lse=lse[:, 2 : 2 + count], weights=torch.linspace(0.5, 1, count),
        asked=torch.arange(length - count, length, dtype=torch.int32),
    )  # fmt: skip


def dense_mass(case: Layers) -> Tensor:
    """What `score_layers` should give, float64, key by key through plain loops over layers and query heads."""
    block = case.storage.shape[4]
    heads, group = case.storage.shape[3], case.queries.shape[2] // case.storage.shape[3]
    slots = range(case.length)
    keys = torch.stack([case.storage[:, case.table[s // block], 0, :, s % block] for s in slots], dim=2).double()
    mass = torch.zeros(len(keys), heads, case.length, dtype=torch.float64)
    for layer, query_head in itertools.product(range(len(keys)), range(heads * group)):
        head = query_head // group
        logits = case.queries[layer, :, query_head].double() @ keys[layer, head].T / math.sqrt(keys.shape[-1])
        share = torch.exp(logits - case.lse[layer, :, query_head].double()[:, None])
        share[case.positions[layer, head, : case.length] > case.asked[:, None]] = 0
        mass[layer, head] += (share * case.weights.double()[:, None]).sum(0)
    return mass
