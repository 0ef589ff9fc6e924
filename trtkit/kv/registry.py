"""Finding policies: entry points in the group `trtkit.kv_policies`, ours and anybody's alike."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace

from trtkit.kv.policy import EvictionPolicy
from trtkit.spec.errors import TrtkitError, UsageError
from trtkit.spec.kv import FULL, KVPolicySpec

GROUP = "trtkit.kv_policies"


def policy_names() -> tuple[str, ...]:
    """What `--kv` accepts before the colon, `full` first."""
    return (FULL, *sorted({point.name for point in importlib.metadata.entry_points(group=GROUP)}))


def load_policy(spec: KVPolicySpec, *, max_seq_len: int, default_interval: int | None = None) -> EvictionPolicy | None:
    """Build the policy a spec names; None for `full`.

    A share is taken of `max_seq_len` here; an engine resolves it per request before. `default_interval` (the engine's block size) fills in an open interval.

    Raises:
        UsageError: no such policy, two packages claim the name, the package is broken, or the budget is above
            `max_seq_len`; also what the policy itself refuses.
    """
    if spec.is_full:
        return None
    resolved = spec.resolved(max_seq_len)
    if resolved.budget is not None and resolved.budget > max_seq_len:
        raise UsageError(
            f"KV budget {resolved.budget} is above max_seq_len {max_seq_len}, so nothing would ever be evicted; "
            f"use a budget up to {max_seq_len}, or --kv full"
        )
    if resolved.interval is None and default_interval is not None:
        resolved = replace(resolved, interval=default_interval)
    factory = _factory(spec.kind)
    try:
        policy = factory.from_spec(resolved)  # type: ignore[attr-defined]
    except TrtkitError:
        raise
    except Exception as error:
        # Anybody's code: whatever it raises refuses this policy and stops nothing else.
        raise UsageError(
            f"KV policy {spec.kind!r} cannot be built: {type(error).__name__}: {error}; it needs from_spec(spec)"
        ) from error
    if not isinstance(policy, EvictionPolicy):
        raise UsageError(
            f"KV policy {spec.kind!r}: {type(policy).__name__} is no eviction policy; it needs budget, watch and select"
        )
    return policy


def _factory(kind: str) -> object:
    points = [point for point in importlib.metadata.entry_points(group=GROUP) if point.name == kind]
    if not points:
        raise UsageError(f"unknown KV policy {kind!r}: installed are {', '.join(policy_names())}")
    if len({point.value for point in points}) > 1:
        claims = ", ".join(sorted(point.value for point in points))
        raise UsageError(f"KV policy {kind!r} is claimed twice ({claims}); uninstall one of the packages")
    try:
        return points[0].load()
    except Exception as error:
        # Importing runs anybody's code.
        raise UsageError(
            f"KV policy {kind!r} cannot be loaded from {points[0].value}: {error}; reinstall its package"
        ) from error
