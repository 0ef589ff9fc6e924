"""`tensorrt_llm` 1.3 and later as modules in memory: KV cache manager V2 and the compression manager's life cycle."""

from __future__ import annotations

from typing import Annotated, Literal

import pydantic
from fakes.trtllm_kv import v12
from fakes.trtllm_kv.executor import Executor, Mapping, Model
from fakes.trtllm_kv.v12 import TORCH, StrictBaseModel


class KvCacheCompressionConfig(StrictBaseModel):
    algorithm: str

    @property
    def changes_physical_kv_length(self):
        return False

    def supports_block_reuse(self):
        return False

    def supports_speculative_decoding(self):
        return False


class TriAttentionConfig(KvCacheCompressionConfig):
    algorithm: Literal["triattention"] = "triattention"
    calibration_path: str


class QuantizationConfig(KvCacheCompressionConfig):
    algorithm: Literal["quantization"] = "quantization"


class KVCache:
    """One sequence of V2. Shrinking `capacity` detaches tail pages."""

    def __init__(self, pool, request_id):
        self.pool, self.request_id = pool, request_id
        self.history_length = 0
        self.is_active = True
        pool.add_sequence(request_id, 0, 1, None)

    @property
    def capacity(self):
        return self.pool.num_tokens(self.request_id)

    def resize(self, capacity, history_length=None):
        assert self.is_active, "a suspended cache cannot be resized"
        assert capacity >= (self.history_length if history_length is None else history_length)
        grow = capacity - self.capacity
        for _ in range(grow):
            self.pool.add_token(self.request_id)
        if grow < 0:
            self.pool.rewind_kv_cache(self.request_id, -grow)
        if history_length is not None:
            self.history_length = history_length
        return True


class KVCacheManagerV2(v12.KVCacheManager):
    enable_block_reuse = False
    max_beam_width = 1
    num_extra_kv_tokens = 0
    max_total_draft_tokens = 0
    kv_compression_manages_history = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kv_cache_map: dict[int, KVCache] = {}

    def prepare_resources(self, scheduled_batch):
        for request in scheduled_batch.context_requests:
            if request.is_first_context_chunk:
                self.kv_cache_map[request.py_request_id] = KVCache(self.impl, request.py_request_id)
            # V2 makes room chunk by chunk.
            self.kv_cache_map[request.py_request_id].resize(
                request.context_current_position + request.context_chunk_size
            )
        for request in scheduled_batch.generation_requests:
            cache = self.kv_cache_map[request.py_request_id]
            cache.resize(cache.capacity + 1)

    def update_resources(self, scheduled_batch, attn_metadata=None, kv_cache_dtype_byte_size=None):
        for request in scheduled_batch.context_requests:
            if request.py_request_id in self.kv_cache_map:
                self.kv_cache_map[request.py_request_id].history_length = request.context_current_position
        assert self.kv_compression_manages_history

    def free_resources(self, request, pin_on_release=False):
        del self.kv_cache_map[request.py_request_id]
        self.impl.remove_sequence(request.py_request_id, request, pin_on_release)

    def get_buffers(self, layer_idx, kv_layout="NHD"):
        return super().get_buffers(layer_idx, kv_layout)


class KVCacheCompressionManager:
    """The adapter between resource-manager calls and the five hooks."""

    def __init__(self, config, kv_cache_manager=None, draft_kv_cache_manager=None):
        self.config = config
        self.kv_cache_manager = None
        if kv_cache_manager is not None:
            self.bind_kv_cache_managers(kv_cache_manager, draft_kv_cache_manager)

    def bind_kv_cache_managers(self, target, draft=None):
        assert isinstance(target, KVCacheManagerV2)
        assert draft is None
        self.kv_cache_manager = target
        target.kv_compression_manages_history = self.config.changes_physical_kv_length

    def prepare_resources(self, scheduled_batch):
        for request in scheduled_batch.context_requests:
            if request.is_first_context_chunk:
                self.on_request_init(request)
        self.on_generation_step_begin(scheduled_batch)

    def update_resources(self, scheduled_batch):
        if scheduled_batch.context_requests_last_chunk:
            self.on_context_step_end(scheduled_batch.context_requests_last_chunk)
        self.on_generation_step_end(scheduled_batch)

    def free_resources(self, request):
        self.on_request_finish(request)

    def on_request_init(self, request, **kwargs):
        """No-op, as upstream; so are the others."""

    def on_context_step_end(self, requests, **kwargs): ...

    def on_generation_step_begin(self, scheduled_batch, **kwargs): ...

    def on_generation_step_end(self, scheduled_batch, **kwargs): ...

    def on_request_finish(self, request, **kwargs): ...


def create_kv_cache_compression_manager(config, kv_cache_manager=None, draft_kv_cache_manager=None, **kwargs):
    raise ValueError(f"unknown compression algorithm {config.algorithm}")


def validate_kv_cache_compression_compatibility(config, kv_cache_config, spec_config):
    raise ValueError(f"unknown compression algorithm {config.algorithm}")


MOVED = {
    f"{TORCH}.attention_backend": f"{TORCH}.attention",
    f"{TORCH}.attention_backend.trtllm": f"{TORCH}.attention.backends.trtllm",
    f"{TORCH}.pyexecutor.kv_cache_manager_v2": f"{TORCH}.pyexecutor.kv_cache.kv_cache_manager_v2",
}


def later_modules():
    """As in the second half of 2026: the same names in other modules."""
    contents = {MOVED.get(name, name): attributes for name, attributes in modules().items()}
    contents |= {f"{TORCH}.attention.backends": {}, f"{TORCH}.pyexecutor.kv_cache": {}}
    return dict(sorted(contents.items()))


def modules():
    """Fresh classes where the adapter changes them: the arguments' union and attention's forward."""

    class TorchLlmArgs(StrictBaseModel):
        model: str
        kv_cache_compression_config: (
            Annotated[TriAttentionConfig | QuantizationConfig, pydantic.Field(discriminator="algorithm")] | None
        ) = None

    class TrtllmAttention(v12.TrtllmAttention):
        def forward(self, q, k, v, metadata, forward_args=None, **kwargs):
            return super().forward(q, k, v, metadata, **kwargs)

    return {
        "tensorrt_llm": {"__version__": "1.3.0rc30"},
        "tensorrt_llm.llmapi": {},
        "tensorrt_llm.llmapi.llm_args": {
            "KvCacheCompressionConfig": KvCacheCompressionConfig,
            "TorchLlmArgs": TorchLlmArgs,
        },
        TORCH: {},
        f"{TORCH}.attention_backend": {},
        f"{TORCH}.attention_backend.trtllm": {"TrtllmAttention": TrtllmAttention},
        f"{TORCH}.pyexecutor": {},
        f"{TORCH}.pyexecutor.resource_manager": {"KVCacheCompressionManager": KVCacheCompressionManager},
        f"{TORCH}.pyexecutor.kv_cache_manager_v2": {"KVCacheManagerV2": KVCacheManagerV2},
        f"{TORCH}.pyexecutor._util": {
            "create_kv_cache_compression_manager": create_kv_cache_compression_manager,
            "validate_kv_cache_compression_compatibility": validate_kv_cache_compression_compatibility,
        },
    }


class CompressionExecutor(Executor):
    """The compression manager comes after the KV cache manager, in every call."""

    def prepare(self, batch):
        super().prepare(batch)
        self.compression.prepare_resources(batch)

    def update(self, batch, metadata):
        super().update(batch, metadata)
        self.compression.update_resources(batch)

    def free(self, request):
        super().free(request)
        self.compression.free_resources(request)


def build_v13(util, attention, spec, tensors, config, *, late=False, running=None, **options):
    """Manager first or compression first (`late`), as older and newer releases do; `running` is the executor's."""
    settings = {"tokens_per_block": 4, "max_seq_len": 256, "max_batch_size": 4, **options}
    blocks = settings.pop("blocks", 256)
    manager = KVCacheManagerV2(
        v12.KvCacheConfig(enable_block_reuse=False, max_tokens=blocks * settings["tokens_per_block"]),
        "SELF",
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        mapping=Mapping(),
        dtype=v12.DataType.FLOAT,
        **settings,
    )
    if late:
        compression = util.create_kv_cache_compression_manager(config, pretrained_config=object())
        compression.bind_kv_cache_managers(manager)
    else:
        compression = util.create_kv_cache_compression_manager(
            config, kv_cache_manager=manager, pretrained_config=object()
        )
    model = Model(spec, tensors, attention, settings["max_seq_len"])
    return CompressionExecutor(
        model,
        manager,
        v12.TrtllmAttentionMetadata,
        max_batch_size=settings["max_batch_size"],
        compression=compression,
        **(running or {}),
    )
