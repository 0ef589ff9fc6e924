"""What a cell should take, written down before it runs: two floors and a prediction, none of them measured.

Floors divide counted work (`trtkit.plan.work`) by somebody's rates: this machine's measured ceilings, or the datasheet's.
The prediction allows for what kernels leave unused. Its shares are assumed, from the aims of the kernels, until a GPU has
been measured; `bench/LOG.md` keeps how far off they were. The decode step is taken to be bound by reading.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from bench.gpu.memory import most_in_flight
from trtkit.benchmark.shares import floor as measured_floor
from trtkit.benchmark.shares import mean_context, multiply_limit
from trtkit.plan.work import kv_read_bytes, prefill_flops, weight_read_bytes
from trtkit.spec.catalog import gpu_spec
from trtkit.spec.dtype import DType
from trtkit.spec.limits import READ_BYTES_S, matmul_key
from trtkit.spec.measured import Measured, Source
from trtkit.spec.plan import BuildPlan
from trtkit.spec.units import MS_PER_S
from trtkit.spec.workload import Workload

WEIGHT_READ_SHARE = 0.90
KV_READ_SHARE = 0.75
MATMUL_SHARE = 0.92
FUSED_MATMUL_SHARE = 0.5
FUSED_TOKENS = 512
"""Steps of at most so many tokens widen 8-bit weights inside our own product, larger ones before the library's."""
WIDENING_BYTES = 4.0
"""Bytes moved for each weight that is widened first: written and read again in 16 bits."""
SMALL_KERNEL_BYTES = 42
"""Bytes that norms, rotation and activation move for each token, layer and hidden element (counted)."""
STEP_OVERHEAD_MS = 1.0
"""A decode step's small kernels, 0.7 ms by the count in bench/LOG.md, and attention's second pass."""
ATTAINED = {READ_BYTES_S: 0.90, matmul_key(DType.FP8): 0.70}
ATTAINED_PRODUCT = 0.80
"""What a ceiling measured on such a card is of its datasheet; stands in for a probe before there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Numbers:
    """`ttft_ms` of one request alone (None above concurrency 1: it is mostly waiting), `step_ms` of one decode step of
    `batch` requests, `tps` over one closed-loop round.
    """

    batch: int
    ttft_ms: Measured | None
    step_ms: Measured
    tps: Measured


def datasheet_limits(gpu: str) -> dict[str, Measured]:
    """A catalogued GPU's peaks under the names of measured ceilings; empty for a CPU, whose entry is a placeholder."""
    spec = gpu_spec(gpu)
    if spec.sm == 0:
        return {}
    limits = {
        READ_BYTES_S: Measured(value=spec.memory_bandwidth_bytes_s, unit="B/s", source=Source.DATASHEET),
    }
    for dtype, rate in spec.peak_flops.items():
        limits[matmul_key(dtype)] = Measured(value=rate, unit="FLOP/s", source=Source.DATASHEET)
    return limits


def cell_numbers(
    plan: BuildPlan, workload: Workload, limits: Mapping[str, Measured], batch: int | None = None
) -> tuple[Numbers | None, Numbers | None, Numbers | None]:
    """Floor by measured ceilings, floor by the datasheet, prediction; None where rates are unknown.

    `batch` is how many requests ran at once, where that is known; before a run it is what fits.
    """
    running = batch or running_batch(plan, workload)
    sheet = datasheet_limits(plan.gpu)
    return (
        floor_numbers(plan, workload, limits, running, Source.MODELED),
        floor_numbers(plan, workload, sheet, running, Source.DATASHEET),
        predict(plan, workload, limits, running) or predict(plan, workload, attainable(plan.gpu), running),
    )


def running_batch(plan: BuildPlan, workload: Workload) -> int:
    """Requests in flight at most: asked, admitted, and fitting the modeled pool."""
    asked = min(workload.concurrency or plan.limits.max_batch_size, plan.limits.max_batch_size)
    fits = most_in_flight(plan, workload.isl + workload.osl)
    return max(1, asked if fits is None else min(asked, fits))


def floor_numbers(
    plan: BuildPlan, workload: Workload, limits: Mapping[str, Measured], batch: int, source: Source
) -> Numbers | None:
    """Counted work over rates, no overhead at all."""
    least = measured_floor(plan, workload, limits, batch) if limits else None
    if least is None:
        return None
    return _numbers(workload, batch, least.prefill_s, least.step_s, source, "counted work / rates")


def attainable(gpu: str) -> dict[str, Measured]:
    """The datasheet's rates less what even a plain kernel leaves unused (assumed)."""
    found = {}
    for key, limit in datasheet_limits(gpu).items():
        share = ATTAINED.get(key, ATTAINED_PRODUCT)
        found[key] = Measured(value=limit.value * share, unit=limit.unit, source=Source.ASSUMED)
    return found


def predict(plan: BuildPlan, workload: Workload, limits: Mapping[str, Measured], batch: int) -> Numbers | None:
    """The floor by ceilings, with assumed shares for reading weights and caches and multiplying, and small kernels."""
    reading = limits.get(READ_BYTES_S)
    if multiply_limit(plan, limits) is None or reading is None or workload.isl == 0:
        return None
    model, quant = plan.model, plan.quant
    weights_s = weight_read_bytes(model, quant) / (reading.value * WEIGHT_READ_SHARE)
    context = mean_context(plan, workload)
    cache_s = kv_read_bytes(model, quant, [context] * batch) / (reading.value * KV_READ_SHARE)
    step_s = weights_s + cache_s + STEP_OVERHEAD_MS / MS_PER_S
    prefill_s = _prompt_s(plan, workload, limits)
    return _numbers(workload, batch, prefill_s, step_s, Source.ASSUMED, "ceilings x assumed shares")


def _prompt_s(plan: BuildPlan, workload: Workload, limits: Mapping[str, Measured]) -> float:
    """One prompt's share of the steps that it shares with those that arrive together."""
    model, quant = plan.model, plan.quant
    rate, reading = multiply_limit(plan, limits), limits[READ_BYTES_S].value
    assert rate is not None
    together = workload.concurrency or 1
    tokens = together * workload.isl
    fused = quant.is_weight_only and min(tokens, plan.limits.max_num_tokens) <= FUSED_TOKENS
    share = FUSED_MATMUL_SHARE if fused else MATMUL_SHARE
    steps = math.ceil(tokens / plan.limits.max_num_tokens)
    weights = weight_read_bytes(model, quant)
    widening_s = steps * weights * WIDENING_BYTES / reading if quant.is_weight_only and not fused else 0.0
    small_s = workload.isl * model.num_layers * model.hidden_size * SMALL_KERNEL_BYTES / (reading * MATMUL_SHARE)
    products_s = prefill_flops(model, workload.isl) / (rate.value * share)
    return max(products_s + small_s + widening_s / together, steps * weights / reading / together)


def _numbers(workload: Workload, batch: int, prefill_s: float, step_s: float, source: Source, note: str) -> Numbers:
    def number(value: float, unit: str) -> Measured:
        return Measured(value=value, unit=unit, source=source, note=note)

    requests = workload.concurrency or batch
    round_s = requests * prefill_s + math.ceil(requests / batch) * (workload.osl - 1) * step_s
    return Numbers(
        batch=batch,
        ttft_ms=number(prefill_s * MS_PER_S, "ms") if requests == 1 else None,
        step_ms=number(step_s * MS_PER_S, "ms"),
        tps=number(requests * workload.osl / round_s, "tok/s"),
    )


def cell_seconds(plan: BuildPlan, workload: Workload, prediction: Numbers | None, repeats: int, warmup: int) -> float:
    """How long a cell should last, warm-up included; 0 where nothing is predicted (a CPU)."""
    if prediction is None:
        return 0.0
    repeat_s = workload.num_requests * workload.osl / prediction.tps.value
    short = replace(workload, osl=8, concurrency=warmup, num_requests=warmup)
    warm = predict(plan, short, attainable(plan.gpu), warmup)
    return repeats * repeat_s + (warmup * short.osl / warm.tps.value if warm else 0.0)
