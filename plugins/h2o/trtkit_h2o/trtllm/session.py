"""Eviction's bookkeeping for TensorRT-LLM: policy, ledgers and query ring over somebody else's pool and scheduler.

Knows block ids and pool views, none of TensorRT-LLM's classes; the adapters translate. The rules are the embedded
engine's: a prompt is cut to the budget after each of its pieces, a decoding cache that has reached budget + interval
is cut back to the budget, keys keep their rotation and queries their logical position.

What a step owes is settled between that step's forward pass and the next one's, in the order of the device's stream.
Counts alone decide what is due, never sampled tokens, so a scheduler that runs one step ahead of its own results
(overlap) settles the same at the same places.

Shapes: L local layers, H KV heads, Hq query heads, T tokens, B rows of a decode step, K kept slots, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trtkit.kv.ledger import AttentionLedger
from trtkit.kv.moves import plan_moves
from trtkit.spec.errors import EngineError, UnsupportedError
from trtkit_h2o.trtllm.policies import RequestPolicies
from trtkit_h2o.trtllm.ring import StepRing
from trtkit_h2o.trtllm.scoring import carry_out, decide, holds, live_keys, live_mass, piece_mass, proof_of
from trtkit_h2o.trtllm.tracked import Counters, Geometry, Piece, Pool, Tracked

RING_QUERIES = 32
"""Decode queries that wait for one pass over the keys."""
_SLACK = 2
"""Queries more than that which the ring takes, for rounds that had to wait (see `settle`)."""


class EvictionSession:
    """All sequences of one KV cache manager."""

    def __init__(self, policies: RequestPolicies, geometry: Geometry) -> None:
        self.counters = Counters()
        self._policies = policies
        self._geometry = geometry
        self._tracked: dict[int, Tracked] = {}
        self._unproved = {True, False}
        watch = policies.widest.watch
        self._flush_at = watch.window if watch.queries == "last" else RING_QUERIES
        self._ring = StepRing(geometry.layers, geometry.max_sequences, self._flush_at + _SLACK, geometry.device)

    @property
    def side_bytes(self) -> int:
        """Memory held beside the KV cache: ledgers and ring."""
        return self._ring.num_bytes + sum(t.ledger.num_bytes for t in self._tracked.values())

    @property
    def request_ids(self) -> tuple[int, ...]:
        """Requests that can lose tokens."""
        return tuple(self._tracked)

    def begin(self, request_id: int, prompt_len: int, max_new_tokens: int | None) -> int:
        """Room for all of a request's prompt was made. One that can never outgrow its budget is left alone.

        Returns:
            Tokens of that room to give back at once: a prompt that comes in pieces never needs more than its budget and
            one piece.
        """
        self.forget(request_id)
        policy = self._policies.of(prompt_len, max_new_tokens)
        budget = policy.budget
        # The last output token is never fed.
        grown = None if max_new_tokens is None else prompt_len + max_new_tokens - 1
        if prompt_len <= budget.tokens and grown is not None and grown < budget.tokens + budget.interval:
            return 0
        geometry = self._geometry
        ledger = AttentionLedger(
            geometry.layers,
            geometry.kv_heads,
            budget.tokens + budget.interval + _SLACK,
            decay=policy.watch.decay,
            device=str(geometry.device),
        )
        chunk = prompt_len if geometry.max_chunk is None else geometry.max_chunk
        held = min(prompt_len, budget.tokens + chunk)
        self._tracked[request_id] = Tracked(
            policy=policy, ledger=ledger, prompt_len=prompt_len, slot=self._ring.take(), held=held
        )
        return prompt_len - held

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

    def feed(self, request_id: int, first: int, count: int, pool: Pool) -> None:
        """A piece of a prompt is about to run: `count` tokens from logical position `first`. Unknown ones are ignored.

        Raises:
            UnsupportedError: it does not follow on what came before, so cached tokens were found elsewhere.
        """
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return
        if first != tracked.fed or first != tracked.num_tokens:
            raise UnsupportedError(
                f"H2O expected token {tracked.num_tokens} of a prompt to be next, it is {first}; set "
                "kv_cache_config.enable_block_reuse=False"
            )
        base = tracked.ledger.length
        table = torch.tensor(pool.blocks(request_id), device=self._geometry.device) if base else None
        tracked.piece = Piece(first=first, count=count, base=base, table=table)
        tracked.ledger.append(first, min(base + count, tracked.policy.budget.tokens) - base)
        tracked.fed += count

    def prefill(self, request_id: int, layer: int, q_THD: Tensor, k_THD: Tensor, pool: Pool) -> Tensor | None:
        """Score one layer of a piece of a prompt and choose; rotated queries [T, Hq, D] and keys [T, H, D].

        Returns:
            Slots that stay of what is cached and what is new, [H, K] ascending; None where the request is not tracked.
        """
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return None
        piece, ledger = tracked.piece, tracked.ledger
        if piece is None or piece.count != q_THD.shape[0]:
            raise EngineError(f"H2O was asked about {q_THD.shape[0]} prompt tokens that no step announced")
        new = torch.arange(piece.first, piece.first + piece.count, dtype=torch.int32, device=q_THD.device)
        heads = k_THD.shape[1]
        rows = torch.cat([ledger.positions[layer, :, : piece.base], new.expand(heads, -1)], dim=1)[None]
        keys = k_THD.transpose(0, 1)
        if piece.table is not None:
            keys = torch.cat([live_keys(pool.view(layer), piece.table, piece.base).to(keys.dtype), keys], dim=1)
        queries = q_THD
        if tracked.policy.watch.queries == "last":
            queries = self._last_queries(tracked, piece, layer, q_THD)
        mass = piece_mass(tracked, piece, layer, queries, keys, rows)
        keep = torch.arange(rows.shape[-1], device=q_THD.device).expand(1, heads, -1)
        if rows.shape[-1] > tracked.policy.budget.tokens:
            keep = decide(tracked.policy, rows, mass, piece.first + piece.count)
            if layer == 0 and _ends(tracked, piece) in self._unproved:
                piece.proof = proof_of(keep, keys)
        ledger.positions[layer].copy_(rows.gather(-1, keep)[0])
        ledger.mass[layer].copy_(mass.gather(-1, keep)[0])
        piece.layers_seen.add(layer)
        return keep[0]

    def _last_queries(self, tracked: Tracked, piece: Piece, layer: int, q_THD: Tensor) -> Tensor:
        """The newest queries of a sequence, as many as its policy's window looks through; they may be older than the piece."""
        self._ring.write(tracked.slot, layer, piece.first, q_THD)
        end = piece.first + piece.count
        asking = min(tracked.policy.watch.window, end)
        if asking <= piece.count:
            return q_THD[-asking:]
        return self._ring.read_layer(tracked.slot, layer, end - asking, asking)

    def prompt_stays(self, request_id: int) -> None:
        """A pinned prompt is in: nothing of it was scored and nothing leaves. Unknown requests are ignored."""
        tracked = self._tracked.get(request_id)
        if tracked is not None and not tracked.fed:
            tracked.ledger.append(0, tracked.prompt_len)
            tracked.fed = tracked.num_tokens = tracked.prompt_len

    def aim(self, rows: Sequence[tuple[int, int | None]]) -> None:
        """A decode step begins, with room for its tokens made: where the ring takes each row's query.

        Args:
            rows: request id of each generation row in order, with its logical position where the runtime tells it.

        Raises:
            UnsupportedError: a position is not the next one.
        """
        targets: list[tuple[int, int] | None] = []
        for request_id, position in rows:
            tracked = self._tracked.get(request_id)
            if tracked is None:
                targets.append(None)
                continue
            if position not in (None, tracked.fed) or tracked.fed < tracked.prompt_len:
                raise UnsupportedError(
                    f"H2O expected token {tracked.fed} of a request to be next, it is {position}; use no speculative decoding"
                )
            targets.append((tracked.slot, tracked.fed))
            tracked.fed += 1
            tracked.held += 1
        self._ring.aim(targets)

    def observe(self, layer: int, q_BHD: Tensor) -> None:
        """One layer's rotated queries of the step's generation rows, [B, Hq, D]. Safe inside a CUDA graph."""
        if self._policies.widest.watch.queries != "none":
            self._ring.write_aimed(layer, q_BHD)

    def settle(self, request_id: int, pool: Pool | None) -> int:
        """Do what the steps handed to the device owe one request; again is harmless.

        Args:
            request_id: unknown ones are ignored.
            pool: the cache; None while it is out of reach, so that a round waits for a later call.

        Returns:
            Tokens to drop from the sequence's tail.
        """
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return 0
        if tracked.piece is not None:
            self._settle_piece(request_id, tracked, tracked.piece, pool)
        elif tracked.prompt_is_in:
            tracked.waiting += tracked.fed - tracked.num_tokens
            tracked.num_tokens = tracked.fed
            if pool is None:
                return 0
            self._round(request_id, tracked, pool)
        return self._give_back(tracked)

    def _settle_piece(self, request_id: int, tracked: Tracked, piece: Piece, pool: Pool | None) -> None:
        """The attention operator has compacted in place what `prefill` chose; the first time it is looked at."""
        if len(piece.layers_seen) != self._geometry.layers:
            raise EngineError(
                f"H2O was asked about {len(piece.layers_seen)} of {self._geometry.layers} layers of a prompt; this "
                "TensorRT-LLM does not call sparse_kv_predict as 1.2 does"
            )
        if piece.proof is not None and pool is not None:
            if not holds(piece.proof, pool, pool.blocks(request_id)):
                raise EngineError(
                    "H2O named the keys that stay and the attention operator did not move them, "
                    f"{'at the end of a prompt' if _ends(tracked, piece) else 'between the chunks of a prompt'}; this "
                    "TensorRT-LLM does not compact as 1.2 does"
                )
            self._unproved.discard(_ends(tracked, piece))
        tracked.num_tokens, tracked.piece = tracked.fed, None
        self._count(tracked, piece.base + piece.count - tracked.ledger.length)

    def _round(self, request_id: int, tracked: Tracked, pool: Pool) -> None:
        budget = tracked.policy.budget
        if tracked.waiting >= self._flush_at:
            self._flush(request_id, tracked, pool)
        if tracked.ledger.length + tracked.waiting >= budget.tokens + budget.interval:
            self._evict(request_id, tracked, pool)

    def _count(self, tracked: Tracked, tokens: int) -> None:
        tracked.evicted += tokens
        self.counters.evictions += tokens > 0
        self.counters.tokens_evicted += tokens

    def _give_back(self, tracked: Tracked) -> int:
        before, surplus = tracked.held, tracked.give_back()
        size = self._policies.tokens_per_block
        self.counters.blocks_freed += -(-before // size) + (-tracked.held // size)
        return surplus

    def _flush(self, request_id: int, tracked: Tracked, pool: Pool) -> None:
        """Bring waiting tokens into the ledger, and the mass their queries gave."""
        count = tracked.waiting
        if not count:
            return
        tracked.ledger.append(tracked.num_tokens - count, count)
        tracked.waiting = 0
        if tracked.policy.watch.queries == "all":
            tracked.ledger.add(slice(None), self._mass(request_id, tracked, pool, count), count)

    def _mass(self, request_id: int, tracked: Tracked, pool: Pool, count: int) -> Tensor:
        """Mass the last `count` queries give to the live keys, [L, H, N]."""
        queries = self._ring.read(tracked.slot, tracked.num_tokens - count, count)
        return live_mass(tracked, queries, pool, pool.blocks(request_id))

    def _evict(self, request_id: int, tracked: Tracked, pool: Pool) -> None:
        self._flush(request_id, tracked, pool)
        ledger, watch = tracked.ledger, tracked.policy.watch
        if watch.queries == "last":
            count = min(watch.window, tracked.num_tokens)
            ledger.replace_mass(self._mass(request_id, tracked, pool, count))
        keep = decide(tracked.policy, ledger.positions.clone(), ledger.mass.clone(), tracked.num_tokens)
        before = ledger.length
        moves = plan_moves(keep.flatten(0, 1), before)
        carry_out(moves, pool, pool.blocks(request_id), self._geometry)
        ledger.compact(moves)
        self._count(tracked, before - ledger.length)


def _ends(tracked: Tracked, piece: Piece) -> bool:
    return piece.first + piece.count == tracked.prompt_len
