"""`DeviceScores`: attention mass into the ledgers, by `score_layers`, from queries that wait in rings or were just fed.

Shapes: L layers, T queries, Hq query heads, D head dim, N live slots, M columns of a block table. `queries` are a pair:
rotated queries [L, T, Hq, D] and their log-sum-exps, fp32 [L, T, Hq].
"""

from __future__ import annotations

import torch
from torch import Tensor

from trtkit.engine.device.rings import DeviceRings
from trtkit.engine.device.watched import Watched
from trtkit.engine.device.window import visible_lse
from trtkit.kernels.paged import score_layers
from trtkit.spec.plan import Limits

ALL = slice(None)
PART_QUERIES = 640
"""Queries of a prompt that are scored at once: four parts of a long segment leave out three eighths of its square."""
Queries = tuple[Tensor, Tensor]


class DeviceScores:
    """Mass for the sequences of one cache, [L, blocks, 2, H, tokens_per_block, D]."""

    def __init__(self, storage: Tensor, rings: DeviceRings, limits: Limits) -> None:
        """Tables of positions and weights lie on the device, so that no step copies any there."""
        self._storage = storage
        self._rings = rings
        self._longest = max(limits.max_num_tokens, limits.max_seq_len) + 1
        self._counting = torch.arange(self._longest, dtype=torch.int32, device=storage.device)
        self._weights: dict[float, Tensor] = {}

    def positions(self, first: int, count: int) -> Tensor:
        """`count` consecutive positions from `first` on; a view, int32 [count]."""
        return self._counting[first : first + count]

    def open(self, watched: Watched, layers: slice, slot: int, first: int, count: int) -> None:
        """List `count` tokens in some layers: slots from `slot` on, positions from `first` on."""
        watched.ledger.open(layers, slot, self.positions(first, count))

    def flush(self, watched: Watched, table_M: Tensor, num_tokens: int) -> None:
        """Bring waiting tokens and queries of all layers into the ledger; `num_tokens` were fed so far."""
        ledger = watched.ledger
        if watched.unlisted:
            self.open(watched, ALL, ledger.length, num_tokens - watched.unlisted, watched.unlisted)
            ledger.length += watched.unlisted
            watched.unlisted = 0
        if watched.pending:
            queries = self._ring(watched, ALL, watched.pending)
            self.add(watched, ALL, queries, table_M, ledger.length, num_tokens - watched.pending)
            watched.pending = 0

    def add(self, watched: Watched, layers: slice, queries: Queries, table_M: Tensor, live: int, first: int) -> None:
        """Add the mass that consecutive queries at positions from `first` on give; their keys are the last live ones.

        A long segment goes in parts: no part looks at keys that lie in its future as a whole.
        """
        count = queries[0].shape[1]
        for start in range(0, count, PART_QUERIES):
            part = slice(start, min(count, start + PART_QUERIES))
            asked = (queries[0][:, part], queries[1][:, part])
            self._add_part(watched, layers, asked, table_M, live - count + part.stop, first + start)

    def _add_part(
        self, watched: Watched, layers: slice, queries: Queries, table_M: Tensor, live: int, first: int
    ) -> None:
        count = queries[0].shape[1]
        decay = watched.policy.watch.decay
        score_layers(
            *queries,
            self._query_weights(decay, count),
            self._storage,
            table_M,
            live,
            watched.ledger.positions(layers, live),
            self.positions(first, count),
            layers=layers,
            out=watched.ledger.mass(layers, live),
            carry=decay**count,
        )

    def rehearse_piece(self, watched: Watched, count: int, table_M: Tensor, live: int) -> None:
        """Score a prompt's piece of nothing in one layer: so many queries at once are another compilation than a ring's."""
        queries, lse = self._rings.queries_LPHD, self._rings.lse_LPH
        asked = (queries.new_zeros((1, count, *queries.shape[2:])), lse.new_zeros((1, count, lse.shape[2])))
        self.add(watched, slice(0, 1), asked, table_M, live, live - count)

    def store(self, watched: Watched, layer: int, first: int, q_THD: Tensor, lse_TH: Tensor) -> None:
        """Keep queries at consecutive positions from `first` on, at their places modulo the policy's window."""
        start = first % watched.window
        before_wrap = min(q_THD.shape[0], watched.window - start)
        for place, part in ((start, slice(0, before_wrap)), (0, slice(before_wrap, q_THD.shape[0]))):
            if part.start < part.stop:
                places = self._rings.places(watched.slot, place, part.stop - part.start)
                self._rings.queries_LPHD[layer, places] = q_THD[part]
                self._rings.lse_LPH[layer, places] = lse_TH[part]

    def look_through_ring(
        self, watched: Watched, layers: slice, table_M: Tensor, live: int, num_tokens: int, evicted_at: int | None
    ) -> None:
        """Set the mass to what the last window of queries, all in the ring, gives to the keys as they are now.

        `evicted_at` is the position at which the last round fell, if any.
        """
        count = min(watched.window, num_tokens)
        first = num_tokens - count
        queries, lse = self._ring(watched, layers, count)
        asked = _rotated(self.positions(first, count), first % watched.window)
        if evicted_at is not None and first < evicted_at:
            # Some of these queries attended to keys that are gone.
            positions = watched.ledger.positions(layers, live)
            lse = visible_lse(queries, self._storage[layers], table_M, live, positions, asked)
        self.look(watched, layers, (queries, lse), table_M, live, asked)

    def look(
        self, watched: Watched, layers: slice, queries: Queries, table_M: Tensor, live: int, asked_T: Tensor
    ) -> None:
        """Set the mass to what queries at the positions `asked_T`, consecutive in any order, give."""
        decay = watched.policy.watch.decay
        weights = self._query_weights(decay, asked_T.shape[0])
        if decay != 1.0:
            weights = weights[(asked_T - asked_T.min()).long()]
        score_layers(
            *queries,
            weights,
            self._storage,
            table_M,
            live,
            watched.ledger.positions(layers, live),
            asked_T,
            layers=layers,
            out=watched.ledger.mass(layers, live),
        )

    def _ring(self, watched: Watched, layers: slice, count: int) -> Queries:
        """The first `count` places of a sequence's ring; views."""
        places = self._rings.places(watched.slot, 0, count)
        return self._rings.queries_LPHD[layers, places], self._rings.lse_LPH[layers, places]

    def _query_weights(self, decay: float, count: int) -> Tensor:
        """Weight of each of `count` consecutive queries, oldest first; a view. fp32 [count]."""
        stored = self._weights.get(decay)
        if stored is None:
            age = torch.arange(self._longest - 1, -1, -1, dtype=torch.float32, device=self._storage.device)
            stored = self._weights[decay] = torch.pow(decay, age)
        return stored[stored.shape[0] - count :]


def _rotated(asked: Tensor, start: int) -> Tensor:
    """Consecutive positions in the order of ring places, the first of them at place `start`."""
    count = asked.shape[0]
    return asked if start == 0 else torch.cat((asked[count - start :], asked[: count - start]))
