"""H2O in the PyTorch backend of TensorRT-LLM 1.2.x: the V1 KV cache manager and the sparse-attention hooks.

Importing this module registers it. That is how workers get it: the LLM API sends its arguments to MPI workers by
pickle, and unpickling `H2OSparseAttentionConfig` imports this module there. Shapes: T tokens, Hq query heads,
H KV heads, D head dim.

One request: a piece of its prompt runs dense over what is cached; `sparse_kv_predict` scores each layer and names what
stays; the attention operator compacts in place, after every piece. While decoding, `sparse_attn_predict` only notes the
query; every `interval` steps the manager scores, compacts and rewinds, which frees tail blocks. The runtime goes on
counting logical tokens; `prepare` tells attention the shorter, physical length.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from tensorrt_llm._torch.attention_backend.trtllm import TrtllmAttention, TrtllmAttentionMetadata
from tensorrt_llm._torch.pyexecutor.resource_manager import KVCacheManager
from tensorrt_llm.llmapi.llm_args import RocketSparseAttentionConfig
from torch import Tensor

from trtkit.kv.selection import Selection
from trtkit.spec.errors import UnsupportedError
from trtkit_h2o.trtllm.patch import route
from trtkit_h2o.trtllm.policies import RequestPolicies
from trtkit_h2o.trtllm.pool import ManagerPool
from trtkit_h2o.trtllm.report import CounterFile
from trtkit_h2o.trtllm.session import EvictionSession

_OTHER_BACKENDS = ("get_vanilla_sparse_attn_attention_backend", "get_flashinfer_sparse_attn_attention_backend")
_KV_TYPES = ("HALF", "BF16", "FLOAT")
_MAX_NUM_TOKENS = 8192
"""What `KVCacheManager` takes for the longest step where nothing is given."""
_Indices = tuple[Tensor | None, Tensor | None]


class H2OSparseAttentionConfig(RocketSparseAttentionConfig):  # type: ignore[misc]
    """`kv_policy` is a policy as `--kv` spells it, for example "h2o:2048"; `counters_dir` see `CounterFile`.

    It keeps RocketKV's tag: the union of configurations is closed and accepts a subclass's instance, and attention
    leaves rotation outside its fused operator exactly for that tag. Written out and read back (YAML, `model_dump`) it
    would turn into RocketKV, so pass the object itself.
    """

    kv_policy: str = ""
    counters_dir: str = ""


class H2OTrtllmAttentionMetadata(TrtllmAttentionMetadata):  # type: ignore[misc]
    """Attention sees the physical length, the model goes on with logical positions."""

    def prepare(self) -> None:
        """Correct lengths before they are laid out, prompt lengths after (as RocketKV does)."""
        session = getattr(self.kv_cache_manager, "h2o", None)
        if session is None:
            super().prepare()
            return
        cached = self.kv_cache_params.num_cached_tokens_per_seq
        first = self.num_contexts
        rows = range(first, first + self.num_generations)
        for row in range(first):
            session.feed(self.request_ids[row], cached[row], int(self.seq_lens[row]), self.kv_cache_manager.h2o_pool)
        session.aim([(self.request_ids[row], cached[row]) for row in rows])
        for row in range(first + self.num_generations):
            cached[row] -= session.evicted(self.request_ids[row])
        super().prepare()
        for row in rows:
            self.prompt_lens_cpu[row] = min(self.prompt_lens[row], cached[row])
        self.prompt_lens_cuda[: self.num_seqs].copy_(self.prompt_lens_cpu[: self.num_seqs], non_blocking=True)


class H2OTrtllmAttention(TrtllmAttention):  # type: ignore[misc]
    """Dense attention over the compacted cache; the hooks choose after a prompt and take notes while decoding."""

    Metadata = H2OTrtllmAttentionMetadata

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - passed through
        """Refuse what would make scores or positions wrong."""
        given = inspect.signature(TrtllmAttention.__init__).bind(self, *args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        if given.get("pos_embd_params") is not None:
            raise UnsupportedError("H2O needs rotation outside the attention operator, and this layer fuses it")
        if (given.get("q_scaling") or 1.0) != 1.0:
            raise UnsupportedError(
                f"H2O scores with 1/sqrt(head_dim), this layer scales by q_scaling={given['q_scaling']}"
            )
        super().__init__(*args, **kwargs)

    def sparse_kv_predict(self, q: Tensor, k: Tensor | None, metadata: Any, *_: Any, **__: Any) -> _Indices:  # noqa: ANN401
        """What stays of the sequences whose prompts run now: slots [H, total kept] int32, ascending, and bounds.

        Slots count from a sequence's first cached token, which is how the operator addresses them.
        """
        manager, contexts = metadata.kv_cache_manager, metadata.num_contexts
        ids = metadata.request_ids[:contexts]
        if not any(manager.h2o.tracks(request_id) for request_id in ids):
            return None, None
        queries, keys = self._queries(q), self._keys(q, k)
        layer = manager.layer_offsets[self.layer_idx]
        cached = metadata.kv_cache_params.num_cached_tokens_per_seq
        kept, lengths, start = [], [], 0
        for row, request_id in enumerate(ids):
            fed = slice(start, start + int(metadata.context_lens[row]))
            chosen = manager.h2o.prefill(request_id, layer, queries[fed], keys[fed], manager.h2o_pool)
            lengths.append(cached[row] + fed.stop - fed.start)
            kept.append(_everything(lengths[-1], keys) if chosen is None else chosen)
            start = fed.stop
        if all(part.shape[1] == length for part, length in zip(kept, lengths, strict=True)):
            return None, None
        selection = Selection.of(kept)
        return selection.indices_HK.contiguous(), selection.offsets_B1.to(q.device)

    def sparse_attn_predict(self, q: Tensor, k: Tensor | None, metadata: Any, *_: Any, **__: Any) -> _Indices:  # noqa: ANN401
        """Note the step's queries; attention stays dense."""
        if metadata.num_generations:
            manager = metadata.kv_cache_manager
            queries = self._queries(q[metadata.num_ctx_tokens :])
            manager.h2o.observe(manager.layer_offsets[self.layer_idx], queries)
        return None, None

    def _queries(self, q: Tensor) -> Tensor:
        """Rotated queries [T, Hq, D], from the fused projection or as they are."""
        return q[:, : self.num_heads * self.head_dim].reshape(q.shape[0], self.num_heads, self.head_dim)

    def _keys(self, q: Tensor, k: Tensor | None) -> Tensor:
        """Rotated keys [T, H, D]; in the fused projection they follow the queries."""
        start, size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        keys = q[:, start : start + size] if k is None else k
        return keys.reshape(keys.shape[0], self.num_kv_heads, self.head_dim)


class H2OKVCacheManager(KVCacheManager):  # type: ignore[misc]
    """TensorRT-LLM's paged cache with an `EvictionSession` beside it."""

    def __init__(self, kv_cache_config: Any, kv_cache_type: Any, *, sparse_attn_config: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """As `KVCacheManager`; `sparse_attn_config` carries the policy.

        Raises:
            UnsupportedError: an option that eviction cannot live with, with what to set instead.
            UsageError: a policy that keeps everything or does not exist.
        """
        _refuse(kv_cache_config, kwargs)
        policies = RequestPolicies(
            sparse_attn_config.kv_policy,
            max_seq_len=kwargs["max_seq_len"],
            tokens_per_block=kwargs["tokens_per_block"],
        )
        super().__init__(kv_cache_config, kv_cache_type, **kwargs)
        self.h2o_pool = ManagerPool(self)
        chunk = kwargs.get("max_num_tokens", _MAX_NUM_TOKENS)
        self.h2o = EvictionSession(policies, self.h2o_pool.geometry(kwargs["max_batch_size"], chunk))
        self._requests: dict[int, Any] = {}
        self._counters = CounterFile(sparse_attn_config.counters_dir, getattr(kwargs["mapping"], "rank", 0))

    def prepare_resources(self, scheduled_batch: Any) -> None:  # noqa: ANN401
        """Room for the step's tokens, after what the last one owed; new prompts are announced to the session."""
        self._settle()
        super().prepare_resources(scheduled_batch)
        for request in scheduled_batch.context_requests:
            if request.is_first_context_chunk:
                limit = getattr(request, "max_new_tokens", None) or getattr(request, "py_max_new_tokens", None)
                self._requests[request.py_request_id] = request
                self._drop(request, self.h2o.begin(request.py_request_id, request.prompt_len, limit))

    def update_resources(self, scheduled_batch: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """After a step: score, compact and give back tails, so that the scheduler finds the freed blocks.

        Under the overlap scheduler the next step's kernels are in the stream already. They read the old lengths, so that
        step counts too: it is settled here together with this one, in stream order.
        """
        super().update_resources(scheduled_batch, *args, **kwargs)
        self._settle()

    def free_resources(self, request: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """A request ended or was paused; paused ones start again from their first token."""
        self.h2o.forget(request.py_request_id)
        self._requests.pop(request.py_request_id, None)
        return super().free_resources(request, *args, **kwargs)

    def _settle(self) -> None:
        for request_id in self.h2o.request_ids:
            self._drop(self._requests[request_id], self.h2o.settle(request_id, self.h2o_pool))
        self._counters.tell(self.h2o.counters)

    def _drop(self, request: Any, tokens: int) -> None:  # noqa: ANN401
        if tokens:
            self.rewind_kv_cache(request, tokens)


def _everything(length: int, like: Tensor) -> Tensor:
    return torch.arange(length, device=like.device).expand(like.shape[1], length)


def _refuse(kv_cache_config: Any, options: dict[str, Any]) -> None:  # noqa: ANN401
    """One line for the first option that eviction cannot live with."""
    mapping = options.get("mapping")
    dtype = options.get("dtype")
    name = getattr(dtype, "name", str(dtype))
    windows = getattr(kv_cache_config, "max_attention_window", None)
    refusals = (
        (
            kv_cache_config.enable_block_reuse,
            "kv_cache_config.enable_block_reuse must be False: shared blocks are evicted from",
        ),
        (
            getattr(kv_cache_config, "host_cache_size", 0),
            "kv_cache_config.host_cache_size must be 0: blocks must not move",
        ),
        (windows and min(windows) < options["max_seq_len"], "max_attention_window must be left out"),
        (options.get("max_beam_width", 1) != 1, "max_beam_width must be 1: a rewind knows no beams"),
        (options.get("spec_config") is not None, "speculative decoding must be off"),
        (getattr(mapping, "pp_size", 1) != 1, "pipeline parallelism must be 1; use tensor parallelism"),
        (dtype is not None and name not in _KV_TYPES, f"the KV cache must be 16-bit, it is {name}"),
    )
    for wrong, line in refusals:
        if wrong:
            raise UnsupportedError(f"H2O in TensorRT-LLM: {line}")


def _refuse_backend(*_: Any, **__: Any) -> type:  # noqa: ANN401
    raise UnsupportedError("H2O in TensorRT-LLM: attn_backend must be TRTLLM")


def register() -> list[str]:
    """Route TensorRT-LLM's dispatch functions here for our configuration; doing it again changes nothing.

    Returns:
        The names now routed, as "module.function".
    """

    def ours(config: object) -> bool:
        return isinstance(config, H2OSparseAttentionConfig)

    home = importlib.import_module("tensorrt_llm._torch.attention_backend.sparse.utils")
    # Without this, our configuration's tag would get RocketKV there.
    others = [name for name in _OTHER_BACKENDS if hasattr(home, name)]
    return [
        *(routed for name in others for routed in route(home, name, ours, _refuse_backend)),
        *route(home, "get_sparse_attn_kv_cache_manager", ours, lambda *_, **__: H2OKVCacheManager),
        *route(home, "get_trtllm_sparse_attn_attention_backend", ours, lambda *_, **__: H2OTrtllmAttention),
    ]


register()
