"""Which of H2O's two paths this TensorRT-LLM has room for. Names and signatures are looked at, versions are not compared.

A release moves and renames without notice, and what the adapters lean on is private. So everything they touch is
listed here, looked up before anything is changed, and named when it is missing.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from types import ModuleType

from trtkit.spec.kv import KVFidelity

V12 = "v12"
V13 = "v13"
PATHS = (V12, V13)
DESCRIPTIONS = {
    V12: "sparse-attention hooks and the V1 KV cache manager (1.2.x)",
    V13: "KV cache compression manager (1.3 and later); the prompt is pinned",
}

FIDELITIES = {V12: KVFidelity.EXACT, V13: KVFidelity.GENERATED_ONLY}


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing looked for. `path` is `V12`, `V13` or "" where it concerns both; `detail` is one line for people."""

    path: str
    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """A name that must exist, and parameters it must accept.

    `name` is "module:attribute.path"; `why` says what for. A bare **kwargs accepts nothing: what it does with a name
    cannot be seen. `holds` are attributes or dataclass fields it must have, `lacks` what would make it another thing;
    `moved` lists modules that hold the name in other releases.
    """

    name: str
    why: str
    accepts: tuple[str, ...] = ()
    holds: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()


_T = "tensorrt_llm._torch."
_BACKEND = f"{_T}attention_backend.trtllm:"
ATTENTION = (f"{_T}attention_backend.trtllm", f"{_T}attention.backends.trtllm")
"""Modules of `TrtllmAttention`, older first."""
MANAGER_V2 = (f"{_T}pyexecutor.kv_cache_manager_v2", f"{_T}pyexecutor.kv_cache.kv_cache_manager_v2")
"""Modules of `KVCacheManagerV2`, older first."""
_SPARSE = f"{_T}attention_backend.sparse."
_MANAGER = f"{_T}pyexecutor.resource_manager:"
_ARGS = "tensorrt_llm.llmapi.llm_args:"

NEEDS: dict[str, tuple[Need, ...]] = {
    V12: (
        Need(
            name=f"{_ARGS}RocketSparseAttentionConfig",
            why="the configuration ours passes for",
            # A later release lowers it before the dispatch sees it, and would take RocketKV's attention for ours.
            lacks=("to_sparse_params",),
        ),
        Need(
            name=f"{_BACKEND}TrtllmAttention.sparse_kv_predict", why="prompt eviction", accepts=("q", "k", "metadata")
        ),
        Need(
            name=f"{_BACKEND}TrtllmAttention.sparse_attn_predict", why="the query ring", accepts=("q", "k", "metadata")
        ),
        Need(name=f"{_BACKEND}TrtllmAttentionMetadata.prepare", why="physical lengths"),
        Need(
            name=f"{_BACKEND}TrtllmAttentionMetadata",
            why="what a step holds",
            holds=(
                "request_ids",
                "prompt_lens",
                "seq_lens",
                "num_seqs",
                "num_contexts",
                "num_generations",
                "num_ctx_tokens",
                "context_lens",
                "kv_cache_params",
                "kv_cache_manager",
            ),
        ),
        Need(name=f"{_MANAGER}KVCacheManager.prepare_resources", why="new requests", accepts=("scheduled_batch",)),
        Need(name=f"{_MANAGER}KVCacheManager.update_resources", why="decode rounds", accepts=("scheduled_batch",)),
        Need(name=f"{_MANAGER}KVCacheManager.free_resources", why="ended requests", accepts=("request",)),
        Need(name=f"{_MANAGER}KVCacheManager.rewind_kv_cache", why="freeing blocks", accepts=("request", "rewind_len")),
        Need(name=f"{_MANAGER}KVCacheManager.get_buffers", why="the pool", accepts=("layer_idx",)),
        Need(name=f"{_MANAGER}KVCacheManager.get_batch_cache_indices", why="block tables", accepts=("request_ids",)),
        Need(name=f"{_SPARSE}utils:get_sparse_attn_kv_cache_manager", why="choice of the KV cache manager"),
        Need(name=f"{_SPARSE}utils:get_trtllm_sparse_attn_attention_backend", why="choice of the attention backend"),
        Need(
            name=f"{_SPARSE}rocket:RocketKVCacheManager.__init__",
            why="how a manager is built",
            accepts=("kv_cache_config", "kv_cache_type", "max_batch_size", "max_seq_len", "sparse_attn_config"),
        ),
        Need(
            name=f"{_MANAGER}KVCacheManager.__init__",
            why="what a manager is told",
            accepts=("tokens_per_block", "max_seq_len", "max_batch_size", "max_num_tokens", "mapping", "dtype"),
        ),
    ),
    V13: (
        Need(name=f"{_ARGS}KvCacheCompressionConfig", why="the configuration ours derives from"),
        Need(name=f"{_ARGS}TorchLlmArgs.model_fields", why="the union of configurations"),
        *(
            Need(
                name=f"{_MANAGER}KVCacheCompressionManager.{hook}", why="the manager's life cycle", accepts=(argument,)
            )
            for hook, argument in (
                ("on_request_init", "request"),
                ("on_context_step_end", "requests"),
                ("on_generation_step_begin", "scheduled_batch"),
                ("on_generation_step_end", "scheduled_batch"),
                ("on_request_finish", "request"),
            )
        ),
        Need(name=f"{_T}pyexecutor._util:create_kv_cache_compression_manager", why="choice of the manager"),
        Need(name=f"{_T}pyexecutor._util:validate_kv_cache_compression_compatibility", why="admission"),
        Need(
            name=f"{MANAGER_V2[0]}:KVCacheManagerV2.get_buffers",
            why="the pool",
            accepts=("layer_idx", "kv_layout"),
            moved=MANAGER_V2[1:],
        ),
        Need(
            name=f"{MANAGER_V2[0]}:KVCacheManagerV2.get_batch_cache_indices",
            why="block tables",
            accepts=("request_ids",),
            moved=MANAGER_V2[1:],
        ),
        Need(name=f"{_BACKEND}TrtllmAttention.forward", why="queries", accepts=("q", "metadata"), moved=ATTENTION[1:]),
    ),
}


def probe_h2o() -> list[Finding]:
    """Everything the adapters lean on, found or not; imports TensorRT-LLM where it is installed."""
    try:
        package = importlib.import_module("tensorrt_llm")
    except ImportError as error:
        return [Finding(path="", name="tensorrt_llm", ok=False, detail=f"TensorRT-LLM cannot be imported: {error}")]
    version = getattr(package, "__version__", "of unknown version")
    findings = [Finding(path="", name="tensorrt_llm", ok=True, detail=f"TensorRT-LLM {version}")]
    return findings + [_look(path, need) for path in PATHS for need in NEEDS[path]]


def usable_path(findings: list[Finding]) -> str | None:
    """The path to take: the first whose needs are all met. `V12` carries a policy out in full, so it comes first."""
    if not all(finding.ok for finding in findings if not finding.path):
        return None
    return next((p for p in PATHS if all(f.ok for f in findings if f.path == p)), None)


def first_module(places: Sequence[str]) -> ModuleType:
    """The first of these modules that exists.

    Raises:
        ImportError: none does.
    """
    for name in places[:-1]:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return importlib.import_module(places[-1])


def _look(path: str, need: Need) -> Finding:
    module_name, _, attributes = need.name.partition(":")
    places = (module_name, *need.moved)
    try:
        module = first_module(places)
    except ImportError:
        detail, ok = f"there is no module {' or '.join(places)}", False
    else:
        problem = _problem(module, attributes, need)
        detail, ok = problem or _found(need, module.__name__), problem is None
    return Finding(path=path, name=need.name, ok=ok, detail=f"{need.why}: {detail}")


def _problem(module: ModuleType, attributes: str, need: Need) -> str | None:
    try:
        found = reduce(getattr, attributes.split("."), module)
    except AttributeError:
        return f"{module.__name__} has no {attributes}"
    missing = [name for name in need.holds if name not in {*dir(found), *getattr(found, "__dataclass_fields__", ())}]
    if missing:
        return f"{attributes} has no {', '.join(missing)}"
    extra = [name for name in need.lacks if hasattr(found, name)]
    if extra:
        return f"{attributes} has {', '.join(extra)}, which 1.2 has not"
    return _refused(found, need) if need.accepts else None


def _found(need: Need, module: str) -> str:
    """Where it was found, if not where it used to be, and what was asked of its signature."""
    where = "" if need.name.startswith(f"{module}:") else f" in {module}"
    takes = f", takes {', '.join(need.accepts)}" if need.accepts else ""
    return f"found{where}{takes}{', has ' if need.holds else ''}{', '.join(need.holds)}"


def _refused(found: object, need: Need) -> str | None:
    """What the callable's signature lacks."""
    if not callable(found):
        return "is not callable"
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):
        return "has no readable signature"
    missing = [name for name in need.accepts if name not in parameters]
    return f"takes ({', '.join(parameters)}), without {', '.join(missing)}" if missing else None
