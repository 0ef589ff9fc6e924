"""Eviction in the embedded engine: watches queries, keeps the ledger, and shrinks sequences between pieces.

When: a prompt is cut to the budget after each of its pieces (so it never holds more than budget + piece); while
decoding, a cache that has reached budget + interval is cut back to budget. Both follow from a request's own
tokens alone, never from load, so a preempted request decides the same again. What stays keeps its rotated keys;
only holes are filled, and whole tail blocks go back to the pool at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trtkit.engine.batch import Batch
from trtkit.engine.eviction_rules import EvictionRules, PieceRule, beside_decodes, due, failure_line
from trtkit.engine.paged_cache import PagedCache
from trtkit.engine.query_ring import QueryRing
from trtkit.engine.runner import ObserverFactory
from trtkit.engine.scheduler import Scheduler
from trtkit.engine.sequence import Sequence
from trtkit.engine.slot_moves import move_slots
from trtkit.engine.tracked import StepPlan, Tracked
from trtkit.kernels.mass import column_mass
from trtkit.kv.ledger import AttentionLedger
from trtkit.kv.moves import plan_moves
from trtkit.kv.policy import Budget, CachedTokens, EvictionPolicy
from trtkit.kv.selection import check_slots
from trtkit.spec.errors import EngineError
from trtkit.spec.kv import KVPolicySpec
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Limits

RING_QUERIES = 32  # decode queries that wait for one pass over the keys; more would read less and hold more
_MIN_PIECE = 32
_PIECES_PER_BUDGET = 32
_GATHERED_ELEMENTS = 1 << 21


def prefill_piece(budget: Budget, limits: Limits) -> int:
    """Tokens of a prompt between two evictions: 32, or a 32nd of a large budget, so the peak stays near the budget.

    A piece is fed whole, so it must find room in a step beside a full batch of decoding requests.
    """
    return min(max(_MIN_PIECE, budget.tokens // _PIECES_PER_BUDGET), beside_decodes(limits))


class EvictionObserver:
    """The engine's `LayerObserver`. `failed` tells sequences whose policy broke, with one line each."""

    def __init__(
        self,
        spec: KVPolicySpec,
        model: ModelSpec,
        cache: PagedCache,
        scheduler: Scheduler,
        *,
        piece: PieceRule = prefill_piece,
    ) -> None:
        """An observer for an engine whose policy is `spec`; a request may bring its own.

        Raises:
            TrtkitError: the engine's policy is unknown or cannot be carried out here.
        """
        self._rules = EvictionRules(spec, model, scheduler, piece)
        self.counters = self._rules.counters
        self.failed: dict[Sequence, str] = {}
        self._model = model
        self._cache = cache
        self._tracked: dict[Sequence, Tracked] = {}
        self._rings: dict[int, QueryRing] = {}
        self._plan: StepPlan | None = None

    def admit(self, sequence: Sequence) -> None:
        """See `LayerObserver.admit` and `EvictionRules.admit`."""
        self._rules.admit(sequence)

    def observe(self, layer: int, q_THD: Tensor, batch: Batch) -> None:
        """See `LayerObserver.observe`."""
        plan = self._plan
        if plan is None or plan.batch is not batch:
            plan = self._plan = self._begin(batch)
        for ring, index, tokens in plan.writes:
            ring.write(layer, index, q_THD if tokens is None else q_THD.index_select(0, tokens))
        for row, tracked in plan.pieces:
            queries = q_THD[None, row.start : row.start + row.count]
            keys = self._keys([layer], row.sequence, tracked.ledger.length)
            mass = self._mass(tracked, slice(layer, layer + 1), queries, keys, row.position)
            tracked.ledger.add(layer, mass[0], row.count)

    def end_step(self, batch: Batch) -> None:
        """See `LayerObserver.end_step`. A policy that breaks ends up in `failed`; nobody else is touched."""
        self._plan = None
        for row in batch.rows:
            tracked = self._tracked.get(row.sequence) if row.observed else None
            if tracked is None or row.sequence in self.failed:
                continue
            if tracked.pending and tracked.ring is not None and tracked.pending == tracked.ring.size:
                self._flush(row.sequence, tracked)
            sequence, budget = row.sequence, tracked.policy.budget
            if row.ends_piece and due(sequence.num_tokens, sequence.prompt_len, sequence.cache_len, budget):
                self._evict(sequence, tracked)
        self.counters.side_bytes = sum(t.ledger.num_bytes for t in self._tracked.values())
        self.counters.side_bytes += sum(ring.num_bytes for ring in self._rings.values())

    def forget(self, sequence: Sequence) -> None:
        """See `LayerObserver.forget`."""
        self.failed.pop(sequence, None)
        tracked = self._tracked.pop(sequence, None)
        if tracked is None:
            return
        sequence.kv_cap_tokens = tracked.prompt_cap
        if tracked.ring is not None:
            tracked.ring.give(tracked.ring_slot)

    def _begin(self, batch: Batch) -> StepPlan:
        """Open the ledgers for the step's tokens and sort its rows into pieces and ring writes."""
        plan = StepPlan(batch=batch)
        to_ring: dict[QueryRing, tuple[list[int], list[int]]] = {}
        for row in batch.rows:
            if not (row.observed and row.sequence.evicts):
                continue
            tracked = self._tracked.get(row.sequence) or self._track(row.sequence)
            if row.count > 1 and tracked.pending:
                self._flush(row.sequence, tracked)
            tracked.unlisted += row.count
            if tracked.ring is None:
                continue
            last = min(row.count, tracked.ring.size)
            if tracked.policy.watch.queries == "all":
                if row.count > 1:
                    tracked.list_tokens(row.position + row.count)
                    plan.pieces.append((row, tracked))
                    continue
                tracked.pending += 1
            index, tokens = to_ring.setdefault(tracked.ring, ([], []))
            index += tracked.ring.index(tracked.ring_slot, row.position + row.count - last, last)
            tokens += range(row.start + row.count - last, row.start + row.count)
        device = self._cache.device
        for ring, (index, tokens) in to_ring.items():
            every = tokens == list(range(len(batch.positions_T)))
            chosen = None if every else torch.tensor(tokens, device=device)
            plan.writes.append((ring, torch.tensor(index, device=device), chosen))
        return plan

    def _track(self, sequence: Sequence) -> Tracked:
        policy = self._rules.policy(sequence.kv_policy)
        assert policy is not None, "admit marks only sequences with a policy"
        watch = policy.watch
        size = {"none": 0, "all": RING_QUERIES, "last": watch.window}[watch.queries]
        ring = self._rings.setdefault(size, QueryRing(self._model.num_layers, size)) if size else None
        tracked = Tracked(
            policy=policy,
            ledger=AttentionLedger(
                self._model.num_layers,
                self._model.num_kv_heads,
                sequence.peak_slots,
                decay=watch.decay,
                device=str(self._cache.device),
            ),
            ring=ring,
            prompt_cap=sequence.kv_cap_tokens,
            ring_slot=ring.take() if ring is not None else 0,
        )
        self._tracked[sequence] = tracked
        return tracked

    def _keys(self, layers: list[int], sequence: Sequence, length: int) -> Tensor:
        """Live keys of some layers, [L, H, N, D]."""
        size = self._cache.tokens_per_block
        table = self._cache.padded_tables([sequence.block_table[: -(-length // size)]])
        index = self._cache.gather_rows(table)
        index = index[: index.numel() // 2]  # keys come first, then values
        heads, dim = self._cache.num_kv_heads, self._cache.head_dim
        stored = self._cache.block_rows(0)
        gathered = stored.new_empty(len(layers), index.numel(), stored.shape[1])
        for place, layer in zip(gathered, layers, strict=True):
            torch.index_select(self._cache.block_rows(layer), 0, index, out=place)
        return gathered.view(len(layers), heads, -1, dim)[:, :, :length]

    def _mass(self, tracked: Tracked, layers: slice, queries: Tensor, keys: Tensor, first: int) -> Tensor:
        """Mass of consecutive queries [L, T, Hq, D] at positions from `first`, weighted as the ledger wants it."""
        count = queries.shape[1]
        asked = torch.arange(first, first + count, dtype=torch.int32, device=queries.device)
        weights = tracked.ledger.query_weights(count)
        # Only the queries' own tokens can be in a query's future, and they lie last unless an eviction came between.
        settled = tracked.ledger.length - count if tracked.policy.watch.queries == "all" else 0
        return column_mass(queries, keys, tracked.ledger.positions[layers], asked, weights, settled=settled)

    def _last_mass(self, sequence: Sequence, tracked: Tracked, count: int) -> Tensor:
        """Mass the last `count` queries give to the live keys, [L, H, N]; a few layers at a time."""
        assert tracked.ring is not None
        ledger = tracked.ledger
        first = sequence.num_tokens - count
        queries = tracked.ring.read(tracked.ring_slot, first, count)
        total = self._model.num_layers
        group = max(1, _GATHERED_ELEMENTS // (self._cache.num_kv_heads * ledger.length * self._cache.head_dim))
        parts = []
        for start in range(0, total, group):
            layers = slice(start, min(total, start + group))
            keys = self._keys(list(range(layers.start, layers.stop)), sequence, ledger.length)
            parts.append(self._mass(tracked, layers, queries[layers], keys, first))
        return torch.cat(parts)

    def _flush(self, sequence: Sequence, tracked: Tracked) -> None:
        """Bring waiting queries into the ledger."""
        tracked.list_tokens(sequence.num_tokens)
        if tracked.pending:
            mass = self._last_mass(sequence, tracked, tracked.pending)
            tracked.ledger.add(slice(None), mass, tracked.pending)
            tracked.pending = 0

    def _evict(self, sequence: Sequence, tracked: Tracked) -> None:
        ledger, budget = tracked.ledger, tracked.policy.budget
        self._flush(sequence, tracked)
        if tracked.policy.watch.queries == "last":
            count = min(tracked.policy.watch.window, sequence.num_tokens)
            ledger.replace_mass(self._last_mass(sequence, tracked, count))
        try:
            keep = _decide(tracked.policy, ledger, sequence.num_tokens)
        except Exception as error:  # noqa: BLE001 - a policy is anybody's code; its request ends, the batch goes on
            self.failed[sequence] = failure_line(error)
            return
        before = ledger.length
        moves = plan_moves(keep.flatten(0, 1), before)
        move_slots(self._cache, sequence.block_table, moves)
        ledger.compact(moves)
        self._rules.record(sequence, budget, [before - budget.tokens], budget.tokens)


def _decide(policy: EvictionPolicy, ledger: AttentionLedger, num_tokens: int) -> Tensor:
    """Ask the policy on copies and hold its answer to the contract: [L, H, budget] slots."""
    tokens = CachedTokens(positions=ledger.positions.clone(), mass=ledger.mass.clone(), num_tokens=num_tokens)
    keep = policy.select(tokens)
    expected = (*ledger.mass.shape[:2], policy.budget.tokens)
    if tuple(keep.shape) != expected:
        raise EngineError(f"it kept {tuple(keep.shape)} slots instead of {expected}")
    check_slots(keep, ledger.length)
    return keep


def eviction_observer(spec: KVPolicySpec, model: ModelSpec) -> ObserverFactory:
    """What `EmbeddedEngine` builds its observer with."""

    def build(cache: PagedCache, scheduler: Scheduler) -> EvictionObserver:
        return EvictionObserver(spec, model, cache, scheduler)

    return build
