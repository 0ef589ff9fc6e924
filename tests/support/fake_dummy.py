"""The scripted engine behind a bundle without weights: limits and policy from its plan, time is real."""

from __future__ import annotations

from pathlib import Path

from support.fake_engine import FakeEngine, FakeScript, RealClock

from trtkit.spec.bundle import open_bundle
from trtkit.spec.errors import EngineError


def open_scripted(path: Path, /, **_overrides: object) -> FakeEngine:
    """Opener for a child process."""
    return FakeEngine(script_of(path), clock=RealClock())


def open_dying(path: Path, /, **_overrides: object) -> FakeEngine:
    """Dies in its first cell with more than one request in flight."""
    return FakeEngine(script_of(path, die_at_token=40), clock=RealClock())


def open_hanging(path: Path, /, **_overrides: object) -> FakeEngine:
    """Falls silent in its first cell with more than one request in flight, as behind a kernel that never ends."""
    return FakeEngine(script_of(path, hang_at_token=40), clock=RealClock())


def open_greedy(path: Path, /, **_overrides: object) -> FakeEngine:
    """Finds too little memory unless much is left free."""
    if open_bundle(path).manifest.plan.limits.kv_fraction > 0.8:
        raise EngineError("CUDA out of memory: tried to allocate 2.00 GiB")
    return FakeEngine(script_of(path), clock=RealClock())


def script_of(path: Path, **more: object) -> FakeScript:
    """Quick steps at the plan's limits."""
    plan = open_bundle(path).manifest.plan
    return FakeScript(
        prefill_ns_per_token=1_000,
        step_ns=200_000,
        max_batch_size=plan.limits.max_batch_size,
        max_seq_len=plan.limits.max_seq_len,
        vocab_size=plan.model.vocab_size,
        kv=plan.kv.kind,
        **more,
    )
