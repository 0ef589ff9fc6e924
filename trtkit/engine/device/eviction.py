"""Eviction on the device path: the decisions of `trtkit.engine.eviction`, without ever waiting for the device.

When, how many and where to is host arithmetic on token counts; which tokens is decided by kernels on the stream of
the step itself. Decode queries wait in static rings which the captured step writes; prompts are cut into segments
inside each layer (`trtkit.engine.device.segments`). Order of calls for one step:

    ring_places (decode rows) and segments (prompt rows), then the layers, with after_segment for each segment of each
    layer, then every sequence is advanced, then end_step; poll whenever a step has been collected.

Shapes: L layers, T tokens of a segment, Hq query heads, H KV heads, D head dim, N live slots.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from trtkit.engine.device.ledger import DeviceLedger
from trtkit.engine.device.rings import NOWHERE, DeviceRings
from trtkit.engine.device.scores import ALL, DeviceScores
from trtkit.engine.device.segments import Segment, StepRow, cut
from trtkit.engine.device.verdicts import Verdicts
from trtkit.engine.device.watched import Planned, Watched
from trtkit.engine.eviction_rules import EvictionRules, PieceRule, beside_decodes, due, failure_line
from trtkit.engine.scheduler import Scheduler
from trtkit.engine.sequence import Sequence
from trtkit.kernels.paged import compact_layers
from trtkit.kv.policy import Budget, EvictionPolicy
from trtkit.spec.engine import Request
from trtkit.spec.errors import EngineError, UnsupportedError
from trtkit.spec.kv import KVPolicySpec
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Limits

RING_QUERIES = 16
"""Decode queries that wait for one pass over the keys. On Llama 3 70B each costs 1.3 MB per sequence; half as many
would read all keys twice as often (docs/h2o.md)."""
_MIN_PIECE = 256
_PIECES_PER_BUDGET = 8
_WARM_BUDGETS = 4
"""Of a share of the context, the largest budget and its halves: rankings are compiled per power of two."""
_NOBODY = Request(request_id="", prompt_ids=(0,), max_tokens=1)


def device_piece(budget: Budget, limits: Limits) -> int:
    """Tokens of a prompt between two evictions: 256, or an eighth of a large budget, for a GPU wants large pieces."""
    return min(max(_MIN_PIECE, budget.tokens // _PIECES_PER_BUDGET), beside_decodes(limits))


class DeviceEviction:
    """Watches and shrinks sequences. `failed` tells those whose policy broke, with one line each."""

    def __init__(
        self,
        spec: KVPolicySpec,
        model: ModelSpec,
        scheduler: Scheduler,
        *,
        piece: PieceRule = device_piece,
        ring_queries: int | None = None,
    ) -> None:
        """Eviction for an engine whose policy is `spec`; a request may bring its own.

        Args:
            spec: the engine's policy.
            model: shapes.
            scheduler: trims blocks; its limits bound what is allocated.
            piece: tokens of a prompt between two evictions.
            ring_queries: decode queries a sequence keeps. None: 16, or the window of the engine's policy, or none at
                all if that policy watches no queries. Requests whose policy wants more are refused.

        Raises:
            TrtkitError: the engine's policy is unknown or cannot be carried out here.
        """
        self._rules = EvictionRules(spec, model, scheduler, piece)
        self.counters = self._rules.counters
        self.failed: dict[Sequence, str] = {}
        self._spec = spec
        self._model = model
        self._limits = scheduler.limits
        policy = self._rules.policy(spec)
        self.ring_size = ring_queries if ring_queries is not None else 0 if policy is None else _ring_need(policy)
        self._watched: dict[Sequence, Watched] = {}

    def attach(self, storage: Tensor, max_batch_size: int, *, dtype: torch.dtype | None = None) -> None:
        """Take the cache, [L, blocks, 2, H, tokens_per_block, D], and allocate everything that must not move.

        Args:
            storage: all layers' caches.
            max_batch_size: most sequences that run at once.
            dtype: type of the queries; the cache's own if None.
        """
        device = storage.device
        self._storage = storage
        self.rings = DeviceRings(self._model, max_batch_size, self.ring_size, dtype or storage.dtype, device)
        self._verdicts = Verdicts(max_batch_size, device)
        self._scores = DeviceScores(storage, self.rings, self._limits)
        if storage.is_cuda:
            self.warm_up()

    def warm_up(self) -> None:
        """Run a round at the engine's budgets, so that no request waits for a kernel to be compiled.

        Nothing is served yet: what the blocks hold, and what becomes of it, is nobody's.
        """
        for shrunk in range(_WARM_BUDGETS if self._spec.budget_fraction else 1):
            policy = self._rules.policy(self._spec.resolved(max(1, self._limits.max_seq_len >> shrunk)))
            if policy is None:
                return
            budget = policy.budget
            for more in (self._rules.piece(budget), budget.interval):
                self._rehearse(policy, min(budget.tokens + more, self._limits.max_seq_len))

    def _rehearse(self, policy: EvictionPolicy, live: int) -> None:
        """One round at `live` slots, for nobody."""
        watched = self._begin_watching(Sequence(request=_NOBODY, arrival=0, max_new_tokens=1), policy, live)
        blocks, size = self._storage.shape[1], self._storage.shape[4]
        # Blocks all over the cache, as a request's are: kernels tune themselves here, and one block would come from L2.
        table = torch.arange(-(-live // size), dtype=torch.int32, device=self._storage.device)
        table.remainder_(max(1, blocks - 1))
        watched.unlisted = live
        watched.pending = min(self.ring_size, live) if policy.watch.queries == "all" else 0
        self._scores.flush(watched, table, live)
        if policy.watch.queries == "all":
            self._scores.rehearse_piece(watched, min(self._rules.piece(policy.budget), live), table, live)
        if watched.window:
            self._scores.look_through_ring(watched, ALL, table, live, live, None)
        self._shrink(watched, ALL, table, live, live)
        self._verdicts.clear(watched.slot)
        self.forget(watched.sequence)

    def admit(self, sequence: Sequence) -> None:
        """See `LayerObserver.admit`.

        Raises:
            TrtkitError: the policy is unknown, or cannot be carried out in this engine.
        """
        policy = self._rules.admit(sequence)
        if policy is None or policy.watch.queries == "none":
            return
        if self.ring_size < max(1, policy.watch.window):
            label = sequence.kv_policy.label
            raise UnsupportedError(
                f"KV policy {label!r} looks at {policy.watch.window or 'all'} decode queries, this engine keeps room for "
                f"{self.ring_size} per request; open the engine with --kv {label}"
            )

    def forget(self, sequence: Sequence) -> None:
        """See `LayerObserver.forget`."""
        self.failed.pop(sequence, None)
        watched = self._watched.pop(sequence, None)
        if watched is not None:
            sequence.kv_cap_tokens = watched.prompt_cap
            self.rings.give(watched.slot)

    def ring_places(self, rows: Iterable[StepRow]) -> list[int]:
        """Where the queries and log-sum-exps of decode rows go in `rings`; `NOWHERE` if nobody will read them."""
        places = []
        for row in rows:
            watched = self._watch(row)
            place = NOWHERE
            if watched is not None and watched.policy.watch.queries == "all":
                place = self.rings.places(watched.slot, watched.pending, 1).start
            elif watched is not None and watched.window:
                place = self.rings.places(watched.slot, row.position % watched.window, 1).start
            places.append(place)
        return places

    def segments(self, row: StepRow) -> tuple[Segment, ...]:
        """How a prompt row's tokens are cut in this step, in every layer alike; its table is not read.

        Called once per row and step, before the layers.
        """
        watched = self._watch(row)
        if watched is None:
            return (Segment(start=0, count=row.count, cached_before=row.cached),)
        segments = cut(row, watched.policy.budget)
        watched.lay_out(segments, row.position)
        # Only the first segment finds all layers alike, so its slots are listed in all of them at once.
        self._scores.open(watched, ALL, row.cached, row.position, segments[0].count)
        return segments

    def after_segment(self, layer: int, row: StepRow, segment: Segment, q_THD: Tensor, lse_TH: Tensor) -> None:
        """After a segment's attention in one layer: score it, and cut this layer back if that is due.

        Args:
            layer: which layer.
            row: as given to `segments`.
            segment: as `segments` gave it.
            q_THD: the segment's own rotated queries.
            lse_TH: fp32, their log-sum-exps from attention.
        """
        watched = self._watched.get(row.sequence) if row.observed else None
        if watched is None or watched.plan is None:
            return
        if watched.unlisted:
            self._scores.flush(watched, row.table, row.position)
        layers, first = slice(layer, layer + 1), row.position + segment.start
        if segment.start:
            self._scores.open(watched, layers, segment.cached_before, first, segment.count)
        queries = watched.policy.watch.queries
        if queries == "all":
            self._scores.add(watched, layers, (q_THD[None], lse_TH[None]), row.table, segment.live, first)
        elif queries == "last":
            self._look(watched, layer, row, watched.plan[segment.start], q_THD, lse_TH)
        if segment.evict_to is not None:
            self._shrink(watched, layers, row.table, segment.live, first + segment.count)

    def end_step(self, rows: Seq[StepRow]) -> None:
        """After every row's sequence was advanced: bring full rings into the ledgers and evict what is due."""
        for row in rows:
            watched = self._watched.get(row.sequence) if row.observed else None
            if watched is None:
                continue
            if watched.plan is not None:
                self._close_prompt(watched)
            else:
                self._after_decode(watched, row)
        self._verdicts.stage()
        self.counters.side_bytes = self.rings.num_bytes + sum(w.ledger.num_bytes for w in self._watched.values())

    def poll(self) -> None:
        """Note the policies whose wrong answers have become known; waits for nothing."""
        for sequence, line in self._verdicts.read():
            if sequence in self._watched:
                self.failed.setdefault(sequence, line)

    def _watch(self, row: StepRow) -> Watched | None:
        """What is known about a row's sequence; None if nobody watches it."""
        sequence = row.sequence
        if not (row.observed and sequence.evicts):
            return None
        watched = self._watched.get(sequence)
        if watched is None:
            policy = self._rules.policy(sequence.kv_policy)
            assert policy is not None, "admit marks only sequences with a policy"
            watched = self._begin_watching(sequence, policy, sequence.peak_slots)
        return watched

    def _begin_watching(self, sequence: Sequence, policy: EvictionPolicy, capacity: int) -> Watched:
        model = self._model
        watched = Watched(
            sequence=sequence,
            policy=policy,
            ledger=DeviceLedger(model.num_layers, model.num_kv_heads, capacity, self._storage.device),
            slot=self.rings.take(),
            prompt_cap=sequence.kv_cap_tokens,
        )
        self._verdicts.clear(watched.slot)
        self._watched[sequence] = watched
        return watched

    def _after_decode(self, watched: Watched, row: StepRow) -> None:
        """Count the row's one token; flush its full ring, evict if due."""
        assert row.count == 1, "a row of several tokens goes through segments"
        sequence, budget = watched.sequence, watched.policy.budget
        watched.unlisted += 1
        watched.pending += watched.policy.watch.queries == "all"
        evicts = row.ends_piece and due(sequence.num_tokens, sequence.prompt_len, sequence.cache_len, budget)
        if evicts or (watched.pending and watched.pending == self.ring_size):
            self._scores.flush(watched, row.table, sequence.num_tokens)
        if not evicts:
            return
        live = watched.ledger.length
        if watched.window:
            self._scores.look_through_ring(watched, ALL, row.table, live, sequence.num_tokens, watched.evicted_at)
        self._shrink(watched, ALL, row.table, live, sequence.num_tokens)
        watched.ledger.length = budget.tokens
        watched.evicted_at = sequence.num_tokens
        self._rules.record(sequence, budget, [live - budget.tokens], budget.tokens)

    def _close_prompt(self, watched: Watched) -> None:
        """Bring the host's books to where every layer now is."""
        assert watched.plan, "a row has tokens"
        segments = [planned.segment for planned in watched.plan.values()]
        watched.plan = None
        watched.ledger.length = segments[-1].left
        evicted = [segment.live - segment.left for segment in segments if segment.evict_to is not None]
        if evicted:
            self._rules.record(watched.sequence, watched.policy.budget, evicted, segments[-1].left)

    def _look(
        self, watched: Watched, layer: int, row: StepRow, planned: Planned, q_THD: Tensor, lse_TH: Tensor
    ) -> None:
        """A segment of a prompt whose policy looks through a window: keep its last queries, look if a round is due."""
        segment, scores, layers = planned.segment, self._scores, slice(layer, layer + 1)
        end = row.position + segment.start + segment.count
        count = min(segment.count, watched.window)
        if planned.stores or count < watched.window:
            scores.store(watched, layer, end - count, q_THD[-count:], lse_TH[-count:])
        if segment.evict_to is None:
            return
        if count < watched.window:
            scores.look_through_ring(watched, layers, row.table, segment.live, end, planned.evicted_at)
        else:
            last = (q_THD[None, -count:], lse_TH[None, -count:])
            scores.look(watched, layers, last, row.table, segment.live, scores.positions(end - count, count))

    def _shrink(self, watched: Watched, layers: slice, table_M: Tensor, live: int, num_tokens: int) -> None:
        """Leave the policy's choice in front, in the cache and in the ledger."""
        keep_LHK = self._decide(watched, layers, live, num_tokens)
        ledger = watched.ledger
        compact_layers(
            self._storage[layers],
            table_M,
            keep_LHK.flatten(0, 1),
            live,
            ledger.mass_LHC[layers],
            ledger.positions_LHC[layers],
        )

    def _decide(self, watched: Watched, layers: slice, live: int, num_tokens: int) -> Tensor:
        """Ask the policy; [L, H, budget] slots. Counts hold whatever it does: a broken one leaves the first slots."""
        sequence, budget = watched.sequence, watched.policy.budget.tokens
        shape = (*watched.ledger.mass_LHC[layers].shape[:2], budget)
        if sequence not in self.failed:
            try:
                shown = watched.ledger.shown(layers, live, num_tokens)
                keep = _slots_of(watched.policy.select(shown), shape, self._storage.device)
            except Exception as error:  # noqa: BLE001 - a policy is anybody's code; its request ends, the batch goes on
                self.failed[sequence] = failure_line(error)
            else:
                self._verdicts.judge(watched.slot, sequence, keep, live)
                return keep
        return torch.arange(budget, device=self._storage.device).expand(shape).contiguous()


def _ring_need(policy: EvictionPolicy) -> int:
    """Ring places that a policy needs, or is best served with."""
    return {"none": 0, "all": RING_QUERIES, "last": policy.watch.window}[policy.watch.queries]


def _slots_of(keep: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """The answer as int64 slots that lie together, or a refusal of what is no tensor of slots at all.

    The slots themselves are judged on the device.
    """
    if tuple(keep.shape) != shape:
        raise EngineError(f"it kept {tuple(keep.shape)} slots instead of {shape}")
    if keep.device != device or keep.is_floating_point():
        raise EngineError(f"it answered with {keep.dtype} on {keep.device}, not with integers on {device}")
    return keep.to(torch.int64).contiguous()
