"""How close a result is to what this machine could do: measured limit over measured value, by counted work.

The work (operations, bytes) is counted from the model's shape, the rates were measured on this machine, so a share is
modeled. 1.0 is the limit; nothing may exceed it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from trtkit.plan.work import decode_flops, decode_step_bytes, linear_flops_per_token, prefill_flops
from trtkit.spec.dtype import DType
from trtkit.spec.kv import KVPolicySpec
from trtkit.spec.limits import matmul_limit, read_limit
from trtkit.spec.measured import Measured, Source
from trtkit.spec.plan import BuildPlan
from trtkit.spec.result import MetricResult
from trtkit.spec.speculation import most_tokens_a_step
from trtkit.spec.units import MS_PER_S
from trtkit.spec.workload import Workload

_MULTIPLY_TYPES = (DType.FP32, DType.BF16, DType.FP16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Floor:
    """Least times in seconds: one prompt, and one more token for each of `batch` sequences."""

    prefill_s: float
    step_s: float
    batch: int


def floor(
    plan: BuildPlan, workload: Workload, limits: Mapping[str, Measured], batch: int, *, per_step: float = 1.0
) -> Floor | None:
    """The machine's floor for this cell; None where a rate was not measured. A step gives `per_step` tokens a request.

    A decode step needs the longer of reading (weights once, every cache once) and multiplying. What block reuse may
    have computed before counts for nothing in a prompt, and is read once for all.
    """
    context, reused = mean_context(plan, workload), workload.reusable_tokens(plan.limits)
    step_bytes = decode_step_bytes(
        plan.model, plan.quant.held_by(plan.target), [context, *[context - reused] * (batch - 1)]
    )
    reading = read_limit(limits, step_bytes)
    prefill_s = prefill_floor_s(plan, limits, workload.isl, cached_tokens=reused)
    token_s = _multiply_s(plan, limits, 1, decode_flops(plan.model, context))
    if prefill_s is None or token_s is None or reading is None or workload.isl == 0:
        return None
    return Floor(prefill_s=prefill_s, step_s=max(step_bytes / reading.value / per_step, batch * token_s), batch=batch)


def prefill_floor_s(
    plan: BuildPlan, limits: Mapping[str, Measured], tokens: int, *, cached_tokens: int = 0
) -> float | None:
    """Least seconds for a prompt's operations, `cached_tokens` of it already computed; None where a rate is unknown."""
    new_tokens = max(tokens - cached_tokens, 0)
    return _multiply_s(plan, limits, new_tokens, prefill_flops(plan.model, tokens, cached_tokens=cached_tokens))


def _multiply_s(plan: BuildPlan, limits: Mapping[str, Measured], tokens: int, flops: float) -> float | None:
    """Seconds of `flops` operations, the block matrices of `tokens` tokens among them at the plan's own rate."""
    rate = multiply_limit(plan, limits)
    if rate is None:
        return None
    blocks = tokens * linear_flops_per_token(plan.model)
    return blocks / rate.value + (flops - blocks) / wide_limit(plan, limits, rate).value


def wide_limit(plan: BuildPlan, limits: Mapping[str, Measured], rate: Measured) -> Measured:
    """The rate of attention and of the head: `rate`, or that of 16 bits where only the block matrices have 8-bit operands.

    So it is in our own engine. Other engines may attend in 8 bits as well, so nothing less than `rate` bounds them.
    """
    if plan.target != "embedded" or plan.quant.activations is not DType.FP8:
        return rate
    rates = [found for dtype in (DType.BF16, DType.FP16) if (found := matmul_limit(limits, dtype)) is not None]
    return max(rates, key=lambda found: found.value, default=rate)


def multiply_limit(plan: BuildPlan, limits: Mapping[str, Measured]) -> Measured | None:
    """The fastest rate at which this plan's products may be made.

    A plan in 32 bits multiplies in 32 bits. Below that the kernel may choose (a CPU without FP16 units computes FP16
    in another type, and eight-bit weights in any), so the best measured type bounds it. Operands of 8-bit floats on a
    GPU have units of their own, twice as fast: without their rate the limit is unknown.
    """
    if plan.quant.activations is DType.FP8 and plan.gpu != "cpu":
        return matmul_limit(limits, DType.FP8)
    wanted = (DType.FP32,) if plan.quant.weights is DType.FP32 else _MULTIPLY_TYPES
    rates = [rate for dtype in wanted if (rate := matmul_limit(limits, dtype)) is not None]
    return max(rates, key=lambda rate: rate.value, default=None)


def lowered_kv(plan: BuildPlan, workload: Workload) -> KVPolicySpec:
    """The policy in tokens, as an engine takes it: a share of each request's context, an open interval of one block.

    Prompts of a file's own lengths (`isl` 0) have no one context; the longest the engine takes stands for it.
    """
    if plan.kv.is_full:
        return plan.kv
    resolved = plan.kv.resolved(workload.isl + workload.osl if workload.isl else plan.limits.max_seq_len)
    return replace(resolved, interval=resolved.interval or plan.limits.tokens_per_block)


def mean_context(plan: BuildPlan, workload: Workload) -> float:
    """Cached tokens a decode step sees, averaged over the output; a policy may keep no more than its budget."""
    context = workload.isl + (workload.osl - 1) / 2
    budget = lowered_kv(plan, workload).budget
    return context if budget is None else min(context, budget)


def shares(
    plan: BuildPlan,
    workload: Workload,
    metrics: Mapping[str, MetricResult],
    limits: Mapping[str, Measured],
    *,
    requests_peak: int | None = None,
    per_step: float | None = 1.0,
) -> Mapping[str, Measured]:
    """Shares of the machine's limit for TTFT, TPOT and TPS, where they can be known.

    `requests_peak` is how many requests the engine really ran at once, if fewer than asked. With speculation a decode
    step gave `per_step` tokens a request on average, which limits TPS. One request may have been luckier, so its TPOT has no
    limit that is known.
    """
    batch = min(workload.concurrency or plan.limits.max_batch_size, plan.limits.max_batch_size)
    batch = max(1, min(batch, requests_peak or batch))
    least = floor(plan, workload, limits, batch)
    if least is None:
        return {}
    result = {}
    if ttft := _value(metrics, "ttft_ms", "p50"):
        result["ttft_ms"] = _share(least.prefill_s * MS_PER_S / ttft, "prefill operations / matmul rate / TTFT p50")
    # An open loop runs at whatever batch its arrivals make; its limit per step is unknown.
    known = workload.request_rate is None and plan.speculation is None
    if (tpot := _value(metrics, "tpot_ms", "p50")) and known:
        note = f"decode step of {batch}: the longer of bytes / read rate and operations / matmul rate, / TPOT p50"
        result["tpot_ms"] = _share(least.step_s * MS_PER_S / tpot, note)
    guessing = None
    if per_step is not None:
        per_step = min(per_step, most_tokens_a_step(plan.speculation))
        guessing = floor(plan, workload, limits, batch, per_step=per_step)
    if (tps := _value(metrics, "tps", "value")) and guessing is not None:
        least = guessing
        seconds = batch * least.prefill_s + (workload.osl - 1) * least.step_s
        result["tps"] = _share(tps * seconds / (batch * workload.osl), f"TPS / TPS at the floor of batch {batch}")
    return result


def _value(metrics: Mapping[str, MetricResult], key: str, stat: str) -> float | None:
    metric = metrics.get(key)
    found = metric.stats.get(stat) if metric else None
    return found.value if found else None


def _share(value: float, note: str) -> Measured:
    return Measured(value=value, unit="of limit", source=Source.MODELED, note=note)
