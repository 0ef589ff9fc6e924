"""What eviction computes on tensors: who received how much attention, what stays, and the moves that make it so.

Shapes: L local layers, H KV heads, Hq query heads, T tokens, N live slots, D head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from trtkit.kernels.mass import column_mass
from trtkit.kernels.paged import compact_paged
from trtkit.kv.moves import HoleMoves
from trtkit.kv.policy import CachedTokens, EvictionPolicy
from trtkit.kv.selection import check_slots
from trtkit.spec.errors import EngineError
from trtkit_h2o.trtllm.tracked import Geometry, Piece, Pool, Proof, Tracked

_CUDA_LOGITS = 1 << 26
_CPU_LOGITS = 1 << 21
_PROOF_TOLERANCE = 1e-2
"""A key is copied, or cast between two 16-bit types; a wrong one is off by far more."""


def piece_mass(
    tracked: Tracked, piece: Piece, layer: int, queries_THD: Tensor, keys_HND: Tensor, rows_1HN: Tensor
) -> Tensor:
    """What the policy's watch wants to have been received once a piece of a prompt is in.

    Args:
        tracked: the sequence; its ledger still has the mass from before the piece in its first slots.
        piece: what is being fed.
        layer: local layer.
        queries_THD: the newest queries, the piece's last ones last.
        keys_HND: rotated keys, cached ones first.
        rows_1HN: their original positions.

    Returns:
        fp32 [1, H, N].
    """
    watch, ledger = tracked.policy.watch, tracked.ledger
    mass = torch.zeros(rows_1HN.shape, dtype=torch.float32, device=queries_THD.device)
    if watch.queries == "none":
        return mass
    asking, end = queries_THD.shape[0], piece.first + piece.count
    settled = 0
    if watch.queries == "all":
        settled = piece.base
        mass[0, :, :settled] = ledger.mass[layer, :, :settled] * ledger.decay**piece.count
    asked = torch.arange(end - asking, end, dtype=torch.int32, device=queries_THD.device)
    weights, limit = ledger.query_weights(asking), _logits(queries_THD)
    return mass + column_mass(
        queries_THD[None], keys_HND[None], rows_1HN, asked, weights, settled=settled, max_logits=limit
    )


def live_mass(tracked: Tracked, queries_LTHD: Tensor, pool: Pool, blocks: Sequence[int]) -> Tensor:
    """Mass the newest queries of a sequence give to its live keys, fp32 [L, H, N]; some layers at a time."""
    ledger, (layers, count, _, dim) = tracked.ledger, queries_LTHD.shape
    device = queries_LTHD.device
    asked = torch.arange(tracked.num_tokens - count, tracked.num_tokens, dtype=torch.int32, device=device)
    weights, limit = ledger.query_weights(count), _logits(queries_LTHD)
    table = torch.tensor(blocks, device=device)
    settled = ledger.length - count if tracked.policy.watch.queries == "all" else 0
    group = max(1, limit // (ledger.mass.shape[1] * ledger.length * dim))
    parts = []
    for start in range(0, layers, group):
        chosen = slice(start, min(layers, start + group))
        keys = torch.stack([live_keys(pool.view(i), table, ledger.length) for i in range(chosen.start, chosen.stop)])
        positions = ledger.positions[chosen]
        mass = column_mass(queries_LTHD[chosen], keys, positions, asked, weights, settled=settled, max_logits=limit)
        parts.append(mass)
    return torch.cat(parts)


def carry_out(moves: HoleMoves, pool: Pool, blocks: Sequence[int], geometry: Geometry) -> None:
    """Make `moves` of one sequence in every layer; their rows are flat (layer, KV head) rows, ascending."""
    heads, layers, device = geometry.kv_heads, geometry.layers, moves.rows.device
    table = torch.tensor([list(blocks)], dtype=torch.int32, device=device)
    sequence = torch.zeros_like(moves.rows)
    moves_M4 = torch.stack([sequence, moves.rows % heads, moves.sources, moves.targets], dim=1).to(torch.int32)
    bounds = torch.searchsorted(moves.rows, torch.arange(layers + 1, device=device) * heads).tolist()
    for layer, (start, end) in enumerate(itertools.pairwise(bounds)):
        compact_paged(pool.view(layer), table, moves_M4[start:end])


def live_keys(view: Tensor, table: Tensor, length: int) -> Tensor:
    """A sequence's keys in slot order, a copy [H, length, D]."""
    blocks = table[: -(-length // view.shape[3])]
    return view[blocks, 0].permute(1, 0, 2, 3).flatten(1, 2)[:, :length]


def proof_of(keep_1HK: Tensor, keys_HND: Tensor) -> Proof | None:
    """What the last kept slot must hold after compaction; None where it holds that already."""
    slot, source = keep_1HK.shape[-1] - 1, int(keep_1HK[0, 0, -1])
    return None if source == slot else Proof(slot=slot, key=keys_HND[0, source].clone())


def holds(proof: Proof, pool: Pool, blocks: Sequence[int]) -> bool:
    """Whether the pool bears a proof out; waits for the device."""
    view = pool.view(0)
    size = view.shape[3]
    found = view[blocks[proof.slot // size], 0, 0, proof.slot % size].to(proof.key.dtype)
    return torch.allclose(found, proof.key, rtol=_PROOF_TOLERANCE, atol=_PROOF_TOLERANCE)


def decide(policy: EvictionPolicy, positions: Tensor, mass: Tensor, num_tokens: int) -> Tensor:
    """Ask the policy and hold its answer to the contract: slots [L, H, budget].

    Raises:
        EngineError: it kept another number.
        ValueError: its slots are not ascending, distinct and live.
    """
    keep = policy.select(CachedTokens(positions=positions, mass=mass, num_tokens=num_tokens))
    expected = (*mass.shape[:2], policy.budget.tokens)
    if tuple(keep.shape) != expected:
        raise EngineError(f"the KV policy kept {tuple(keep.shape)} slots instead of {expected}")
    check_slots(keep, mass.shape[-1])
    return keep


def _logits(tensor: Tensor) -> int:
    return _CUDA_LOGITS if tensor.is_cuda else _CPU_LOGITS
