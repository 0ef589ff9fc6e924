"""Turning H2O on: probe, register, and the arguments an `LLM` needs."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from trtkit.spec.errors import MissingDependencyError, UnsupportedError, UsageError
from trtkit.spec.kv import KVPolicySpec
from trtkit_h2o.trtllm.probe import DESCRIPTIONS, FIDELITIES, PATHS, V12, V13, Finding, probe_h2o, usable_path

_CAN = {
    V12: "carries the policy out in full and pins no prompt",
    V13: "can evict generated tokens only, with the prompt pinned",
}


def install() -> str:
    """Register with the TensorRT-LLM of this process; calling it again changes nothing.

    Workers started later register themselves when they unpickle the configuration (see `h2o_llm_arguments`).

    Returns:
        The path taken, `probe.V12` or `probe.V13`.

    Raises:
        MissingDependencyError: TensorRT-LLM is not installed.
        UnsupportedError: a name or a parameter that the adapters lean on is not there; nothing was changed.
    """
    findings = probe_h2o()
    path = usable_path(findings)
    if path is None:
        raise _why_not(findings)
    importlib.import_module(f"trtkit_h2o.trtllm.{path}").register()
    return path


def doctor_findings() -> list[Finding]:
    """The verdict first, then everything that was looked at: what `trtkit doctor --h2o` shows."""
    findings = probe_h2o()
    path = usable_path(findings)
    if path is None:
        verdict = Finding(path="", name="verdict", ok=False, detail=str(_why_not(findings)))
    else:
        detail = f"runs through {path}, {DESCRIPTIONS[path]}; fidelity {FIDELITIES[path].value}"
        verdict = Finding(path="", name="verdict", ok=True, detail=detail)
    return [verdict, *findings]


def h2o_llm_arguments(
    spec: KVPolicySpec, *, pin_prompt: bool = False, counters_dir: Path | None = None
) -> dict[str, Any]:
    """Keyword arguments for `tensorrt_llm.LLM` that carry out `spec`, to be merged over the caller's own.

    Nested ones are dictionaries; merge them by key. Pass the configuration object as it is: it survives pickling to
    workers, but not a round trip through YAML or `model_dump`.

    Args:
        spec: the policy.
        pin_prompt: the caller accepts that all of a prompt stays and the budget counts generated tokens. That is all
            1.3 and later can do, and not what the policy says, so it must be asked for.
        counters_dir: a directory where every rank keeps `rank{N}.json` with what it has evicted.

    Raises:
        UsageError: `spec` keeps everything, so there is nothing to turn on.
        UnsupportedError: this release can only pin prompts, and that was not asked for; or the other way round.
        TrtkitError: what `install` raises.
    """
    if spec.is_full:
        raise UsageError("KV policy 'full' needs no eviction in TensorRT-LLM; leave H2O's arguments out")
    path = install()
    adapter = importlib.import_module(f"trtkit_h2o.trtllm.{path}")
    if pin_prompt != (path == V13):
        raise UnsupportedError(
            f"KV policy {spec.label!r}: this TensorRT-LLM {_CAN[path]}; use 1.2.x or --target embedded for the policy as "
            "written, or build with --allow-approximate where prompts may stay whole"
        )
    told = "" if counters_dir is None else str(counters_dir)
    common: dict[str, Any] = {
        "attn_backend": "TRTLLM",
        "max_beam_width": 1,
        # Both are supported and tested against fakes; they stay off until a GPU has run them.
        "disable_overlap_scheduler": True,
        "cuda_graph_config": None,
    }
    if path == V12:
        return common | {
            "sparse_attention_config": adapter.H2OSparseAttentionConfig(kv_policy=spec.label, counters_dir=told),
            "kv_cache_config": {"enable_block_reuse": False, "host_cache_size": 0},
        }
    return common | {
        "kv_cache_compression_config": adapter.H2OKvCacheCompressionConfig(kv_policy=spec.label, counters_dir=told),
        "kv_cache_config": {"use_kv_cache_manager_v2": True, "enable_block_reuse": False},
    }


def _why_not(findings: list[Finding]) -> MissingDependencyError | UnsupportedError:
    absent = [finding for finding in findings if not finding.path and not finding.ok]
    if absent:
        return MissingDependencyError(
            f"{absent[0].detail}; install TensorRT-LLM 1.2.x, or run H2O on the embedded engine (--target embedded)"
        )
    # The path that lacks least is the one a reader can do something about.
    lacking = min(([f for f in findings if f.path == path and not f.ok] for path in PATHS), key=len)
    return UnsupportedError(
        f"{findings[0].detail} has no room for H2O: {lacking[0].detail} ({len(lacking)} of the names it needs differ); "
        "use 1.2.x, or run H2O on the embedded engine (--target embedded)"
    )
