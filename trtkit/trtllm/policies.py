"""KV policies inside TensorRT-LLM's PyTorch backend: found as entry points, like the policies themselves.

A package that can carry a policy out there registers a `PolicyAdapter` under the policy's name in
`trtkit.trtllm_policies`. What it needs in every worker it brings along in the arguments it returns.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from trtkit.plan.work import weight_bytes
from trtkit.spec.catalog import gpu_spec
from trtkit.spec.errors import UnsupportedError
from trtkit.spec.plan import BuildPlan
from trtkit.trtllm.lower import kv_bytes_per_token

GROUP = "trtkit.trtllm_policies"
_RUNTIME_SHARE = 0.1
"""Of a GPU's memory: activations, graphs and libraries beside weights and cache. Assumed."""


class PolicyAdapter(Protocol):
    """What an entry point names. Neither method imports TensorRT-LLM before `arguments` is called."""

    def check(self, plan: BuildPlan, *, pool_tokens: int | None) -> tuple[str, ...]:
        """How the plan's policy would run, in lines for people.

        Args:
            plan: one for the PyTorch backend.
            pool_tokens: tokens one rank's cache has room for (modeled); None where the GPU's memory is not known.

        Raises:
            TrtkitError: it could not run; in one line, before anything has started.
        """

    def arguments(
        self, plan: BuildPlan, *, pool_tokens: int | None, pin_prompt: bool, counters_dir: Path | None
    ) -> dict[str, Any]:
        """Keyword arguments of `LLM`, nested ones as dictionaries.

        Args:
            plan: one that passed `check`.
            pool_tokens: as for `check`.
            pin_prompt: the user accepts that all of a prompt is kept (`KVFidelity.GENERATED_ONLY`).
            counters_dir: where workers leave what they have evicted, see `trtkit.trtllm.counters`; None: nobody asks.

        Raises:
            TrtkitError: this release has no room for the policy.
        """


def adapter_names() -> tuple[str, ...]:
    """Policies that have an adapter installed."""
    return tuple(sorted({point.name for point in importlib.metadata.entry_points(group=GROUP)}))


def check_adapter(plan: BuildPlan) -> tuple[str, ...]:
    """Refuse a policy that nothing here could carry out on the PyTorch backend, or not with this plan.

    Returns:
        What there is to know about how it will run; empty for other targets and for a full cache.

    Raises:
        UnsupportedError: lists those that can be, or says what stands in the way.
    """
    if plan.target != "pytorch" or plan.kv.is_full:
        return ()
    return _adapter(plan).check(plan, pool_tokens=pool_tokens(plan))


def with_policy(
    plan: BuildPlan, arguments: dict[str, Any], *, pin_prompt: bool = False, counters_dir: Path | None = None
) -> dict[str, Any]:
    """`arguments` with those of the plan's policy over them, merged by key one level deep.

    Raises:
        UnsupportedError: no adapter, or it finds no room in this release.
    """
    if plan.target != "pytorch" or plan.kv.is_full:
        return arguments
    ours = _adapter(plan).arguments(
        plan, pool_tokens=pool_tokens(plan), pin_prompt=pin_prompt, counters_dir=counters_dir
    )
    merged = dict(arguments)
    for name, value in ours.items():
        merged[name] = {**merged[name], **value} if isinstance(value, dict) and name in merged else value
    return merged


def handicaps(plan: BuildPlan, arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """What TensorRT-LLM does without because of the plan's policy, in lines to keep beside every number.

    `arguments` are those `with_policy` gave.
    """
    if plan.target != "pytorch" or plan.kv.is_full:
        return ()
    capacity = arguments.get("scheduler_config", {}).get("capacity_scheduler_policy")
    found = (
        (arguments.get("cuda_graph_config", True) is None, "CUDA graphs are off"),
        (arguments.get("disable_overlap_scheduler", False), "the overlap scheduler is off"),
        (
            capacity == "GUARANTEED_NO_EVICT",
            "blocks are reserved in full (GUARANTEED_NO_EVICT), so what eviction frees admits no further request",
        ),
    )
    return tuple(f"KV policy {plan.kv.label}: {line}" for applies, line in found if applies)


def pool_tokens(plan: BuildPlan) -> int | None:
    """Tokens one rank's KV cache has room for; modeled, and None where the GPU's memory is not known."""
    limits, device = plan.limits, gpu_spec(plan.gpu).memory_bytes
    room = limits.kv_memory_bytes
    if room is None:
        if not device:
            return None
        weights = weight_bytes(plan.model, plan.quant, plan.parallel)
        room = int(limits.kv_fraction * (device * (1 - _RUNTIME_SHARE) - weights))
    return max(0, room) // kv_bytes_per_token(plan)


def _adapter(plan: BuildPlan) -> PolicyAdapter:
    points = [point for point in importlib.metadata.entry_points(group=GROUP) if point.name == plan.kv.kind]
    if not points:
        known = ", ".join(("full", *adapter_names()))
        raise UnsupportedError(
            f"{plan.name}: KV policy {plan.kv.kind!r} has no adapter for TensorRT-LLM's PyTorch backend; there are {known}; "
            "or use --target embedded"
        )
    adapter: PolicyAdapter = points[0].load()
    return adapter
