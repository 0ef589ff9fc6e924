"""What one claim needs of its machine: bytes against bandwidth, operations against peaks, bytes against memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from trtkit.audit import claims as c
from trtkit.audit.claims import Claim
from trtkit.plan import work
from trtkit.plan.names import Precision
from trtkit.plan.roofline import max_sequences, prefill_floor_s, throughput_ceiling, ttft_floor_s
from trtkit.plan.scenario import Scenario
from trtkit.spec.errors import UnsupportedError
from trtkit.spec.units import GB, GIB, MS_PER_S, TERA

POSSIBLE, IMPLAUSIBLE, IMPOSSIBLE, INCONSISTENT, UNREADABLE = (
    "possible",
    "implausible",
    "impossible",
    "inconsistent",
    "unreadable",
)
COUNT_TOLERANCE = 0.05
"""Sizes that follow exactly from the shape may be rounded, or GB taken for GiB, but not be further off."""
MMLU_CHANCE = 25.0
MMLU_QUESTIONS = 14_042
ROUNDING = 0.001


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """The limit of a claim in its base unit, the share of it that the claim needs (above 1 is impossible), and how."""

    limit: float | None
    share: float | None
    arithmetic: str
    exact: bool = False
    """The quantity is a count, so that being on either side of it is wrong."""


def scenario_of(claim: Claim) -> Scenario:
    """The claim's configuration with lengths that favour it where it states none (one token in, one out)."""
    isl = claim.isl or 1
    osl = claim.osl or 1
    kept = None
    if not claim.policy.is_full:
        kept = max(claim.policy.resolved(isl + osl).budget or 1, 1)
    return Scenario(
        model=claim.model,
        gpu=claim.gpu,
        precision=_runnable(claim),
        isl=isl,
        osl=osl,
        concurrency=claim.concurrency,
        tp=claim.num_gpus,
        kept_tokens=kept,
        cached_tokens=min(claim.cached_tokens, isl),
    )


def _runnable(claim: Claim) -> Precision:
    """The precision with operands the device has: narrow formats without units run as weight-only."""
    try:
        claim.precision.gemm_flops_s(claim.gpu)
    except UnsupportedError:
        quant = claim.precision.quant
        wide = replace(quant, activations=quant.compute)
        return Precision(name=claim.precision.name + " (weight-only)", quant=wide, family=None)
    return claim.precision


def limit_of(claim: Claim) -> Limit:
    """The physical or arithmetical limit of one claim."""
    if claim.kind in (c.MEMORY, c.WEIGHTS, c.KV_REQUEST, c.KV_TOTAL):
        return _sizes(claim)
    if claim.kind == c.QUALITY:
        return _quality(claim)
    if claim.kind in (c.COST, c.MONTHLY, c.REQUESTS):
        return Limit(limit=None, share=None, arithmetic="no limit of its own; see the checks against other rows")
    return _speed(claim)


def _speed(claim: Claim) -> Limit:
    scenario = scenario_of(claim)
    held = work.weight_bytes(claim.model, claim.precision.quant) / GB
    room = claim.num_gpus * claim.gpu.memory_bytes / GB
    if held > room:
        text = f"{held:.2f} GB of weights do not fit {claim.num_gpus} x {claim.gpu.title} ({room:.1f} GB)"
        return Limit(limit=None, share=held / room, arithmetic=text)
    if claim.kind in (c.TTFT, c.TPOT, c.E2E):
        return _latency(claim, scenario)
    step_s, text = _step(claim, scenario)
    if claim.kind == c.PER_USER:
        return _rate_limit(claim, 1 / step_s, text)
    total_gpus = 1 if claim.kind != c.PER_GPU else claim.num_gpus
    lengths_known = claim.osl is not None and claim.isl is not None
    if claim.concurrency is not None and (claim.kind == c.DECODE or not lengths_known):
        most = claim.concurrency / step_s / total_gpus
        return _rate_limit(claim, most, f"{claim.concurrency} tokens per step; {text}")
    if not lengths_known:
        return _no_load(claim, scenario, total_gpus)
    ceiling = throughput_ceiling(scenario) * claim.accept_length * claim.sparsity / total_gpus
    most = min(claim.concurrency or max_sequences(scenario), max_sequences(scenario))
    prefill_ms = prefill_floor_s(scenario) * MS_PER_S
    return _rate_limit(
        claim,
        ceiling,
        f"{work.weight_read_bytes(scenario.model, scenario.precision.quant) / GB:.2f} GB of weights over "
        f"{most:.0f} requests, {prefill_ms:.1f} ms of prefill per request, at most {ceiling:,.1f} tok/s",
    )


def _latency(claim: Claim, scenario: Scenario) -> Limit:
    first = _ttft(claim, scenario)
    if claim.kind == c.TTFT:
        return first
    step_s, text = _step(claim, scenario)
    if claim.kind == c.TPOT:
        return _time_limit(claim, step_s * MS_PER_S, text)
    steps = (claim.osl or 1) - 1
    least = (first.limit or 0.0) + steps * step_s * MS_PER_S
    return _time_limit(claim, least, f"TTFT >= {first.limit:.1f} ms + {steps} x ({text})")


def _no_load(claim: Claim, scenario: Scenario, total_gpus: int) -> Limit:
    """Neither load nor lengths are stated: only the operations of a token bound the rate."""
    flops = work.linear_flops_per_token(claim.model)
    rate = claim.num_gpus * scenario.precision.gemm_flops_s(claim.gpu) * claim.sparsity / flops / total_gpus
    return _rate_limit(claim, rate, f"{flops / 1e9:.1f} GFLOP per token, no load stated")


def _ttft(claim: Claim, scenario: Scenario) -> Limit:
    least_ms = ttft_floor_s(scenario) * MS_PER_S / claim.sparsity
    if claim.isl is None:
        return _time_limit(claim, least_ms, f"every weight read once, prompt length not stated: {least_ms:.1f} ms")
    tflop = work.prefill_flops(claim.model, claim.isl, cached_tokens=scenario.cached_tokens) / TERA
    rate = claim.num_gpus * scenario.precision.gemm_flops_s(claim.gpu) / TERA
    cached = f" ({scenario.cached_tokens} tokens cached)" if scenario.cached_tokens else ""
    text = (
        f"{tflop:.2f} TFLOP for {claim.isl} tokens{cached} / ({claim.num_gpus} x {rate / claim.num_gpus:,.1f} TFLOP/s"
        f" on {scenario.precision.quant.activations.value} operands) = {least_ms:.1f} ms"
    )
    return _time_limit(claim, least_ms, text)


def _step(claim: Claim, scenario: Scenario) -> tuple[float, str]:
    """Seconds per output token and request: a step's bytes over the memory rate, per accepted token."""
    running = max(1, min(claim.concurrency or 1, int(max_sequences(scenario)) or 1))
    quant = scenario.precision.quant
    weights = work.weight_read_bytes(claim.model, quant) / claim.sparsity
    cache = 0.0
    if claim.isl is not None:
        cache = work.kv_read_bytes(claim.model, quant, [scenario.cached_context] * running)
    rate = claim.num_gpus * claim.gpu.memory_bandwidth_bytes_s
    seconds = (weights + cache) / rate / claim.accept_length
    flops_s = (
        running
        * work.linear_flops_per_token(claim.model)
        / (claim.num_gpus * scenario.precision.gemm_flops_s(claim.gpu) * claim.sparsity)
    )
    accepted = f" / {claim.accept_length:g} accepted" if claim.accept_length != 1 else ""
    text = (
        f"({weights / GB:.2f} GB weights + {cache / GB:.2f} GB KV of {running} requests) / "
        f"{claim.num_gpus} x {claim.gpu.memory_bandwidth_bytes_s / GB:,.0f} GB/s{accepted} = {seconds * MS_PER_S:.2f} ms"
    )
    if flops_s > seconds:
        return (
            flops_s,
            f"{running} x {work.linear_flops_per_token(claim.model) / 1e9:.1f} GFLOP = {flops_s * MS_PER_S:.2f} ms",
        )
    return seconds, text


def _time_limit(claim: Claim, least: float, text: str) -> Limit:
    return Limit(limit=least, share=least / claim.value, arithmetic=f"{text}; claimed {claim.value:,.4g} ms")


def _rate_limit(claim: Claim, most: float, text: str) -> Limit:
    return Limit(
        limit=most,
        share=claim.value / most,
        arithmetic=f"{text}; at most {most:,.1f}, claimed {claim.value:,.4g} tok/s",
    )


def _sizes(claim: Claim) -> Limit:
    quant = claim.precision.quant
    weights = work.weight_bytes(claim.model, quant) / GB
    if claim.kind == c.MEMORY:
        return _memory(claim, weights)
    if claim.kind == c.WEIGHTS:
        text = f"{claim.model.num_params:,} parameters as {claim.precision.name} are {weights:.2f} GB"
        return _count(claim, weights, text)
    token = claim.model.kv_bytes_per_token(quant.kv)
    if claim.isl is None:
        return Limit(limit=None, share=None, arithmetic=f"{token:,} bytes per token; no context stated")
    tokens: float = claim.isl
    if not claim.policy.is_full:
        tokens = claim.policy.resolved(claim.isl).budget or claim.isl
    requests = claim.concurrency or 1 if claim.kind == c.KV_TOTAL else 1
    exact = token * tokens * requests / GB
    return _count(claim, exact, f"{requests} x {tokens:,.0f} tokens x {token:,} B = {exact:.3f} GB")


def _memory(claim: Claim, weights: float) -> Limit:
    per_gpu = claim.gpu.memory_bytes / GB
    # A figure above one device's memory can only be the sum over all of them.
    whole = claim.value > per_gpu * 1.02 or claim.num_gpus == 1
    held, room = (weights, per_gpu * claim.num_gpus) if whole else (weights / claim.num_gpus, per_gpu)
    where = "in all" if whole else "per GPU"
    if claim.value > room * 1.02:
        text = f"{claim.num_gpus} x {claim.gpu.title} have {room:.1f} GB {where}; claimed {claim.value:.4g} GB"
        return Limit(limit=room, share=claim.value / room, arithmetic=text)
    text = f"weights alone are {held:.2f} GB {where} ({held * GB / GIB:.2f} GiB); claimed {claim.value:.4g} GB"
    return Limit(limit=held, share=held / claim.value, arithmetic=text)


def _count(claim: Claim, exact: float, text: str) -> Limit:
    return Limit(limit=exact, share=claim.value / exact, arithmetic=f"{text}; claimed {claim.value:.4g} GB", exact=True)


def _quality(claim: Claim) -> Limit:
    if claim.value > 100:
        return Limit(limit=100.0, share=claim.value / 100, arithmetic=f"{claim.value:g} of 100 questions")
    noise = math.sqrt(claim.value * (100 - claim.value) / MMLU_QUESTIONS)
    text = (
        f"four choices give {MMLU_CHANCE:g} by chance; claimed {claim.value:g}, of which {2 * noise:.2f} either way is "
        f"noise of {MMLU_QUESTIONS:,} questions"
    )
    return Limit(limit=100.0, share=claim.value / 100, arithmetic=text)


def verdict_of(claim: Claim, limit: Limit, highest: dict[str, float]) -> str:
    """Verdict of one claim by itself. `highest` holds the largest share of a limit ever measured, by kind."""
    if limit.share is None:
        return POSSIBLE
    if limit.exact:
        return _verdict_of_count(limit.share)
    if limit.share > 1 + ROUNDING:
        return IMPOSSIBLE
    if claim.kind == c.QUALITY:
        return IMPLAUSIBLE if claim.value < MMLU_CHANCE else POSSIBLE
    if claim.kind == c.MEMORY:
        return POSSIBLE
    return IMPLAUSIBLE if limit.share > highest[_measured_as(claim)] * (1 + ROUNDING) else POSSIBLE


def _verdict_of_count(share: float) -> str:
    gib = share * GIB / GB
    near = any(abs(value - 1) <= COUNT_TOLERANCE for value in (share, gib))
    return POSSIBLE if near else INCONSISTENT


def _measured_as(claim: Claim) -> str:
    """Which measured shares a claim compares with: a decode rate at a known load compares with TPOT."""
    if claim.kind in (c.TTFT, c.E2E):
        return "ttft" if claim.kind == c.TTFT else "tpot"
    if claim.kind in (c.THROUGHPUT, c.PER_GPU) and claim.concurrency is None:
        return "throughput"
    return "tpot"
