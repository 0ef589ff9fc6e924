"""KV policies inside TensorRT-LLM's PyTorch backend: found as entry points, like the policies themselves.

A package that can carry a policy out there registers a function under the policy's name in `trtkit.trtllm_policies`.
It takes the `KVPolicySpec` and returns keyword arguments of `LLM`, nested ones as dictionaries; what it needs in every
worker it brings along in them.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

from trtkit.spec.errors import UnsupportedError
from trtkit.spec.kv import KVPolicySpec
from trtkit.spec.plan import BuildPlan

GROUP = "trtkit.trtllm_policies"
Adapter = Callable[[KVPolicySpec], dict[str, Any]]


def adapter_names() -> tuple[str, ...]:
    """Policies that have an adapter installed."""
    return tuple(sorted({point.name for point in importlib.metadata.entry_points(group=GROUP)}))


def check_adapter(plan: BuildPlan) -> None:
    """Refuse a policy that nothing here could carry out on the PyTorch backend.

    Raises:
        UnsupportedError: lists those that can be.
    """
    if plan.target == "pytorch" and not plan.kv.is_full and plan.kv.kind not in adapter_names():
        known = ", ".join(("full", *adapter_names()))
        raise UnsupportedError(
            f"{plan.name}: KV policy {plan.kv.kind!r} has no adapter for TensorRT-LLM's PyTorch backend; there are {known}; "
            "or use --target embedded"
        )


def with_policy(plan: BuildPlan, arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments` with those of the plan's policy over them, merged by key one level deep.

    Raises:
        UnsupportedError: no adapter, or it finds no room in this release.
    """
    if plan.target != "pytorch" or plan.kv.is_full:
        return arguments
    check_adapter(plan)
    (point, *_) = importlib.metadata.entry_points(group=GROUP, name=plan.kv.kind)
    adapter: Adapter = point.load()
    merged = dict(arguments)
    for name, value in adapter(plan.kv).items():
        merged[name] = {**merged[name], **value} if isinstance(value, dict) and name in merged else value
    return merged
