"""Will it fit? Asked of the planner (`trtkit.plan.memory`), so that `build` and `plan` never disagree, before any work.

Counts weights and the KV cache of one longest request by the checkpoint's own arithmetic, and activations and the runtime
as the planner models them. A request whose cache is evicted still holds its budget and one step's tokens at its peak.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from trtkit.plan.memory import Placement, memory_lines, plan_memory, rank_block_bytes
from trtkit.spec.catalog import gpu_spec
from trtkit.spec.errors import CapacityError
from trtkit.spec.plan import BuildPlan, Parallelism
from trtkit.spec.quant import quant_for
from trtkit.spec.units import format_gib


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Bytes per device. `device_bytes` is None where the memory is not known; weights and KV are exact.

    `min_kv_tokens` is what one request of `max_seq_len` keeps at its peak under the plan's KV policy; `working_bytes`
    are activations, runtime and what eviction keeps, modeled; `missing_bytes` is by how much the device is too small for one such request
    (or for the pool asked for), 0 if it fits or its memory is not known.
    """

    devices: int
    weight_bytes: int
    working_bytes: int
    kv_bytes_per_token: int
    min_kv_tokens: int
    kv_pool_bytes: int | None
    device_bytes: int | None
    missing_bytes: int

    @property
    def min_kv_bytes(self) -> int:
        """KV cache of one longest request."""
        return self.kv_bytes_per_token * self.min_kv_tokens

    @property
    def needed_bytes(self) -> int:
        """Weights, working memory and the KV cache asked for, at least that of one longest request."""
        return self.weight_bytes + self.working_bytes + max(self.min_kv_bytes, self.kv_pool_bytes or 0)


def sizes(plan: BuildPlan) -> Sizes:
    """What a plan needs. The embedded engine merges all ranks on one device; the others hold one rank each."""
    placement = _placement(plan)
    memory = plan_memory(placement)
    per_token = rank_block_bytes(placement) // plan.limits.tokens_per_block
    return Sizes(
        devices=placement.parallel.world_size,
        weight_bytes=memory.weight_bytes,
        working_bytes=memory.activation_bytes + memory.runtime_bytes + memory.eviction_bytes,
        kv_bytes_per_token=per_token,
        min_kv_tokens=memory.peak_bytes // per_token,
        kv_pool_bytes=plan.limits.kv_memory_bytes,
        device_bytes=memory.device_bytes or None,
        missing_bytes=memory.missing_bytes if memory.device_bytes else 0,
    )


def memory_table(plan: BuildPlan) -> list[str]:
    """One device's memory as the planner lays it out, in lines."""
    return memory_lines(plan_memory(_placement(plan)))


def _placement(plan: BuildPlan) -> Placement:
    return Placement(
        model=plan.model,
        gpu=gpu_spec(plan.gpu),
        quant=plan.quant,
        policy=plan.kv,
        parallel=Parallelism() if plan.target == "embedded" else plan.parallel,
        limits=plan.limits,
        target=plan.target,
        speculation=plan.speculation,
    )


def check_fit(plan: BuildPlan) -> Sizes:
    """The plan's sizes, if they fit.

    Raises:
        CapacityError: says by how much they do not, and what would.
    """
    found = sizes(plan)
    pool = found.kv_pool_bytes
    if pool is not None and pool < found.min_kv_bytes:
        raise CapacityError(
            f"{plan.name}: a KV cache of {format_gib(pool)} cannot hold one request of {plan.limits.max_seq_len} tokens, "
            f"which needs {format_gib(found.min_kv_bytes)}: raise --kv-memory or lower --max-seq-len to "
            f"{pool // found.kv_bytes_per_token}"
        )
    if not found.missing_bytes:
        return found
    cache = max(found.min_kv_bytes, found.kv_pool_bytes or 0)
    raise CapacityError(
        f"{plan.name}: needs {format_gib(found.weight_bytes)} of weights, {format_gib(found.working_bytes)} to work in "
        f"(modeled) and {format_gib(cache)} of KV cache on each device, {plan.gpu} has "
        f"{format_gib(found.device_bytes or 0)}: {format_gib(found.missing_bytes)} too much; {_what_fits(plan, found)}"
    )


def _what_fits(plan: BuildPlan, found: Sizes) -> str:
    block = plan.limits.tokens_per_block
    free = (found.device_bytes or 0) - found.weight_bytes - found.working_bytes
    tokens = int(max(free, 0) * plan.limits.kv_fraction) // found.kv_bytes_per_token // block * block
    if tokens >= block and found.kv_pool_bytes is None:
        return f"--max-seq-len {tokens} would fit"
    fitting = [text for text, other in _alternatives(plan) if not sizes(other).missing_bytes]
    return f"{' or '.join(fitting[:2])} would fit" if fitting else "nothing this toolkit knows would fit"


def _alternatives(plan: BuildPlan) -> list[tuple[str, BuildPlan]]:
    """Neighbouring plans, cheapest change first."""
    kv_free = replace(plan, limits=replace(plan.limits, kv_memory_bytes=None))
    choices = [("less --kv-memory", kv_free)] if plan.limits.kv_memory_bytes is not None else []
    if plan.quant.weights.bits > 8:
        choices.append(("--precision int8", replace(kv_free, quant=quant_for("int8"))))
    if plan.quant.weights.bits > 4 and plan.target == "embedded":
        choices.append(("--precision int4", replace(kv_free, quant=quant_for("int4"))))
    if plan.target != "embedded":
        for tp in (2, 4, 8, 16):
            if tp > plan.parallel.tp and plan.model.num_heads % tp == 0 and plan.model.intermediate_size % tp == 0:
                parallel = replace(plan.parallel, tp=tp)
                choices.append((f"--tp {tp}", replace(kv_free, parallel=parallel)))
    return choices
