"""What a row's engine should hold on its GPU, as `trtkit plan` lays it out, beside what the engine and NVML saw."""

from __future__ import annotations

from collections.abc import Mapping

from trtkit.plan.memory import MemoryPlan, Placement, plan_memory
from trtkit.spec.catalog import gpu_spec
from trtkit.spec.engine import EngineInfo
from trtkit.spec.measured import Measured, Source
from trtkit.spec.plan import BuildPlan
from trtkit.spec.result import MemorySplit


def placement(plan: BuildPlan) -> Placement:
    """The plan as `trtkit plan` takes it."""
    return Placement(
        model=plan.model,
        gpu=gpu_spec(plan.gpu),
        quant=plan.quant,
        policy=plan.kv,
        parallel=plan.parallel,
        limits=plan.limits,
        target=plan.target,
        speculation=plan.speculation,
    )


def planned(plan: BuildPlan, tokens: int | None = None) -> MemoryPlan:
    """The layout, requests counted at `tokens` (by default the longest that the engine takes)."""
    return plan_memory(placement(plan), sequence_tokens=tokens)


def most_in_flight(plan: BuildPlan, tokens: int, shared: int = 0) -> int | None:
    """Requests of this length whose cache fits the modeled pool at once; None on a CPU, where the pool is not the limit.

    `shared` of the tokens, whole blocks, lie in blocks that all requests share and the pool holds once.
    """
    if gpu_spec(plan.gpu).sm == 0:
        return None
    layout = planned(plan, tokens)
    if not shared or not layout.max_sequences:
        return layout.max_sequences
    size = layout.tokens_per_block
    return (layout.kv_blocks - shared // size) // (-(-tokens // size) - shared // size)


def fits(plan: BuildPlan) -> bool:
    """At least one request of the longest length runs."""
    return gpu_spec(plan.gpu).sm == 0 or planned(plan).fits


def memory_rows(
    plan: BuildPlan, info: EngineInfo | None = None, seen: MemorySplit | None = None
) -> Mapping[str, Measured]:
    """Every part by who says so: "plan.*" is `trtkit plan`, "engine.*" the engine when it had opened (its allocator and
    the driver), "seen.*" NVML from outside at the peak.
    """
    layout = planned(plan)
    rows = {
        "plan.weights": layout.weight_bytes,
        "plan.activations": layout.activation_bytes,
        "plan.runtime": layout.runtime_bytes,
        "plan.eviction": layout.eviction_bytes,
        "plan.kv_pool": layout.kv_pool_bytes,
        "plan.total": layout.total_bytes,
    }
    found = {name: _bytes(size, Source.MODELED) for name, size in rows.items()}
    if info is not None:
        parts = {**info.device_memory, "weights": info.weight_bytes, "kv_pool": info.kv_pool_bytes}
        found |= {f"engine.{name}": _bytes(size, Source.MEASURED) for name, size in parts.items()}
    if seen is not None and seen.peak_bytes is not None:
        found["seen.total"] = _bytes(seen.peak_bytes, Source.MEASURED)
        if seen.other_bytes is not None:
            found["seen.other"] = _bytes(seen.other_bytes, Source.MEASURED)
    return found


def _bytes(size: int, source: Source) -> Measured:
    return Measured(value=float(size), unit="B", source=source)
