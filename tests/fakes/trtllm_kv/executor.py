"""A small PyTorch-backend executor: one model, in-flight batching, and the order of calls TensorRT-LLM's loops have.

Per step: schedule, `prepare_resources`, metadata with *logical* cached counts, forward with rotation outside the
operator at logical positions, sampling, ended requests freed, then `update_resources`; under overlap the last three are
those of the step before. Weights are the embedded
engine's, loaded by its loader; attention and caching share nothing with it.
"""

from __future__ import annotations

import enum
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from fakes.trtllm_kv import v12

from trtkit.engine.llama import logits, rms_norm
from trtkit.engine.rope import RopeTable, rotate_
from trtkit.engine.weights import weights_from_tensors
from trtkit.spec.checkpoint import layer_prefix
from trtkit.spec.dtype import DType


class LlmRequestState(enum.Enum):
    CONTEXT_INIT = 0
    GENERATION_IN_PROGRESS = 1
    GENERATION_TO_COMPLETE = 2
    GENERATION_COMPLETE = 3


@dataclass(eq=False)
class LlmRequest:
    py_request_id: int
    tokens: list[int]
    max_new_tokens: int
    prompt_len: int = 0
    output: list[int] = field(default_factory=list)
    stop_ids: tuple[int, ...] = ()
    is_dummy: bool = False
    py_num_compressed_tokens: int = 0
    state: LlmRequestState = LlmRequestState.CONTEXT_INIT
    context_current_position: int = 0
    context_chunk_size: int = 0
    chunk_ends: list[int] = field(default_factory=list)
    ahead: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.prompt_len = self.prompt_len or len(self.tokens)

    @property
    def known(self):
        """Tokens the device knows: under overlap, more than the host does."""
        return self.tokens + self.ahead

    @property
    def py_prompt_len(self):
        return self.prompt_len

    @property
    def py_max_new_tokens(self):
        return self.max_new_tokens

    @property
    def is_first_context_chunk(self):
        return self.context_current_position == 0

    @property
    def context_remaining_length(self):
        return self.prompt_len - self.context_current_position

    def move_to_next_context_chunk(self):
        self.context_current_position += self.context_chunk_size
        self.context_chunk_size = 0
        self.chunk_ends.append(self.context_current_position)

    def pause(self):
        """Loses its cache: what was generated becomes part of the prompt."""
        self.max_new_tokens -= len(self.tokens) - self.prompt_len
        self.prompt_len = len(self.tokens)
        self.context_current_position = self.context_chunk_size = 0
        self.state = LlmRequestState.CONTEXT_INIT


@dataclass
class ScheduledRequests:
    context_requests: list[LlmRequest]
    generation_requests: list[LlmRequest]
    paused_requests: list[LlmRequest] = field(default_factory=list)

    def __post_init__(self):
        """Which prompts end with this step is known when it is scheduled, and asked for after it."""
        self.context_requests_last_chunk = [
            r for r in self.context_requests if r.context_chunk_size == r.context_remaining_length
        ]

    def all_requests(self):
        return self.context_requests + self.generation_requests


class Ranks:
    """Tensor parallelism with threads: `add` gives every rank the sum of what all ranks brought."""

    def __init__(self, size):
        self.size = size
        self._barrier = threading.Barrier(size, timeout=60)
        self._parts = [None] * size

    def add(self, rank, part):
        self._parts[rank] = part
        self._barrier.wait()
        total = sum(self._parts)
        self._barrier.wait()
        return total

    def run(self, executors, requests_of_a_rank):
        """Every executor in a thread of its own, over requests of its own."""
        with ThreadPoolExecutor(self.size) as pool:
            started = [pool.submit(executor.run, *requests_of_a_rank()) for executor in executors]
            return [run.result() for run in started]


class Model:
    """Decoder layers around the backend's attention; takes logical positions. A rank has its share of the heads."""

    def __init__(  # noqa: PLR0917 - the runtime's parts meet here
        self, spec, tensors, attention_class, max_positions, sparse_attention_config=None, rank=0, ranks=None
    ):
        self.rank, self.ranks = rank, ranks or Ranks(1)
        self.spec = spec
        self.weights = weights_from_tensors(spec, tensors, dtype=DType.FP32)
        names = [f"{layer_prefix(layer)}attention.dense.weight" for layer in range(spec.num_layers)]
        self.dense = [tensors[name].chunk(self.ranks.size, 1)[rank] for name in names]
        self.rope = RopeTable(spec.rope, spec.head_dim, max_positions, torch.float32, "cpu")
        options = {} if sparse_attention_config is None else {"sparse_attention_config": sparse_attention_config}
        self.attention = [
            attention_class(
                layer,
                spec.num_heads // self.ranks.size,
                spec.head_dim,
                spec.num_kv_heads // self.ranks.size,
                **options,
            )
            for layer in range(spec.num_layers)
        ]

    def forward(self, token_ids, position_ids, metadata):
        spec, weights = self.spec, self.weights
        x = weights.embedding[token_ids]
        cos_sin = self.rope.at(position_ids)
        for layer, dense, attention in zip(weights.layers, self.dense, self.attention, strict=True):
            h = rms_norm(x, layer.input_norm, spec.norm_epsilon)
            qkv = layer.qkv(h)
            heads = qkv.view(-1, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
            rotate_(heads[:, : -spec.num_kv_heads], *cos_sin)
            out = attention.forward(self._own(heads), None, None, metadata)
            x = x + self.ranks.add(self.rank, F.linear(out, dense))
            gate, up = layer.gate_up(rms_norm(x, layer.post_norm, spec.norm_epsilon)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
        # One position per sequence goes on to the vocabulary.
        last = metadata.seq_lens.cumsum(0) - 1
        return logits(weights, x[last])

    def _own(self, heads):
        """This rank's queries, keys and values of the fused projection [T, heads, D], fused again."""
        sizes = (self.spec.num_heads, self.spec.num_kv_heads, self.spec.num_kv_heads)
        parts = [part.chunk(self.ranks.size, 1)[self.rank] for part in heads.split(sizes, 1)]
        return torch.cat(parts, 1).flatten(1)


class Executor:
    """First come, first served. `overlap` prepares and runs a step before the host hears of the last one's tokens.

    Capacity is MAX_UTILIZATION (who does not fit is paused, latest first) or GUARANTEED_NO_EVICT (nobody starts without
    blocks for all it may ever need). With `chunked` a prompt takes what room a step of `max_num_tokens` has left.
    """

    def __init__(
        self,
        model,
        manager,
        metadata_class,
        *,
        max_batch_size=4,
        max_num_tokens=8192,
        compression=None,
        overlap=False,
        chunked=False,
        capacity="MAX_UTILIZATION",
    ):
        self.model, self.manager, self.metadata_class = model, manager, metadata_class
        self.max_batch_size, self.max_num_tokens = max_batch_size, max_num_tokens
        self.compression, self.overlap, self.chunked, self.capacity = compression, overlap, chunked, capacity
        self.waiting, self.running, self.last = [], [], None
        self.pauses, self.peak_running, self.held, self.peak_blocks = 0, 0, [], 0

    def run(self, *requests):
        self.waiting = list(requests)
        while self.waiting or self.running or self.last:
            self.step()
            self.manager.impl.check()
        return {request.py_request_id: request.output for request in requests}

    def step(self):
        batch = self._schedule()
        for request in batch.paused_requests:
            self.free(request)
        current = None
        if batch.all_requests():
            self.prepare(batch)
            self.peak_blocks = max(self.peak_blocks, self.manager.impl.used)
            current = (batch, *self.forward(batch))
        if self.overlap:
            done, self.last = self.last, current
            if done is not None:
                self._append(done)
            self._pause(batch)
            if current is not None:
                self._move_on(current)
        else:
            self._pause(batch)
            done = current
            if done is not None:
                self._move_on(done)
                self._append(done)
        if done is not None:
            # As upstream: ended requests are freed before the managers' update.
            self._respond(done[0])
            self.update(done[0], done[1])
        self.held.append(sum(self.manager.impl.num_tokens(r.py_request_id) for r in self.running))

    def prepare(self, batch):
        self.manager.prepare_resources(batch)

    def update(self, batch, metadata):
        self.manager.update_resources(batch, metadata, 4)

    def metadata(self, batch):
        requests, contexts = batch.all_requests(), batch.context_requests
        chunks = [r.context_chunk_size for r in contexts]
        past_seen = [r.context_current_position for r in contexts]
        past_seen += [len(r.known) - 1 - r.py_num_compressed_tokens for r in batch.generation_requests]
        return self.metadata_class(
            max_num_sequences=self.max_batch_size,
            kv_cache_manager=self.manager,
            request_ids=[r.py_request_id for r in requests],
            prompt_lens=chunks + [r.prompt_len for r in batch.generation_requests],
            seq_lens=torch.tensor(chunks + [1] * len(batch.generation_requests)),
            num_contexts=len(contexts),
            kv_cache_params=v12.KVCacheParams(use_cache=True, num_cached_tokens_per_seq=past_seen),
            runtime_features=v12.AttentionRuntimeFeatures(chunked_prefill=self.chunked),
        )

    def forward(self, batch):
        metadata = self.metadata(batch)
        starts = [r.context_current_position for r in batch.context_requests]
        fed = [r.tokens[s : s + r.context_chunk_size] for r, s in zip(batch.context_requests, starts, strict=True)]
        fed += [r.known[-1:] for r in batch.generation_requests]
        starts += [len(r.known) - 1 for r in batch.generation_requests]
        positions = torch.cat([torch.arange(s, s + len(t)) for s, t in zip(starts, fed, strict=True)])
        metadata.prepare()
        ids = torch.tensor([token for tokens in fed for token in tokens])
        sampled = self.model.forward(ids, positions, metadata).argmax(-1).tolist()
        ends = [*[r in batch.context_requests_last_chunk for r in batch.context_requests]]
        ends += [True] * len(batch.generation_requests)
        tokens = {
            r: token
            for r, token, end in zip(batch.all_requests(), sampled, ends, strict=True)
            if end and not r.is_dummy
        }
        for request, token in tokens.items():
            request.ahead.append(token)
        return metadata, tokens

    def _schedule(self):
        paused = self._make_room()
        generation = [r for r in self.running if r.state is LlmRequestState.GENERATION_IN_PROGRESS]
        context = [r for r in self.running if r.state is LlmRequestState.CONTEXT_INIT]
        room = self.max_num_tokens - len(generation)
        for request in context:
            room -= self._take(request, room)
        free = len(self.manager.impl.free) - self._reserved(self.running)
        while self.waiting and len(self.running) < self.max_batch_size:
            request = self.waiting[0]
            needed = self._blocks_to_start(request)
            if needed > free or not self._take(request, room):
                break
            room -= request.context_chunk_size
            free -= needed
            context.append(self.waiting.pop(0))
            self.running.append(request)
        self.peak_running = max(self.peak_running, len(self.running))
        return ScheduledRequests([r for r in context if r.context_chunk_size], generation, paused)

    def _take(self, request, room):
        """Give a prompt its next chunk: whole blocks of what is left of the step, or all that is left of the prompt."""
        left = request.context_remaining_length
        if left <= room:
            request.context_chunk_size = left
        elif self.chunked:
            request.context_chunk_size = room - room % self.manager.tokens_per_block
        else:
            assert left <= self.max_num_tokens, "a prompt above max_num_tokens is refused without chunked prefill"
            request.context_chunk_size = 0
        return request.context_chunk_size

    def _blocks_to_start(self, request):
        block = self.manager.tokens_per_block
        if self.capacity == "GUARANTEED_NO_EVICT":
            return -(-(request.prompt_len + request.max_new_tokens) // block)
        return -(-(request.prompt_len + 1) // block)

    def _reserved(self, requests):
        """Blocks that running requests will still take: one step's, or all there are to completion."""
        pool = self.manager.impl
        if self.capacity == "GUARANTEED_NO_EVICT":
            return sum(self._blocks_to_start(r) - len(pool.sequences[r.py_request_id][0]) for r in requests)
        return self._growing(requests)

    def _growing(self, requests):
        pool = self.manager.impl
        growing = [r for r in requests if r.state is LlmRequestState.GENERATION_IN_PROGRESS]
        steps = 2 if self.overlap else 1  # upstream looks two steps ahead
        block = pool.tokens_per_block
        return sum(
            -(-(pool.num_tokens(r.py_request_id) + steps) // block) - len(pool.sequences[r.py_request_id][0])
            for r in growing
        )

    def _make_room(self):
        paused = []
        free = len(self.manager.impl.free)
        while self._growing(self.running) > free:
            victim = self.running.pop()
            free += len(self.manager.impl.sequences[victim.py_request_id][0])
            paused.append(victim)
            self.pauses += 1
        return paused

    def _pause(self, batch):
        for victim in batch.paused_requests:
            if victim.state is not LlmRequestState.GENERATION_COMPLETE:
                victim.pause()
                self.waiting.insert(0, victim)

    def free(self, request):
        self.manager.free_resources(request)

    def _move_on(self, current):
        """What is known once a step has been enqueued: where prompts stand, and who needs no further step."""
        batch, _, tokens = current
        for request in batch.context_requests:
            request.move_to_next_context_chunk()
        for request in tokens:
            if request.state is LlmRequestState.GENERATION_COMPLETE:
                continue
            request.state = LlmRequestState.GENERATION_IN_PROGRESS
            if self.overlap and len(request.known) - request.prompt_len >= request.max_new_tokens:
                request.state = LlmRequestState.GENERATION_TO_COMPLETE

    def _append(self, done):
        """The host hears of a step's tokens; those of a request that has ended meanwhile are dropped."""
        for request, token in done[2].items():
            request.ahead.pop(0)
            if request.state is LlmRequestState.GENERATION_COMPLETE:
                continue
            request.tokens.append(token)
            request.output.append(token)
            if token in request.stop_ids or len(request.tokens) - request.prompt_len == request.max_new_tokens:
                request.state = LlmRequestState.GENERATION_COMPLETE

    def _respond(self, batch):
        for request in batch.all_requests():
            if request.state is LlmRequestState.GENERATION_COMPLETE and request in self.running:
                self.running.remove(request)
                self.free(request)


@dataclass
class Mapping:
    tp_size: int = 1
    pp_size: int = 1
    rank: int = 0


def build_v12(
    spec,
    tensors,
    config,
    *,
    max_seq_len=256,
    tokens_per_block=4,
    blocks=256,
    max_batch_size=4,
    max_num_tokens=8192,
    rank=0,
    ranks=None,
    estimating=False,
    **running,
):
    """The way 1.2 puts it together: classes come from the dispatch functions each module holds."""
    util = sys.modules[f"{v12.TORCH}.pyexecutor._util"]
    backends = sys.modules[f"{v12.TORCH}.attention_backend.utils"]
    resources = sys.modules[f"{v12.TORCH}.pyexecutor.resource_manager"]
    attention, manager_class, extra = v12.TrtllmAttention, resources.KVCacheManager, {}
    if config is not None:
        attention = backends.get_trtllm_sparse_attn_attention_backend(config)
        manager_class = util.get_sparse_attn_kv_cache_manager(config)
        extra = {"sparse_attn_config": config}
    manager = manager_class(
        v12.KvCacheConfig(enable_block_reuse=False, max_tokens=blocks * tokens_per_block),
        "SELF",
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads // (ranks.size if ranks else 1),
        head_dim=spec.head_dim,
        tokens_per_block=tokens_per_block,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        mapping=Mapping(rank=rank, tp_size=ranks.size if ranks else 1),
        dtype=v12.DataType.FLOAT,
        max_num_tokens=max_num_tokens,
        spec_config=None,
        model_config=None,
        max_beam_width=1,
        kv_connector_manager=None,
        is_estimating_kv_cache=estimating,
        execution_stream=None,
        **extra,
    )
    model = Model(spec, tensors, attention, max_seq_len, config, rank, ranks)
    options = {"max_batch_size": max_batch_size, "max_num_tokens": max_num_tokens, **running}
    return Executor(model, manager, attention.Metadata, **options)
