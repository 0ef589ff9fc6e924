"""A small PyTorch-backend executor: one model, in-flight batching, and the order of calls TensorRT-LLM's loop has.

Per step: schedule, `prepare_resources`, metadata with *logical* cached counts, forward with rotation outside the
operator at logical positions, sampling, ended requests freed, then `update_resources`. Weights are the embedded
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
    GENERATION_COMPLETE = 2


@dataclass(eq=False)
class LlmRequest:
    py_request_id: int
    tokens: list[int]
    max_new_tokens: int
    prompt_len: int = 0
    output: list[int] = field(default_factory=list)
    is_first_context_chunk: bool = True
    is_dummy: bool = False
    py_num_compressed_tokens: int = 0
    state: LlmRequestState = LlmRequestState.CONTEXT_INIT
    ahead: list[int] = field(default_factory=list)

    @property
    def known(self):
        """Tokens the device knows: under overlap, more than the host does."""
        return self.tokens + self.ahead

    def __post_init__(self):
        self.prompt_len = self.prompt_len or len(self.tokens)

    @property
    def py_prompt_len(self):
        return self.prompt_len

    @property
    def py_max_new_tokens(self):
        return self.max_new_tokens

    def pause(self):
        """Loses its cache: what was generated becomes part of the prompt."""
        self.max_new_tokens -= len(self.tokens) - self.prompt_len
        self.prompt_len = len(self.tokens)
        self.state = LlmRequestState.CONTEXT_INIT


@dataclass
class ScheduledRequests:
    context_requests: list[LlmRequest]
    generation_requests: list[LlmRequest]

    @property
    def context_requests_last_chunk(self):
        return self.context_requests


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
    """FCFS, MAX_UTILIZATION: who does not fit is paused, latest first."""

    def __init__(self, model, manager, metadata_class, *, max_batch_size=4, compression=None):
        self.model, self.manager, self.metadata_class = model, manager, metadata_class
        self.max_batch_size = max_batch_size
        self.compression = compression
        self.waiting, self.running = [], []
        self.pauses, self.peak_running, self.held = 0, 0, []

    def run(self, *requests):
        self.waiting = list(requests)
        while self.waiting or self.running:
            self.step()
            self.manager.impl.check()
        return {request.py_request_id: request.output for request in requests}

    def step(self):
        batch = self._schedule()
        self.prepare(batch)
        metadata, sampled = self.forward(batch)
        self._sample(batch, sampled)
        self.update(batch, metadata)
        self.held.append(sum(self.manager.impl.num_tokens(r.py_request_id) for r in self.running))

    def prepare(self, batch):
        self.manager.prepare_resources(batch)

    def update(self, batch, metadata):
        self.manager.update_resources(batch, metadata, 4)

    def metadata(self, batch):
        requests = batch.context_requests + batch.generation_requests
        contexts = len(batch.context_requests)
        past_seen = [len(r.known) - 1 - r.py_num_compressed_tokens for r in batch.generation_requests]
        return self.metadata_class(
            max_num_sequences=self.max_batch_size,
            kv_cache_manager=self.manager,
            request_ids=[r.py_request_id for r in requests],
            prompt_lens=[r.prompt_len for r in requests],
            seq_lens=torch.tensor([len(r.tokens) for r in batch.context_requests] + [1] * len(requests[contexts:])),
            num_contexts=contexts,
            kv_cache_params=v12.KVCacheParams(use_cache=True, num_cached_tokens_per_seq=[0] * contexts + past_seen),
        )

    def forward(self, batch):
        metadata = self.metadata(batch)
        fed = [r.tokens for r in batch.context_requests] + [r.known[-1:] for r in batch.generation_requests]
        starts = [0] * len(batch.context_requests) + [len(r.known) - 1 for r in batch.generation_requests]
        positions = torch.cat([torch.arange(s, s + len(t)) for s, t in zip(starts, fed, strict=True)])
        metadata.prepare()
        ids = torch.tensor([token for tokens in fed for token in tokens])
        return metadata, self.model.forward(ids, positions, metadata)

    def _schedule(self):
        self._make_room()
        generation = list(self.running)
        context, free = [], len(self.manager.impl.free) - self._growing(generation)
        while self.waiting and len(generation) + len(context) < self.max_batch_size:
            needed = -(-(len(self.waiting[0].tokens) + 1) // self.manager.tokens_per_block)
            if needed > free:
                break
            free -= needed
            context.append(self.waiting.pop(0))
        self.running += context
        self.peak_running = max(self.peak_running, len(self.running))
        return ScheduledRequests(context, generation)

    def _growing(self, requests):
        pool = self.manager.impl
        return sum(pool.num_tokens(r.py_request_id) % pool.tokens_per_block == 0 for r in requests)

    def _make_room(self):
        while self._growing(self.running) > len(self.manager.impl.free):
            victim = self.running.pop()
            self.free(victim)
            victim.pause()
            self.waiting.insert(0, victim)
            self.pauses += 1

    def free(self, request):
        self.manager.free_resources(request)

    def _sample(self, batch, sampled):
        for request, row in zip(batch.context_requests + batch.generation_requests, sampled, strict=True):
            token = int(row.argmax())
            request.tokens.append(token)
            request.output.append(token)
            request.state = LlmRequestState.GENERATION_IN_PROGRESS
            if len(request.tokens) - request.prompt_len == request.max_new_tokens:
                request.state = LlmRequestState.GENERATION_COMPLETE
                self.running.remove(request)
                # As upstream: ended requests are freed before the managers' update.
                self.free(request)


@dataclass
class Mapping:
    tp_size: int = 1
    pp_size: int = 1


def build_v12(
    spec, tensors, config, *, max_seq_len=256, tokens_per_block=4, blocks=256, max_batch_size=4, rank=0, ranks=None
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
        v12.KvCacheConfig(enable_block_reuse=False),
        "SELF",
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads // (ranks.size if ranks else 1),
        head_dim=spec.head_dim,
        tokens_per_block=tokens_per_block,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
        mapping=Mapping(),
        dtype=v12.DataType.FLOAT,
        blocks=blocks,
        **extra,
    )
    model = Model(spec, tensors, attention, max_seq_len, config, rank, ranks)
    return Executor(model, manager, attention.Metadata, max_batch_size=max_batch_size)
