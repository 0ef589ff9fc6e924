"""The torch twins of `trtkit.kernels.paged`: they define what its kernels compute. Shapes are that module's.

Twins look at lengths on the host, so where they stand in for kernels on CUDA no graph can be captured; the two that
move through all layers (`compact_layers_twin`, `score_layers_twin`) do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from trtkit.kernels.paged_batch import PagedBatch, PagedQueries, gather_sequence

_QUERY_TILE = 256


def decode_attention_twin(
    queries_BHD: Tensor, batch: PagedBatch, *, out: Tensor | None = None, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Defines `paged_decode_attention`: fp32 inside, one sequence at a time."""
    out = torch.empty_like(queries_BHD) if out is None else out
    lse = _new_lse(queries_BHD) if lse is None else lse
    for index, query_HD in enumerate(queries_BHD.float()):
        keys, values = gather_sequence(batch, index).float()
        logits_HGN = scaled_logits(query_HD[None], keys)[:, :, 0]
        lse[index] = torch.logsumexp(logits_HGN, dim=-1).flatten()
        out[index] = (torch.softmax(logits_HGN, dim=-1) @ values).flatten(0, 1).to(out.dtype)
    return out, lse


def prefill_attention_twin(
    queries_RHD: Tensor,
    starts_B1: Tensor,
    cached_B: Tensor,
    batch: PagedBatch,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Defines `paged_prefill_attention`: fp32 inside, one sequence and 256 queries at a time."""
    out = torch.empty_like(queries_RHD) if out is None else out
    lse = _new_lse(queries_RHD) if lse is None else lse
    for index, (start, end) in enumerate(pairwise(starts_B1.tolist())):
        keys, values = gather_sequence(batch, index).float()
        slots = torch.arange(keys.shape[1], device=keys.device)
        for rows in _tiles(start, end):
            seen = int(cached_B[index]) + torch.arange(rows.start - start, rows.stop - start, device=keys.device)
            logits_HGTN = scaled_logits(queries_RHD[rows].float(), keys)
            logits_HGTN.masked_fill_(slots > seen[:, None], -math.inf)
            lse[rows] = torch.logsumexp(logits_HGTN, dim=-1).flatten(0, 1).T
            attended = torch.softmax(logits_HGTN, dim=-1) @ values[:, None]
            out[rows] = attended.flatten(0, 1).transpose(0, 1).to(out.dtype)
    return out, lse


def score_twin(
    queries: PagedQueries, lse_RH: Tensor, weights_R: Tensor, batch: PagedBatch, positions: Tensor
) -> Tensor:
    """Defines `score_paged`: exp(logit - lse) of visible keys, weighted and summed."""
    mass = torch.zeros(positions.shape, dtype=torch.float32, device=lse_RH.device)
    for index, (start, end) in enumerate(pairwise(queries.starts_B1.tolist())):
        keys = gather_sequence(batch, index)[0].float()
        live = positions[index, :, : keys.shape[1]]
        for rows in _tiles(start, end):
            asked = queries.positions_R[rows]
            mass[index, :, : keys.shape[1]] += _mass(
                queries.heads_RHD[rows], lse_RH[rows], weights_R[rows], keys, live, asked
            )
    return mass


def score_layers_twin(  # noqa: PLR0913, PLR0917 - the arguments of `score_layers`
    queries_LRHD: Tensor,
    lse_LRH: Tensor,
    weights_R: Tensor,
    storage: Tensor,
    table_M: Tensor,
    length: int,
    positions_LHN: Tensor,
    query_positions_R: Tensor,
    *,
    out: Tensor | None = None,
    carry: float = 0.0,
) -> Tensor:
    """Defines `score_layers`, layer by layer."""
    layers, _, _, heads, size, dim = storage.shape
    if out is None:
        out, carry = torch.zeros(layers, heads, length, dtype=torch.float32, device=storage.device), 0.0
    blocks = table_M[: math.ceil(length / size)].to(torch.int64)
    for layer in range(layers):
        stored = storage[layer].index_select(0, blocks)[:, 0]
        keys = stored.permute(1, 0, 2, 3).reshape(heads, -1, dim)[:, :length].float()
        mass = torch.zeros(heads, length, dtype=torch.float32, device=storage.device)
        for rows in _tiles(0, queries_LRHD.shape[1]):
            mass += _mass(
                queries_LRHD[layer, rows], lse_LRH[layer, rows], weights_R[rows],
                keys, positions_LHN[layer], query_positions_R[rows],
            )  # fmt: skip
        out[layer] = mass + carry * out[layer] if carry else mass
    return out


def lse_twin(queries: PagedQueries, batch: PagedBatch, positions: Tensor) -> Tensor:
    """Log-sum-exp of each query's visible scaled logits, fp32 [R, Hq]: for engines whose attention emits none."""
    lse = torch.empty(queries.heads_RHD.shape[:2], dtype=torch.float32, device=positions.device)
    for index, (start, end) in enumerate(pairwise(queries.starts_B1.tolist())):
        keys = gather_sequence(batch, index)[0].float()
        live = positions[index, :, : keys.shape[1]]
        for rows in _tiles(start, end):
            hidden_HTN = live[:, None, :] > queries.positions_R[rows][None, :, None]
            logits = scaled_logits(queries.heads_RHD[rows].float(), keys).masked_fill(hidden_HTN[:, None], -math.inf)
            lse[rows] = torch.logsumexp(logits, dim=-1).flatten(0, 1).T
    return lse


def compact_twin(cache: Tensor, blocks_BM: Tensor, moves_M4: Tensor) -> None:
    """Defines `compact_paged`: all sources are read before any target is written."""
    size = cache.shape[3]
    sequence, head, source, target = moves_M4.to(torch.int64).unbind(1)
    from_block = blocks_BM[sequence, source // size].to(torch.int64)
    to_block = blocks_BM[sequence, target // size].to(torch.int64)
    cache[to_block, :, head, target % size] = cache[from_block, :, head, source % size]


def hole_moves(keep_RK: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Sources and targets, int64 [R, J], that leave ascending `keep_RK` of `length` > K slots in front.

    The j-th hole in front takes the j-th kept slot from behind. Rows differ in how many moves they need; the rest
    of a row copies the last slot onto itself, which no other move reads or writes. A slot out of range, which a
    broken policy may have named, is never a source or a target.
    """
    rows, kept = keep_RK.shape
    keep = keep_RK.to(torch.int64).contiguous()
    column = torch.arange(kept, device=keep.device)
    most = min(kept, length - kept)
    move = torch.arange(most, device=keep.device).expand(rows, most).contiguous()
    in_front = (keep < kept).sum(dim=-1, keepdim=True)
    source = keep.gather(1, (in_front + move).clamp(max=kept - 1))
    # keep[i] - i holes lie before the i-th kept slot, so the j-th hole lies behind as many kept ones as have <= j.
    holes_before = torch.where(column < in_front, keep - column, length)
    target = move + torch.searchsorted(holes_before, move, right=True)
    wanted = (in_front + move < kept) & (source >= kept) & (source < length) & (target < kept)
    return torch.where(wanted, source, length - 1), torch.where(wanted, target, length - 1)


def compact_layers_twin(
    storage: Tensor,
    table_M: Tensor,
    keep_RK: Tensor,
    length: int,
    mass_LHC: Tensor | None,
    positions_LHC: Tensor | None,
) -> None:
    """Defines `compact_layers`."""
    layers, _, _, heads, size, _ = storage.shape
    if keep_RK.shape[1] >= length:
        return
    sources, targets = hole_moves(keep_RK, length)
    row = torch.arange(layers * heads, device=keep_RK.device)[:, None]
    layer, head = row // heads, row % heads
    table = table_M.to(torch.int64)
    moved = storage[layer, table[sources // size], :, head, sources % size]
    storage[layer, table[targets // size], :, head, targets % size] = moved
    for ledger in (mass_LHC, positions_LHC):
        if ledger is not None:
            ledger[layer, head, targets] = ledger[layer, head, sources]


def scaled_logits(heads_THD: Tensor, keys_HND: Tensor) -> Tensor:
    """Queries [T, Hq, D] against keys [H, N, D], scaled by 1/sqrt(D): [H, G, T, N]."""
    count, _, dim = heads_THD.shape
    grouped = heads_THD.reshape(count, keys_HND.shape[0], -1, dim).permute(1, 2, 0, 3)
    return torch.matmul(grouped, keys_HND[:, None].transpose(-1, -2)) / math.sqrt(dim)


def _mass(
    heads_THD: Tensor, lse_TH: Tensor, weights_T: Tensor, keys_HND: Tensor, live_HN: Tensor, asked_T: Tensor
) -> Tensor:
    """What the keys receive from some queries, fp32 [H, N]."""
    logits_HGTN = scaled_logits(heads_THD.float(), keys_HND)
    hidden_HTN = live_HN[:, None, :] > asked_T[None, :, None]
    lse_HGT = lse_TH.T.reshape(keys_HND.shape[0], -1, lse_TH.shape[0])
    probabilities = torch.exp(logits_HGTN - lse_HGT[..., None]).masked_fill(hidden_HTN[:, None], 0)
    return torch.einsum("hgtn,t->hn", probabilities, weights_T)


def _tiles(start: int, end: int) -> Iterator[slice]:
    """Rows from `start` to `end`, 256 at a time."""
    for first in range(start, end, _QUERY_TILE):
        yield slice(first, min(end, first + _QUERY_TILE))


def _new_lse(queries: Tensor) -> Tensor:
    return torch.empty(queries.shape[:2], dtype=torch.float32, device=queries.device)
