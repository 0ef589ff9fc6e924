"""`tensorrt_llm` 1.2.x as modules in memory: the sparse-attention tree, the V1 manager, and who imports what by value."""

from __future__ import annotations

import enum
import sys
import types
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pydantic
import torch
from fakes.trtllm_kv.operator import AttentionOperator
from fakes.trtllm_kv.pools import BlockPool

TORCH = "tensorrt_llm._torch"
SPARSE = f"{TORCH}.attention_backend.sparse"


class DataType(enum.Enum):
    HALF = 0
    BF16 = 1
    FLOAT = 2
    FP8 = 3


class StrictBaseModel(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")


class BaseSparseAttentionConfig(StrictBaseModel):
    algorithm: str
    seq_len_threshold: int | None = None

    def get_indices_block_size(self):
        return 1


class RocketSparseAttentionConfig(BaseSparseAttentionConfig):
    algorithm: Literal["rocket"] = "rocket"
    window_size: int = 32
    prompt_budget: int = 2048
    page_size: int = 4

    def get_indices_block_size(self):
        return self.page_size


class DeepSeekSparseAttentionConfig(BaseSparseAttentionConfig):
    algorithm: Literal["dsa"] = "dsa"


class TorchLlmArgs(StrictBaseModel):
    model: str
    sparse_attention_config: (
        Annotated[
            RocketSparseAttentionConfig | DeepSeekSparseAttentionConfig, pydantic.Field(discriminator="algorithm")
        ]
        | None
    ) = None


class KvCacheConfig(StrictBaseModel):
    enable_block_reuse: bool = True
    max_attention_window: list[int] | None = None
    host_cache_size: int | None = None
    max_tokens: int | None = None
    tokens_per_block: int = 32


@dataclass
class KVCacheParams:
    use_cache: bool
    num_cached_tokens_per_seq: list[int] | None = None


@dataclass
class AttentionRuntimeFeatures:
    chunked_prefill: bool = False
    cache_reuse: bool = False
    has_speculative_draft_tokens: bool = False


@dataclass(kw_only=True)
class TrtllmAttentionMetadata:
    """Lengths of a step. `prepare` lays them out as they are at that moment."""

    max_num_sequences: int
    kv_cache_manager: Any
    request_ids: list[int]
    prompt_lens: list[int]
    seq_lens: torch.Tensor
    num_contexts: int
    kv_cache_params: KVCacheParams
    runtime_features: AttentionRuntimeFeatures = field(default_factory=AttentionRuntimeFeatures)
    sparse_attention_config: Any = None
    prompt_lens_cpu: torch.Tensor = field(init=False)
    prompt_lens_cuda: torch.Tensor = field(init=False)
    kv_lens: torch.Tensor = field(init=False)
    kv_cache_block_offsets: torch.Tensor = field(init=False)

    def __post_init__(self):
        self.prompt_lens_cpu = torch.zeros(self.max_num_sequences, dtype=torch.int32)
        self.prompt_lens_cuda = torch.zeros(self.max_num_sequences, dtype=torch.int32)
        self.kv_lens = torch.zeros(self.max_num_sequences, dtype=torch.int32)

    @property
    def num_seqs(self):
        return len(self.request_ids)

    @property
    def num_generations(self):
        return self.num_seqs - self.num_contexts

    @property
    def context_lens(self):
        return self.seq_lens[: self.num_contexts]

    @property
    def num_ctx_tokens(self):
        return int(self.context_lens.sum())

    def prepare(self):
        cached = torch.tensor(self.kv_cache_params.num_cached_tokens_per_seq, dtype=torch.int32)
        assert bool((cached >= 0).all())
        self.prompt_lens_cpu[: self.num_seqs] = torch.tensor(self.prompt_lens, dtype=torch.int32)
        self.prompt_lens_cuda.copy_(self.prompt_lens_cpu)
        self.kv_lens[: self.num_seqs] = cached + self.seq_lens.to(torch.int32)
        assert int(self.kv_lens.max()) <= self.kv_cache_manager.max_seq_len
        for row, request_id in enumerate(self.request_ids):
            held, length = self.kv_cache_manager.impl.num_tokens(request_id), int(self.kv_lens[row])
            # Room for all of a prompt is there from its first chunk on; a decoding sequence has as many as it needs.
            fits = length <= held if row < self.num_contexts else length == held
            assert fits, f"attention sees {length} tokens, the pool {held}"
            if row < self.num_contexts and length > int(self.seq_lens[row]):
                assert self.runtime_features.chunked_prefill, (
                    "context attention reads no cache without paged context FMHA"
                )
        self.kv_cache_block_offsets = self.kv_cache_manager.block_offsets(self.request_ids)


class TrtllmAttention:
    Metadata = TrtllmAttentionMetadata

    def __init__(  # noqa: PLR0917 - upstream's signature
        self,
        layer_idx,
        num_heads,
        head_dim,
        num_kv_heads=None,
        quant_config=None,
        q_scaling=None,
        pos_embd_params=None,
        mla_params=None,
        skip_create_weights_in_init=False,
        attention_chunk_size=None,
        **kwargs,
    ):
        assert set(kwargs) <= {"sparse_attention_config"}, kwargs
        assert mla_params is None
        assert attention_chunk_size is None
        self.layer_idx, self.num_heads, self.head_dim = layer_idx, num_heads, head_dim
        self.num_kv_heads = num_kv_heads or num_heads
        self.sparse_attention_config = kwargs.get("sparse_attention_config")

    def sparse_kv_predict(self, q, k, metadata, **kwargs):
        raise NotImplementedError

    def sparse_attn_predict(self, q, k, metadata, **kwargs):
        raise NotImplementedError

    def forward(self, q, k, v, metadata, **kwargs):
        assert k is None
        assert v is None
        sparse_kv = sparse_attn = (None, None)
        if self.sparse_attention_config is not None:
            sparse_kv = self.sparse_kv_predict(q, k, metadata, **kwargs)
            sparse_attn = self.sparse_attn_predict(q, k, metadata, **kwargs)
        layer = metadata.kv_cache_manager.layer_offsets[self.layer_idx]
        operator = AttentionOperator(layer, self.num_heads, self.num_kv_heads, self.head_dim)
        return operator(q, metadata, sparse_kv, sparse_attn)


class KVCacheManager:
    def __init__(
        self,
        kv_cache_config,
        kv_cache_type,
        *,
        num_layers,
        num_kv_heads,
        head_dim,
        tokens_per_block,
        max_seq_len,
        max_batch_size,
        mapping,
        dtype=DataType.HALF,
        spec_config=None,
        layer_mask=None,
        max_num_tokens=8192,
        model_config=None,
        max_beam_width=1,
        is_draft=False,
        kv_connector_manager=None,
        is_estimating_kv_cache=False,
        execution_stream=None,
    ):
        self.max_seq_len, self.max_batch_size = max_seq_len, max_batch_size
        self.tokens_per_block = tokens_per_block
        self.num_local_layers, self.head_dim = num_layers, head_dim
        self.pp_layers = list(range(num_layers))
        self.layer_offsets = {layer: layer for layer in self.pp_layers}
        self.num_kv_heads_per_layer = [num_kv_heads] * num_layers
        self.kv_factor = 2
        self.max_blocks_per_seq = -(-max_seq_len // tokens_per_block)
        self.max_num_tokens = max_num_tokens
        self.blocks_in_primary_pool = kv_cache_config.max_tokens // tokens_per_block
        self.impl = BlockPool(self.blocks_in_primary_pool, num_layers, num_kv_heads, tokens_per_block, head_dim)

    def prepare_resources(self, scheduled_batch):
        for request in scheduled_batch.context_requests:
            if request.is_first_context_chunk:
                self.impl.add_sequence(request.py_request_id, request.prompt_len, 1, request)
        for request in scheduled_batch.generation_requests:
            self.impl.add_token(request.py_request_id)

    def update_resources(self, scheduled_batch, attn_metadata=None, kv_cache_dtype_byte_size=None):
        assert attn_metadata is not None

    def free_resources(self, request, pin_on_release=False):
        return self.impl.remove_sequence(request.py_request_id, request, pin_on_release)

    def rewind_kv_cache(self, request, rewind_len):
        self.impl.rewind_kv_cache(request.py_request_id, rewind_len)

    def get_batch_cache_indices(self, request_ids, layer_idx=None, window_size=None):
        return [ids[0] for ids in self.impl.get_batch_cache_block_ids(request_ids, self.max_seq_len)]

    def get_buffers(self, layer_idx, kv_layout="NHD"):
        data = self.impl.get_primary_pool_data(self.layer_offsets[layer_idx])
        heads, tokens = self.impl.kv_heads, self.tokens_per_block
        inside = (tokens, heads) if kv_layout == "NHD" else (heads, tokens)
        return data.view(data.shape[0], self.kv_factor, *inside, self.head_dim)

    def block_offsets(self, request_ids):
        """[pools, sequences, 2, blocks] as the operator takes them; -1 past the end."""
        offsets = torch.full((1, len(request_ids), 2, self.max_blocks_per_seq), -1, dtype=torch.int32)
        for row, blocks in enumerate(self.get_batch_cache_indices(request_ids)):
            for at, block in enumerate(blocks):
                offsets[0, row, :, at] = torch.tensor([0, 1]) + block * self.num_local_layers * 2
        return offsets


class OldKVCacheManager(KVCacheManager):
    """As in early 1.2 candidates: `get_buffers` knows one label, and tables are asked for without a layer."""

    def get_buffers(self, layer_idx):
        return super().get_buffers(layer_idx)

    def get_batch_cache_indices(self, request_ids, window_size=None):
        return super().get_batch_cache_indices(request_ids)


class RocketKVCacheManager(KVCacheManager):
    def __init__(
        self, kv_cache_config, kv_cache_type, *, max_batch_size, max_seq_len, sparse_attn_config=None, **kwargs
    ):
        super().__init__(
            kv_cache_config, kv_cache_type, max_batch_size=max_batch_size, max_seq_len=max_seq_len, **kwargs
        )


class RocketTrtllmAttention(TrtllmAttention):
    pass


def get_sparse_attn_kv_cache_manager(sparse_attn_config):
    if sparse_attn_config.algorithm == "rocket":
        return RocketKVCacheManager
    raise ValueError(f"Unsupported sparse attention algorithm: {sparse_attn_config.algorithm}")


def get_trtllm_sparse_attn_attention_backend(sparse_attn_config):
    if sparse_attn_config.algorithm == "rocket":
        return RocketTrtllmAttention
    raise ValueError(f"Unsupported sparse attention algorithm: {sparse_attn_config.algorithm}")


def get_vanilla_sparse_attn_attention_backend(sparse_attn_config):
    if sparse_attn_config.algorithm == "rocket":
        return "RocketVanillaAttention"
    raise ValueError(f"Unsupported sparse attention algorithm: {sparse_attn_config.algorithm}")


def modules(manager=KVCacheManager):
    """Module name -> contents. Dispatch functions are imported by value where upstream does so."""
    dispatch = {
        "get_sparse_attn_kv_cache_manager": get_sparse_attn_kv_cache_manager,
        "get_trtllm_sparse_attn_attention_backend": get_trtllm_sparse_attn_attention_backend,
        "get_vanilla_sparse_attn_attention_backend": get_vanilla_sparse_attn_attention_backend,
    }
    return {
        "tensorrt_llm": {"__version__": "1.2.1"},
        "tensorrt_llm.llmapi": {},
        "tensorrt_llm.llmapi.llm_args": {
            "RocketSparseAttentionConfig": RocketSparseAttentionConfig,
            "TorchLlmArgs": TorchLlmArgs,
        },
        TORCH: {},
        f"{TORCH}.attention_backend": dispatch,
        f"{TORCH}.attention_backend.trtllm": {
            "TrtllmAttention": TrtllmAttention,
            "TrtllmAttentionMetadata": TrtllmAttentionMetadata,
        },
        f"{TORCH}.attention_backend.utils": {
            name: function for name, function in dispatch.items() if "attention_backend" in name
        },
        SPARSE: dispatch,
        f"{SPARSE}.rocket": {"RocketKVCacheManager": RocketKVCacheManager},
        f"{SPARSE}.utils": dispatch,
        f"{TORCH}.pyexecutor": {},
        f"{TORCH}.pyexecutor.resource_manager": {"KVCacheManager": manager},
        f"{TORCH}.pyexecutor._util": {"get_sparse_attn_kv_cache_manager": get_sparse_attn_kv_cache_manager},
    }


def put_in(monkeypatch, contents):
    """Make `contents` importable, and forget adapters that were bound to another release."""
    for name in [name for name in sys.modules if name.startswith("trtkit_h2o.trtllm.v1")]:
        monkeypatch.delitem(sys.modules, name)
    for name, attributes in contents.items():
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
