"""Eviction without a model: queries, keys and values are drawn once, so two engines' decisions can be held side by side.

A value's first number is its token's position, so what is live can be read back from the cache, layer by layer and head
by head. The reference is today's `EvictionObserver`, fed piece after piece; the device path is fed in any other cut.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from trtkit.engine.batch import RowInput, build_batch
from trtkit.engine.block_pool import BlockPool
from trtkit.engine.device.eviction import DeviceEviction
from trtkit.engine.eviction import EvictionObserver
from trtkit.engine.paged_cache import PagedCache
from trtkit.engine.scheduler import Scheduler
from trtkit.engine.sequence import Sequence, blocks_for
from trtkit.kernels.paged import PagedBatch, paged_decode_attention, paged_prefill_attention
from trtkit.spec.dtype import DType
from trtkit.spec.engine import Request
from trtkit.spec.kv import KVPolicySpec, parse_kv_policy
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Limits

BLOCK = 4
DIM = 8
LONGEST = 320


def stream_model(*, layers: int = 2, kv_heads: int = 2, group: int = 2) -> ModelSpec:
    return ModelSpec(
        name="streams",
        architecture="LlamaForCausalLM",
        num_layers=layers,
        hidden_size=DIM,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=DIM,
        intermediate_size=8,
        vocab_size=8,
        max_position_embeddings=LONGEST,
    )


@dataclass(frozen=True)
class Stream:
    """What a model would have computed for one request: q [L, T, Hq, D], k and v [L, T, H, D]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @classmethod
    def draw(cls, model: ModelSpec, seed: int, tokens: int = LONGEST) -> Stream:
        generator = torch.Generator().manual_seed(seed)
        shape = (model.num_layers, tokens)
        q = 2.5 * torch.randn(*shape, model.num_heads, DIM, generator=generator)
        k, v = (torch.randn(*shape, model.num_kv_heads, DIM, generator=generator) for _ in range(2))
        v[..., 0] = torch.arange(tokens)[:, None]
        return cls(q, k, v)


@dataclass(frozen=True)
class TabledRow:
    """A row as the device path lays it out."""

    sequence: Sequence
    start: int
    count: int
    position: int
    cached: int
    ends_piece: bool
    observed: bool
    table: torch.Tensor


class Side:
    """One cache with its books, and the sequences in it. Live slots beyond a sequence's own hold NaN."""

    def __init__(self, model: ModelSpec, *, blocks: int = 128, max_batch_size: int = 8, max_num_tokens: int = 256):
        limits = Limits(
            max_batch_size=max_batch_size, max_num_tokens=max_num_tokens, max_seq_len=LONGEST, tokens_per_block=BLOCK
        )
        self.model = model
        self.scheduler = Scheduler(limits, BlockPool(blocks))
        self.cache = PagedCache(model, blocks, BLOCK, DType.FP32, "cpu")
        for layer in self.cache.layers:
            layer.fill_(torch.nan)

    def room(self, sequence: Sequence, live: int) -> None:
        """Blocks for `live` slots."""
        needed = blocks_for(live, BLOCK) - len(sequence.block_table)
        if needed > 0:
            sequence.block_table += self.scheduler.pool.allocate(needed, sequence.request_id)

    def write(self, sequence: Sequence, stream: Stream, layer: int, position: int, slot: int, count: int) -> None:
        """Keys and values of `count` tokens into consecutive slots of one layer."""
        slots = np.arange(slot, slot + count)
        rows = self.cache.write_rows(np.asarray(sequence.block_table)[slots // BLOCK], slots % BLOCK)
        tokens = slice(position, position + count)
        both = torch.stack((stream.k[layer, tokens], stream.v[layer, tokens]), dim=1)
        self.cache.rows(layer).index_copy_(0, rows, both.reshape(-1, DIM))

    def kept(self, sequence: Sequence) -> list[list[list[int]]]:
        """Live positions per layer and KV head, ascending; also holds keys to the values they lie beside."""
        result = []
        for layer in range(self.model.num_layers):
            _, values = self.cache.read(layer, sequence.block_table, sequence.cache_len)
            result.append([sorted(row[:, 0].int().tolist()) for row in values])
        return result

    def release(self, sequence: Sequence) -> None:
        self.scheduler.pool.free(sequence.block_table, sequence.request_id)
        sequence.block_table.clear()


def make_sequence(name: str, prompt: int, output: int, kv: str, chunk_ends: tuple[int, ...] = ()) -> Sequence:
    request = Request(request_id=name, prompt_ids=(1,) * prompt, max_tokens=output)
    return Sequence(
        request=request, arrival=0, max_new_tokens=output, kv_policy=parse_kv_policy(kv), chunk_ends=chunk_ends
    )


class ReferenceSide(Side):
    """`EvictionObserver` over streams: one piece of one sequence per step."""

    def __init__(self, model: ModelSpec, piece, **limits):
        super().__init__(model, **limits)
        self.eviction = EvictionObserver(KVPolicySpec(), model, self.cache, self.scheduler, piece=piece)

    def feed(self, sequence: Sequence, stream: Stream, count: int) -> None:
        """The next `count` tokens, piece by piece."""
        end = sequence.num_tokens + count
        sequence.output_ids[:] = [0] * max(len(sequence.output_ids), end - sequence.prompt_len)
        while sequence.num_tokens < end:
            part = min(sequence.piece_end(), end) - sequence.num_tokens
            self._piece(sequence, stream, part)

    def _piece(self, sequence: Sequence, stream: Stream, count: int) -> None:
        self.room(sequence, sequence.cache_len + count)
        end = sequence.num_tokens + count
        item = RowInput(sequence=sequence, token_ids=(0,) * count, ends_piece=end == sequence.piece_end())
        batch = build_batch([item], self.cache, torch.float32)
        for layer in range(self.model.num_layers):
            self.write(sequence, stream, layer, sequence.num_tokens, sequence.cache_len, count)
            self.eviction.observe(layer, stream.q[layer, sequence.num_tokens : end], batch)
        sequence.advance(count)
        self.eviction.end_step(batch)


class DeviceSide(Side):
    """`DeviceEviction` over streams: any number of tokens of any number of sequences per step."""

    def __init__(self, model: ModelSpec, piece, *, kv: str = "full", ring: int = 32, **limits):
        super().__init__(model, **limits)
        self.eviction = DeviceEviction(parse_kv_policy(kv), model, self.scheduler, piece=piece, ring_queries=ring)
        self.eviction.attach(self.cache.storage, self.scheduler.limits.max_batch_size)
        self.outputs: dict[Sequence, list[torch.Tensor]] = {}

    def step(self, *feeds: tuple[Sequence, Stream, int], observed: bool = True) -> None:
        """One step. Rows of one token go through the rings, the others through segments."""
        rows = []
        start = 0
        for sequence, _, count in sorted(feeds, key=lambda feed: feed[2] > 1):
            self.room(sequence, sequence.capped(sequence.cache_len + count) if observed else sequence.cache_len + count)
            end = sequence.num_tokens + count
            sequence.output_ids[:] = [0] * max(len(sequence.output_ids), end - sequence.prompt_len)
            table = torch.tensor(sequence.block_table, dtype=torch.int32)
            rows.append(
                TabledRow(
                    sequence=sequence,
                    start=start,
                    count=count,
                    position=sequence.num_tokens,
                    cached=sequence.cache_len,
                    ends_piece=end == sequence.piece_end(),
                    observed=observed,
                    table=table,
                )
            )
            start += count
        streams = {sequence: stream for sequence, stream, _ in feeds}
        singles = [row for row in rows if row.count == 1]
        places = self.eviction.ring_places(singles)
        cuts = [(row, self.eviction.segments(replace(row, table=None))) for row in rows if row.count > 1]
        for layer in range(self.model.num_layers):
            for row, place in zip(singles, places, strict=True):
                self._decode(layer, row, streams[row.sequence], place)
            for row, segments in cuts:
                self._prompt(layer, row, segments, streams[row.sequence])
        for row in rows:
            row.sequence.advance(row.count)
        self.eviction.end_step(rows)
        self.eviction.poll()

    def _decode(self, layer: int, row: TabledRow, stream: Stream, place: int) -> None:
        self.write(row.sequence, stream, layer, row.position, row.cached, 1)
        query = stream.q[layer, row.position : row.position + 1]
        self._attended(layer, row, query, row.cached + 1, torch.tensor([place], dtype=torch.int32))

    def _attended(self, layer, row, query, length, place):
        rings = self.eviction.rings
        batch = self._batch(layer, row, length)
        out, _ = paged_decode_attention(query, batch, ring_lse=rings.lse_LPH[layer], ring_index_B=place)
        if place >= 0:
            rings.queries_LPHD[layer, place.long()] = query
        self.outputs.setdefault(row.sequence, []).append(out)

    def _prompt(self, layer: int, row: TabledRow, segments, stream: Stream) -> None:
        for segment in segments:
            first = row.position + segment.start
            self.write(row.sequence, stream, layer, first, segment.cached_before, segment.count)
            query = stream.q[layer, first : first + segment.count]
            _, lse = paged_prefill_attention(
                query,
                torch.tensor([0, segment.count], dtype=torch.int32),
                torch.tensor([segment.cached_before], dtype=torch.int32),
                self._batch(layer, row, segment.live),
                max_count=segment.count,
            )
            self.eviction.after_segment(layer, row, segment, query, lse)

    def _batch(self, layer: int, row: TabledRow, length: int) -> PagedBatch:
        lengths = torch.tensor([length], dtype=torch.int32)
        return PagedBatch(cache=self.cache.layers[layer], blocks_BM=row.table[None], lengths_B=lengths)


def random_cut(total: int, rng: np.random.Generator, most: int) -> list[int]:
    """`total` in parts of 1 to `most`."""
    parts = []
    while sum(parts) < total:
        parts.append(min(int(rng.integers(1, most + 1)), total - sum(parts)))
    return parts
