"""What a cell should take, written down before it runs: two floors and a prediction, none of them measured.

Floors divide counted work (`trtkit.plan.work`) by somebody's rates: this machine's measured ceilings, or the datasheet's.
The prediction allows for what kernels leave unused, and takes every guess of a speculating engine to be wrong. Its shares are assumed, from the aims of the kernels, until a GPU has
been measured; `bench/LOG.md` keeps how far off they were. A decode step lasts as long as the slower of reading its weights
and multiplying, then come its caches and small kernels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from bench.gpu.memory import most_in_flight
from trtkit.benchmark.shares import floor as measured_floor
from trtkit.benchmark.shares import mean_context, multiply_limit, wide_limit
from trtkit.plan.work import attention_flops, head_flops, kv_read_bytes, linear_flops_per_token, weight_read_bytes
from trtkit.spec.catalog import gpu_spec
from trtkit.spec.dtype import DType
from trtkit.spec.limits import READ_BYTES_S, matmul_key
from trtkit.spec.measured import Measured, Source
from trtkit.spec.plan import BuildPlan
from trtkit.spec.units import MS_PER_S
from trtkit.spec.workload import Workload

WEIGHT_READ_SHARE = 0.90
PACKED_READ_SHARE = 0.80
"""Reading INT4: a byte is two weights to unpack, and a scale comes with every group."""
KV_READ_SHARE = 0.75
MATMUL_SHARE = 0.92
FUSED_MATMUL_SHARE = 0.5
FUSED_TOKENS = 512
"""Steps of at most so many tokens widen narrow weights inside our own product, larger ones before the library's."""
ATTENTION_SHARE = 0.5
"""A prompt's attention, of the 16-bit matrix rate: about 400 of 800 TFLOP/s."""
WIDENING_BYTES = 4.0
"""Bytes moved for each weight that is widened first: written and read again in 16 bits."""
STEP_OVERHEAD_MS = 1.0
"""A decode step's small kernels, 0.7 ms by the count in bench/LOG.md, and attention's second pass."""
GUESSING_MS = 1.5
"""What a step waits for a host that must know its tokens before it guesses the next ones: no step overlaps the next."""
ATTAINED = {READ_BYTES_S: 0.90, matmul_key(DType.FP8): 0.70}
ATTAINED_PRODUCT = 0.80
"""What a ceiling measured on such a card is of its datasheet; stands in for a probe before there is one."""
DECODE_ROWS = 64
"""Up to so many tokens a step, products keep 16-bit activations (`trtkit.kernels.matmul`, which needs torch)."""


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
    fits = most_in_flight(plan, workload.isl + workload.osl, workload.reusable_tokens(plan.limits))
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
    if multiply_limit(plan, limits) is None or READ_BYTES_S not in limits or workload.isl == 0:
        return None
    step_s = step_seconds(plan, workload, limits, batch, guesses(plan, batch))
    return _numbers(
        workload, batch, _prompt_s(plan, workload, limits), step_s, Source.ASSUMED, "ceilings x assumed shares"
    )


def step_seconds(
    plan: BuildPlan, workload: Workload, limits: Mapping[str, Measured], batch: int, drafts: int = 0
) -> float:
    """One decode step of `batch` requests. With `drafts` guessed tokens each has so many more rows, every row reads the
    request's cache for itself, and the host works between steps.
    """
    model, quant, reading = plan.model, plan.quant, limits[READ_BYTES_S].value
    rows = batch * (1 + drafts)
    share = PACKED_READ_SHARE if quant.weights is DType.INT4 else WEIGHT_READ_SHARE
    weights_s = weight_read_bytes(model, quant) / (reading * share)
    rate = multiply_limit(plan, limits)
    assert rate is not None, "asked by the caller"
    rate = wide_limit(plan, limits, rate) if rows <= DECODE_ROWS else rate
    products_s = rows * (linear_flops_per_token(model) + head_flops(model)) / (rate.value * FUSED_MATMUL_SHARE)
    cache_s = kv_read_bytes(model, quant, [mean_context(plan, workload)] * rows) / (reading * KV_READ_SHARE)
    overhead_ms = STEP_OVERHEAD_MS + (GUESSING_MS if drafts else 0.0)
    return max(weights_s, products_s) + cache_s + overhead_ms / MS_PER_S


def guesses(plan: BuildPlan, batch: int) -> int:
    """Tokens that each of `batch` requests has checked in a step: as many as the plan says, in steps of at most 64 rows."""
    if plan.speculation is None:
        return 0
    return max(0, min(plan.speculation.max_draft_tokens, DECODE_ROWS // batch - 1))


def small_kernel_bytes(plan: BuildPlan, tokens: int) -> float:
    """Bytes that everything between the products moves for each token of a step, all layers (counted).

    Norms and activation write FP8 rows themselves where the products take them; the attention's output is quantised by a
    kernel of its own.
    """
    model = plan.model
    width, heads, dim = model.hidden_size, model.num_heads, model.head_dim
    kv_bytes = 2 * model.num_kv_heads * dim * plan.quant.kv.bits / 8
    fp8 = plan.quant.activations is DType.FP8 and tokens > DECODE_ROWS
    written = 1 if fp8 else 2
    norms = 2 * (6 + written) * width
    rotation = 2 * (2 * heads + 2 * model.num_kv_heads) * dim + kv_bytes
    activation = (4 + written) * model.intermediate_size
    quantising = 3 * heads * dim if fp8 else 0
    return model.num_layers * (norms + rotation + activation + quantising)


def _prompt_s(plan: BuildPlan, workload: Workload, limits: Mapping[str, Measured]) -> float:
    """One prompt's share of the steps that it shares with those that arrive together, less what is found in the cache."""
    model, quant = plan.model, plan.quant
    rate, reading = multiply_limit(plan, limits), limits[READ_BYTES_S].value
    assert rate is not None
    together, found = workload.concurrency or 1, workload.reusable_tokens(plan.limits)
    new = workload.isl - found
    tokens = together * new
    fused = quant.is_weight_only and min(tokens, plan.limits.max_num_tokens) <= FUSED_TOKENS
    share = FUSED_MATMUL_SHARE if fused else MATMUL_SHARE
    steps = math.ceil(tokens / plan.limits.max_num_tokens)
    widened = model.num_layers * model.linear_params_per_layer * WIDENING_BYTES
    widening_s = steps * widened / reading if quant.is_weight_only and not fused else 0.0
    small_s = new * small_kernel_bytes(plan, tokens) / (reading * MATMUL_SHARE)
    wide = wide_limit(plan, limits, rate).value
    attention_s = attention_flops(model, workload.isl, cached_tokens=found) / (wide * ATTENTION_SHARE)
    products_s = new * linear_flops_per_token(model) / (rate.value * share) + head_flops(model) / (wide * share)
    computed_s = products_s + attention_s + small_s + widening_s / together
    return max(computed_s, steps * weight_read_bytes(model, quant) / reading / together)


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
