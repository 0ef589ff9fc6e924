"""Will it fit? The least a plan needs on each device, by the checkpoint's own arithmetic, before any work is done.

Counts weights and the KV cache of one longest request; activations and the runtime come on top, so a plan that passes
may still be tight. `trtkit plan` models those too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from trtkit.spec.catalog import gpu_spec
from trtkit.spec.checkpoint import checkpoint_tensors, kv_heads_per_rank
from trtkit.spec.errors import CapacityError
from trtkit.spec.plan import BuildPlan, Parallelism
from trtkit.spec.quant import quant_for
from trtkit.spec.units import format_gib


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Modeled bytes per device. `device_bytes` is None where the memory is not known.

    `min_kv_tokens` is what one request of `max_seq_len` keeps at its peak under the plan's KV policy.
    """

    devices: int
    weight_bytes: int
    kv_bytes_per_token: int
    min_kv_tokens: int
    kv_pool_bytes: int | None
    device_bytes: int | None

    @property
    def min_kv_bytes(self) -> int:
        """KV cache of one longest request."""
        return self.kv_bytes_per_token * self.min_kv_tokens

    @property
    def needed_bytes(self) -> int:
        """Weights and the KV cache asked for, at least that of one longest request."""
        return self.weight_bytes + max(self.min_kv_bytes, self.kv_pool_bytes or 0)

    @property
    def missing_bytes(self) -> int:
        """By how much the device is too small; 0 if it fits or its memory is not known."""
        return 0 if self.device_bytes is None else max(0, self.needed_bytes - self.device_bytes)


def sizes(plan: BuildPlan) -> Sizes:
    """What a plan needs. The embedded engine merges all ranks on one device; the others hold one rank each."""
    merged = plan.target == "embedded"
    parallel = Parallelism() if merged else plan.parallel
    weights = max(
        sum(tensor.num_bytes for tensor in checkpoint_tensors(plan.model, plan.quant, parallel, pp_rank=stage))
        for stage in range(parallel.pp)
    )
    layers = plan.model.num_layers // parallel.pp
    heads = kv_heads_per_rank(plan.model, parallel.tp)
    return Sizes(
        devices=parallel.world_size,
        weight_bytes=weights,
        kv_bytes_per_token=2 * layers * heads * plan.model.head_dim * plan.quant.kv.bits // 8,
        min_kv_tokens=_min_kv_tokens(plan),
        kv_pool_bytes=plan.limits.kv_memory_bytes,
        device_bytes=gpu_spec(plan.gpu).memory_bytes or None,
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
    raise CapacityError(
        f"{plan.name}: needs {format_gib(found.weight_bytes)} of weights and "
        f"{format_gib(found.needed_bytes - found.weight_bytes)} of KV cache on each device, {plan.gpu} has "
        f"{format_gib(found.device_bytes or 0)}: {format_gib(found.missing_bytes)} too much; {_what_fits(plan, found)}"
    )


def _what_fits(plan: BuildPlan, found: Sizes) -> str:
    spare = (found.device_bytes or 0) - found.weight_bytes
    tokens = spare // found.kv_bytes_per_token if spare > 0 else 0
    if tokens >= plan.limits.tokens_per_block and found.kv_pool_bytes is None:
        return f"--max-seq-len {tokens // plan.limits.tokens_per_block * plan.limits.tokens_per_block} would fit"
    fitting = [text for text, other in _alternatives(plan) if not sizes(other).missing_bytes]
    return f"{' or '.join(fitting[:2])} would fit" if fitting else "nothing this toolkit knows would fit"


def _alternatives(plan: BuildPlan) -> list[tuple[str, BuildPlan]]:
    """Neighbouring plans, cheapest change first."""
    kv_free = replace(plan, limits=replace(plan.limits, kv_memory_bytes=None))
    narrower = replace(kv_free, quant=quant_for("int8"))
    choices = [("less --kv-memory", kv_free)]
    if plan.quant.weights.bits > 8:
        choices.append(("--precision int8", narrower))
    if plan.target != "embedded":
        for tp in (2, 4, 8, 16):
            if tp > plan.parallel.tp and plan.model.num_heads % tp == 0 and plan.model.intermediate_size % tp == 0:
                parallel = replace(plan.parallel, tp=tp)
                choices.append((f"--tp {tp}", replace(kv_free, parallel=parallel)))
    return choices


def _min_kv_tokens(plan: BuildPlan) -> int:
    longest = plan.limits.max_seq_len
    if not plan.kv.is_full:
        budget = plan.kv.resolved(longest).budget or longest
        longest = min(longest, budget + plan.limits.max_num_tokens)
    block = plan.limits.tokens_per_block
    return -(-longest // block) * block
