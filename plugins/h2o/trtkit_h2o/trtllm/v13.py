"""H2O as a KV cache compression manager: TensorRT-LLM 1.3 and later, KV cache manager V2.

Importing this module registers it (workers unpickle the configuration, see `v12`). The prompt is pinned, as this
framework's own eviction method does: pages that hold it may be shared or committed and must not change, so the budget
counts generated tokens and fidelity is not that of H2O over the whole context. Shapes: B rows, Hq query heads, D head
dim.

The framework gives the lengths (`py_num_compressed_tokens`), the order of calls and the release of pages (`resize`).
It has no hook with queries, so attention's `forward` is wrapped to note them; rotation happens outside its operator
because the configuration says that physical lengths change.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any, ClassVar, Literal, Optional, Union

from tensorrt_llm._torch.pyexecutor.resource_manager import KVCacheCompressionManager
from tensorrt_llm.llmapi.llm_args import KvCacheCompressionConfig, TorchLlmArgs

from trtkit.spec.errors import UnsupportedError
from trtkit_h2o.trtllm.patch import route
from trtkit_h2o.trtllm.policies import RequestPolicies
from trtkit_h2o.trtllm.pool import ManagerPool
from trtkit_h2o.trtllm.probe import ATTENTION, first_module
from trtkit_h2o.trtllm.report import CounterFile
from trtkit_h2o.trtllm.session import EvictionSession

TrtllmAttention: Any = first_module(ATTENTION).TrtllmAttention
_FIELD = "kv_cache_compression_config"
_COLLECTOR = "trtkit_h2o"
_WRAPPED = "_trtkit_h2o_wrapped"


class H2OKvCacheCompressionConfig(KvCacheCompressionConfig):  # type: ignore[misc]
    """`kv_policy` is a policy as `--kv` spells it; its budget counts generated tokens. `counters_dir` see `CounterFile`."""

    algorithm: Literal["h2o"] = "h2o"
    kv_policy: str
    counters_dir: str = ""
    changes_physical_kv_length: ClassVar[bool] = True

    def supports_block_reuse(self) -> bool:
        """Not claimed before it has been tried on a GPU, although pinned prompts leave shared pages alone."""
        return False

    def supports_speculative_decoding(self) -> bool:
        """A step must add exactly one token."""
        return False


class H2OCompressionManager(KVCacheCompressionManager):  # type: ignore[misc]
    """Turns the framework's five hooks into an `EvictionSession`'s calls."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - differs between releases
        """The KV cache manager comes here or through `bind_kv_cache_managers`; both work."""
        super().__init__(config, *args, **kwargs)
        self._kv_policy, self._counters_dir = config.kv_policy, config.counters_dir
        self._h2o: EvictionSession | None = None

    def on_request_init(self, request: Any, **_: Any) -> None:  # noqa: ANN401
        """A first context chunk is about to run."""
        self._session().begin(request.py_request_id, request.py_prompt_len, request.py_max_new_tokens)

    def on_context_step_end(self, requests: Any, **_: Any) -> None:  # noqa: ANN401
        """Prompts are in: nothing of them is dropped."""
        for request in requests:
            self._session().prompt_stays(request.py_request_id)

    def on_generation_step_begin(self, scheduled_batch: Any, **_: Any) -> None:  # noqa: ANN401
        """Hold rounds that had to wait, and say where this step's queries go."""
        self._settle(scheduled_batch.generation_requests)
        for request in scheduled_batch.generation_requests:
            self._session().prompt_stays(request.py_request_id)  # under overlap the step that fed it has not ended yet
        self._session().aim([(r.py_request_id, None) for r in scheduled_batch.generation_requests])

    def on_generation_step_end(self, scheduled_batch: Any, **_: Any) -> None:  # noqa: ANN401
        """Hold the rounds that are due; native updates have run.

        Under the overlap scheduler the next step's kernels are in the stream already and count too, as in `v12`.
        """
        self._settle(scheduled_batch.generation_requests)

    def _settle(self, requests: Any) -> None:  # noqa: ANN401
        session = self._session()
        for request in requests:
            cache = self.kv_cache_manager.kv_cache_map.get(request.py_request_id)
            if cache is None:
                continue
            pool = self._pool if cache.is_active else None  # a suspended cache is compacted once it is back
            dropped = session.settle(request.py_request_id, pool)
            if dropped:
                self._publish(request, cache, dropped)
        self._counters.tell(session.counters)

    def on_request_finish(self, request: Any, **_: Any) -> None:  # noqa: ANN401
        """A request ended."""
        if self._h2o is not None:
            self._h2o.forget(request.py_request_id)

    def _publish(self, request: Any, cache: Any, dropped: int) -> None:  # noqa: ANN401
        """Tell the runtime the new length, then give the tail pages back."""
        request.py_num_compressed_tokens += dropped
        if not cache.resize(cache.capacity - dropped, None):
            raise UnsupportedError(f"KV cache of request {request.py_request_id} did not shrink by {dropped} tokens")

    def _session(self) -> EvictionSession:
        if self._h2o is None:
            manager = self.kv_cache_manager
            _refuse(manager)
            policies = RequestPolicies(
                self._kv_policy,
                max_seq_len=manager.max_seq_len,
                tokens_per_block=manager.tokens_per_block,
                pin_prompt=True,
            )
            self._counters = CounterFile(self._counters_dir, getattr(getattr(manager, "mapping", None), "rank", 0))
            self._pool = ManagerPool(manager)
            self._h2o = EvictionSession(policies, self._pool.geometry(manager.max_batch_size))
            setattr(manager, _COLLECTOR, self._h2o)
        return self._h2o


def _refuse(manager: Any) -> None:  # noqa: ANN401
    refusals = (
        (manager.enable_block_reuse, "kv_cache_config.enable_block_reuse must be False"),
        (manager.max_beam_width != 1, "max_beam_width must be 1"),
        (getattr(manager, "max_total_draft_tokens", 0), "speculative decoding must be off"),
        (getattr(manager, "num_extra_kv_tokens", 0), "extra KV tokens must be off"),
    )
    for wrong, line in refusals:
        if wrong:
            raise UnsupportedError(f"H2O in TensorRT-LLM: {line}")


def register() -> list[str]:
    """Add the configuration to the union, and route the factory, the validator and the queries here; idempotent.

    Returns:
        The names now routed, as "module.function".
    """

    def ours(config: object) -> bool:
        return isinstance(config, H2OKvCacheCompressionConfig)

    _extend_union()
    _note_queries()
    util = importlib.import_module("tensorrt_llm._torch.pyexecutor._util")
    return [
        *route(util, "create_kv_cache_compression_manager", ours, _create),
        *route(util, "validate_kv_cache_compression_compatibility", ours, _validate),
    ]


def _create(*args: Any, **kwargs: Any) -> H2OCompressionManager:  # noqa: ANN401
    """What the factory builds for us. Of its arguments only the managers matter, where it has them already."""
    given = _named("create_kv_cache_compression_manager", args, kwargs)
    config, *_ = given.values()
    return H2OCompressionManager(config, **{k: v for k, v in given.items() if k.endswith("kv_cache_manager")})


def _validate(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401
    """Admission, before anything is built."""
    given = _named("validate_kv_cache_compression_compatibility", args, kwargs)
    # The manager looks again when it is bound, whatever this function is given.
    if getattr(given.get("kv_cache_config"), "enable_block_reuse", False):
        raise UnsupportedError("H2O in TensorRT-LLM: kv_cache_config.enable_block_reuse must be False")
    if given.get("spec_config") is not None:
        raise UnsupportedError("H2O in TensorRT-LLM: speculative decoding must be off")


def _named(function: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by the names this release gives them."""
    util = importlib.import_module("tensorrt_llm._torch.pyexecutor._util")
    return dict(inspect.signature(getattr(util, function)).bind(*args, **kwargs).arguments)


def _extend_union() -> None:
    """Let `TorchLlmArgs` take our configuration beside its own kinds."""
    known = TorchLlmArgs.model_fields[_FIELD]
    if "H2OKvCacheCompressionConfig" in str(known.annotation):
        return
    known.annotation = Optional[Union[H2OKvCacheCompressionConfig, known.annotation]]  # noqa: UP007, UP045 - of values
    TorchLlmArgs.model_rebuild(force=True)


def _note_queries() -> None:
    """Wrap attention's `forward` to hand generation rows' queries to the session of the cache they read."""
    original = TrtllmAttention.forward
    if getattr(original, _WRAPPED, False):
        return

    @functools.wraps(original)
    def forward(self: Any, q: Any, k: Any, v: Any, metadata: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        manager = metadata.kv_cache_manager
        session = getattr(manager, _COLLECTOR, None)
        if session is not None and metadata.num_generations:
            rows = q[metadata.num_ctx_tokens :, : self.num_heads * self.head_dim]
            layer = manager.layer_offsets[self.layer_idx]
            session.observe(layer, rows.reshape(rows.shape[0], self.num_heads, self.head_dim))
        return original(self, q, k, v, metadata, *args, **kwargs)

    setattr(forward, _WRAPPED, True)
    TrtllmAttention.forward = forward


register()
