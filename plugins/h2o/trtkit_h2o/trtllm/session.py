"""Eviction's bookkeeping for TensorRT-LLM: policy, ledgers and query ring over somebody else's pool and scheduler.

Knows block ids and pool views, none of TensorRT-LLM's classes; the adapters translate. The rules are the embedded
engine's: a prompt is cut to the budget once it is in, a decoding cache that has reached budget + interval is cut
back to the budget, keys keep their rotation and queries their logical position. One difference: TensorRT-LLM feeds
a prompt whole (chunked prefill is refused), so its one cut falls at the end and its peak is the full prompt.

Shapes: L local layers, H KV heads, Hq query heads, T tokens, N live slots, K kept slots, D head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from trtkit.kernels.mass import column_mass
from trtkit.kernels.paged import compact_paged
from trtkit.kv.ledger import AttentionLedger
from trtkit.kv.moves import HoleMoves, plan_moves
from trtkit.kv.policy import CachedTokens, EvictionPolicy
from trtkit.kv.selection import check_slots
from trtkit.spec.errors import EngineError, UnsupportedError
from trtkit_h2o.trtllm.policies import RequestPolicies
from trtkit_h2o.trtllm.ring import StepRing

RING_QUERIES = 32
"""Decode queries that wait for one pass over the keys."""
_SLACK = 2
"""Queries more than that which the ring takes, for rounds that had to wait (see `end_step`)."""
_CUDA_LOGITS = 1 << 26
_CPU_LOGITS = 1 << 21


class Pool(Protocol):
    """The paged cache of one rank, as TensorRT-LLM's managers show it."""

    def view(self, layer: int) -> Tensor:
        """One local layer, [blocks, 2, H, tokens_per_block, D] (HND), a view."""

    def blocks(self, request_id: int) -> Sequence[int]:
        """Block ids of a sequence, in order; indices into the first axis of `view`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """One rank's share: local layers, its KV heads, and the most sequences in flight."""

    layers: int
    kv_heads: int
    max_sequences: int
    device: torch.device


@dataclass(kw_only=True, slots=True, eq=False)
class _Tracked:
    """One evicting sequence. `num_tokens` have been computed; `fed` counts the token of a step under way too. The last
    `waiting` of them are cached but neither in the ledger nor scored."""

    policy: EvictionPolicy
    ledger: AttentionLedger
    prompt_len: int
    slot: int
    fed: int
    num_tokens: int = 0
    waiting: int = 0
    evicted: int = 0
    layers_seen: set[int] = field(default_factory=set)


class EvictionSession:
    """All sequences of one KV cache manager."""

    def __init__(self, policies: RequestPolicies, geometry: Geometry) -> None:
        self._policies = policies
        self._geometry = geometry
        self._tracked: dict[int, _Tracked] = {}
        watch = policies.widest.watch
        self._flush_at = watch.window if watch.queries == "last" else RING_QUERIES
        self._ring = StepRing(geometry.layers, geometry.max_sequences, self._flush_at + _SLACK, geometry.device)

    @property
    def side_bytes(self) -> int:
        """Memory held beside the KV cache: ledgers and ring."""
        return self._ring.num_bytes + sum(t.ledger.num_bytes for t in self._tracked.values())

    def begin(self, request_id: int, prompt_len: int, max_new_tokens: int | None) -> None:
        """A request's prompt is about to run. One that can never outgrow its budget is left alone."""
        self.forget(request_id)
        policy = self._policies.of(prompt_len, max_new_tokens)
        budget = policy.budget
        # The last output token is never fed.
        grown = None if max_new_tokens is None else prompt_len + max_new_tokens - 1
        if prompt_len <= budget.tokens and grown is not None and grown < budget.tokens + budget.interval:
            return
        geometry = self._geometry
        ledger = AttentionLedger(
            geometry.layers,
            geometry.kv_heads,
            budget.tokens + budget.interval + _SLACK,
            decay=policy.watch.decay,
            device=str(geometry.device),
        )
        ledger.append(0, min(prompt_len, budget.tokens))
        self._tracked[request_id] = _Tracked(
            policy=policy, ledger=ledger, prompt_len=prompt_len, slot=self._ring.take(), fed=prompt_len
        )

    def forget(self, request_id: int) -> None:
        """A request has ended or lost its cache. Unknown ones are ignored."""
        tracked = self._tracked.pop(request_id, None)
        if tracked is not None:
            self._ring.give(tracked.slot)

    def tracks(self, request_id: int) -> bool:
        """Whether the request can ever lose tokens."""
        return request_id in self._tracked

    def evicted(self, request_id: int) -> int:
        """Tokens a request has lost so far: its logical length less its cached length."""
        tracked = self._tracked.get(request_id)
        return 0 if tracked is None else tracked.evicted

    def prefill(self, request_id: int, layer: int, q_THD: Tensor, k_THD: Tensor) -> Tensor | None:
        """Score one layer of a whole prompt and choose; rotated queries [T, Hq, D] and keys [T, H, D].

        Returns:
            Slots that stay, [H, K] ascending; None where the request is not tracked.
        """
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return None
        count = q_THD.shape[0]
        if count != tracked.prompt_len:
            raise UnsupportedError(
                f"H2O saw {count} of {tracked.prompt_len} prompt tokens at once; it needs whole prompts: disable chunked "
                "prefill and block reuse"
            )
        watch, policy = tracked.policy.watch, tracked.policy
        positions = torch.arange(count, dtype=torch.int32, device=q_THD.device)
        rows = positions.expand(1, k_THD.shape[1], count)
        asking = {"none": 0, "all": count, "last": min(watch.window, count)}[watch.queries]
        mass = torch.zeros(rows.shape, dtype=torch.float32, device=q_THD.device)
        if asking:
            weights = tracked.ledger.query_weights(asking)
            queries, keys = q_THD[None, -asking:], k_THD.transpose(0, 1)[None]
            mass = column_mass(queries, keys, rows, positions[-asking:], weights, max_logits=_logits(q_THD))
        if watch.queries == "last":
            self._ring.write(tracked.slot, layer, 0, q_THD)
        keep = rows.long()
        if count > policy.budget.tokens:
            keep = _decide(policy, rows, mass, count)
        tracked.ledger.positions[layer].copy_(keep[0])
        tracked.ledger.mass[layer].copy_(mass.gather(-1, keep)[0])
        tracked.layers_seen.add(layer)
        return keep[0]

    def end_prefill(self, request_id: int) -> int:
        """The prompt is in, and compacted in place by the attention operator. Unknown requests are ignored.

        Returns:
            Tokens to drop from the sequence's tail.
        """
        tracked = self._tracked.get(request_id)
        if tracked is None or tracked.num_tokens:
            return 0
        scored = not self._policies.pins_prompts
        if scored and len(tracked.layers_seen) != self._geometry.layers:
            raise EngineError(
                f"H2O was asked about {len(tracked.layers_seen)} of {self._geometry.layers} layers of a prompt; this "
                "TensorRT-LLM does not call sparse_kv_predict as 1.2 does"
            )
        tracked.num_tokens = tracked.prompt_len
        tracked.evicted = tracked.prompt_len - tracked.ledger.length
        return tracked.evicted

    def aim(self, rows: Sequence[tuple[int, int | None]]) -> None:
        """A decode step begins: where the ring takes each row's query.

        Args:
            rows: request id of each generation row in order, with its logical position where the runtime tells it.

        Raises:
            UnsupportedError: the step before has not ended, or a position is not the next one. Under the overlap
                scheduler a round would come a step late, and tokens would differ from every other target's.
        """
        targets: list[tuple[int, int] | None] = []
        for request_id, position in rows:
            tracked = self._tracked.get(request_id)
            if tracked is None:
                targets.append(None)
                continue
            if tracked.fed != tracked.num_tokens or position not in (None, tracked.fed):
                raise UnsupportedError(
                    f"H2O expected token {tracked.num_tokens} of a request to be next and not under way; set "
                    "disable_overlap_scheduler=True and use no speculative decoding"
                )
            targets.append((tracked.slot, tracked.fed))
            tracked.fed += 1
        self._ring.aim(targets)

    def observe(self, layer: int, q_BHD: Tensor) -> None:
        """One layer's rotated queries of the step's generation rows, [B, Hq, D]. Safe inside a CUDA graph."""
        if self._policies.widest.watch.queries != "none":
            self._ring.write_aimed(layer, q_BHD)

    def end_step(self, request_id: int, pool: Pool | None) -> int:
        """A decode step of one request is over: count its token, and hold a round where one is due.

        Args:
            request_id: unknown ones are ignored.
            pool: the cache; None while it is out of reach, so that a round waits for a later step.

        Returns:
            Tokens to drop from the sequence's tail.
        """
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return 0
        tracked.num_tokens += 1
        tracked.waiting += 1
        if pool is None:
            return 0
        budget = tracked.policy.budget
        if tracked.waiting >= self._flush_at:
            self._flush(request_id, tracked, pool)
        if tracked.ledger.length + tracked.waiting < budget.tokens + budget.interval:
            return 0
        return self._evict(request_id, tracked, pool)

    def _flush(self, request_id: int, tracked: _Tracked, pool: Pool) -> None:
        """Bring waiting tokens into the ledger, and the mass their queries gave."""
        count = tracked.waiting
        if not count:
            return
        tracked.ledger.append(tracked.num_tokens - count, count)
        tracked.waiting = 0
        if tracked.policy.watch.queries == "all":
            tracked.ledger.add(slice(None), self._mass(request_id, tracked, pool, count), count)

    def _evict(self, request_id: int, tracked: _Tracked, pool: Pool) -> int:
        self._flush(request_id, tracked, pool)
        ledger, watch = tracked.ledger, tracked.policy.watch
        if watch.queries == "last":
            count = min(watch.window, tracked.num_tokens)
            ledger.replace_mass(self._mass(request_id, tracked, pool, count))
        keep = _decide(tracked.policy, ledger.positions.clone(), ledger.mass.clone(), tracked.num_tokens)
        before = ledger.length
        moves = plan_moves(keep.flatten(0, 1), before)
        self._move(request_id, pool, moves)
        ledger.compact(moves)
        tracked.evicted += before - ledger.length
        return before - ledger.length

    def _mass(self, request_id: int, tracked: _Tracked, pool: Pool, count: int) -> Tensor:
        """Mass the last `count` queries give to the live keys, [L, H, N]; some layers at a time."""
        ledger, layers = tracked.ledger, self._geometry.layers
        first = tracked.num_tokens - count
        queries = self._ring.read(tracked.slot, first, count)
        asked = torch.arange(first, first + count, dtype=torch.int32, device=queries.device)
        weights = ledger.query_weights(count)
        table = torch.tensor(pool.blocks(request_id), device=queries.device)
        limit = _logits(queries)
        settled = ledger.length - count if tracked.policy.watch.queries == "all" else 0
        group = max(1, limit // (self._geometry.kv_heads * ledger.length * queries.shape[-1]))
        parts = []
        for start in range(0, layers, group):
            chosen = slice(start, min(layers, start + group))
            keys = torch.stack([_keys(pool.view(i), table, ledger.length) for i in range(chosen.start, chosen.stop)])
            positions = ledger.positions[chosen]
            mass = column_mass(queries[chosen], keys, positions, asked, weights, settled=settled, max_logits=limit)
            parts.append(mass)
        return torch.cat(parts)

    def _move(self, request_id: int, pool: Pool, moves: HoleMoves) -> None:
        """Carry out `moves` in every layer; their rows are flat (layer, KV head) rows, ascending."""
        heads, layers = self._geometry.kv_heads, self._geometry.layers
        device = moves.rows.device
        table = torch.tensor([list(pool.blocks(request_id))], dtype=torch.int32, device=device)
        sequence = torch.zeros_like(moves.rows)
        moves_M4 = torch.stack([sequence, moves.rows % heads, moves.sources, moves.targets], dim=1).to(torch.int32)
        bounds = torch.searchsorted(moves.rows, torch.arange(layers + 1, device=device) * heads).tolist()
        for layer, (start, end) in enumerate(itertools.pairwise(bounds)):
            compact_paged(pool.view(layer), table, moves_M4[start:end])


def _keys(view: Tensor, table: Tensor, length: int) -> Tensor:
    """A sequence's keys in slot order, a copy [H, length, D]."""
    blocks = table[: -(-length // view.shape[3])]
    return view[blocks, 0].permute(1, 0, 2, 3).flatten(1, 2)[:, :length]


def _decide(policy: EvictionPolicy, positions: Tensor, mass: Tensor, num_tokens: int) -> Tensor:
    """Ask the policy and hold its answer to the contract: slots [L, H, budget]."""
    keep = policy.select(CachedTokens(positions=positions, mass=mass, num_tokens=num_tokens))
    expected = (*mass.shape[:2], policy.budget.tokens)
    if tuple(keep.shape) != expected:
        raise EngineError(f"the KV policy kept {tuple(keep.shape)} slots instead of {expected}")
    check_slots(keep, mass.shape[-1])
    return keep


def _logits(tensor: Tensor) -> int:
    return _CUDA_LOGITS if tensor.is_cuda else _CPU_LOGITS
