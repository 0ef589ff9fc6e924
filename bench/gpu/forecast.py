"""What a cell should take, written down before it runs: two floors and a prediction, none of them measured.

Floors divide counted work (`trtkit.plan.work`) by somebody's rates: this machine's measured ceilings, or the datasheet's.
The prediction allows for what kernels leave unused. Its shares are assumed, from the aims of the kernels, until a GPU has
been measured; `bench/LOG.md` keeps how far off they were.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from bench.gpu.memory import most_in_flight
from trtkit.benchmark.shares import floor as measured_floor
from trtkit.benchmark.shares import mean_context, multiply_limit
from trtkit.plan.work import decode_flops, kv_read_bytes, prefill_flops, weight_read_bytes
from trtkit.spec.catalog import gpu_spec
from trtkit.spec.limits import READ_BYTES_S, matmul_key
from trtkit.spec.measured import Measured, Source
from trtkit.spec.plan import BuildPlan
from trtkit.spec.units import MS_PER_S
from trtkit.spec.workload import Workload

WEIGHT_READ_SHARE = 0.90
KV_READ_SHARE = 0.75
MATMUL_SHARE = 0.85
STEP_OVERHEAD_MS = 0.4
WIDENING_BYTES = 2 * 2.0
"""Bytes moved per 8-bit weight when a prompt's step widens it before the product: written and read again in 16 bits."""


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
        predict(plan, workload, limits, running) or predict(plan, workload, sheet, running),
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


def predict(plan: BuildPlan, workload: Workload, limits: Mapping[str, Measured], batch: int) -> Numbers | None:
    """The floor with assumed shares for reading weights, reading caches and multiplying, and an overhead a step."""
    flops, reading = multiply_limit(plan, limits), limits.get(READ_BYTES_S)
    if flops is None or reading is None or workload.isl == 0:
        return None
    model, quant = plan.model, plan.quant
    weights = weight_read_bytes(model, quant)
    context = mean_context(plan, workload)
    weights_s = weights / (reading.value * WEIGHT_READ_SHARE)
    cache_s = kv_read_bytes(model, quant, [context] * batch) / (reading.value * KV_READ_SHARE)
    products_s = batch * decode_flops(model, context) / (flops.value * MATMUL_SHARE)
    step_s = max(weights_s, products_s) + cache_s + STEP_OVERHEAD_MS / MS_PER_S
    # Prompts that arrive together share steps, and each step widens the weights once.
    together = workload.concurrency or 1
    steps = math.ceil(together * workload.isl / plan.limits.max_num_tokens) / together
    widening_s = steps * weights * WIDENING_BYTES / reading.value if quant.is_weight_only else 0.0
    products_s = prefill_flops(model, workload.isl) / (flops.value * MATMUL_SHARE)
    prefill_s = max(products_s + widening_s, weights_s / together)
    return _numbers(workload, batch, prefill_s, step_s, Source.ASSUMED, "floor / assumed shares")


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
    warm = predict(plan, short, datasheet_limits(plan.gpu), warmup)
    return repeats * repeat_s + (warmup * short.osl / warm.tps.value if warm else 0.0)
