"""The floor: what datasheet bytes per second and operations per second allow, with no overhead at all.

Nothing beats these numbers. They say what is possible, the forecast says what to expect.
"""

from __future__ import annotations

from dataclasses import dataclass

from trtkit.plan import work
from trtkit.plan.scenario import Scenario
from trtkit.spec.measured import Measured, Source
from trtkit.spec.units import MS_PER_S


@dataclass(frozen=True, kw_only=True, slots=True)
class Floors:
    """Least times in ms, highest rate in output tokens per second, and the requests whose cache fits at most."""

    ttft_ms: Measured
    tpot_ms: Measured
    tok_s: Measured
    e2e_ms: Measured
    max_in_flight: float


def datasheet(value: float, unit: str, note: str = "") -> Measured:
    """A number that follows from datasheet peaks alone."""
    return Measured(value=value, unit=unit, source=Source.DATASHEET, note=note)


def floors(scenario: Scenario) -> Floors:
    """The limits of a scenario.

    Raises:
        UnsupportedError: the device has no unit for these operands.
    """
    ttft_s = ttft_floor_s(scenario)
    tpot_s = tpot_floor_s(scenario)
    return Floors(
        ttft_ms=datasheet(ttft_s * MS_PER_S, "ms", "operations of the prompt / peak operations per second"),
        tpot_ms=datasheet(tpot_s * MS_PER_S, "ms", "bytes of a step / peak bytes per second"),
        tok_s=datasheet(throughput_ceiling(scenario), "tok/s", "bytes or operations per output token at the peak"),
        e2e_ms=datasheet((ttft_s + (scenario.osl - 1) * tpot_s) * MS_PER_S, "ms", "TTFT + (OSL - 1) x TPOT"),
        max_in_flight=max_sequences(scenario),
    )


def bandwidth_bytes_s(scenario: Scenario) -> float:
    """Datasheet memory rate of one replica."""
    return scenario.num_gpus * scenario.gpu.memory_bandwidth_bytes_s


def prefill_floor_s(scenario: Scenario) -> float:
    """Seconds of the prompt's operations at the datasheet peaks: matrices at their type's, attention in 16 bits.

    Pipeline stages take turns on one prompt only unless it is chunked, so all devices count: nothing is faster.
    """
    model, precision, gpu = scenario.model, scenario.precision, scenario.gpu
    new_tokens = scenario.isl - scenario.cached_tokens
    products = work.linear_flops_per_token(model) * new_tokens / precision.gemm_flops_s(gpu)
    attention = work.attention_flops(model, scenario.isl, cached_tokens=scenario.cached_tokens)
    sixteen_bit = (attention + work.head_flops(model)) / precision.attention_flops_s(gpu)
    return (products + sixteen_bit) / scenario.num_gpus


def ttft_floor_s(scenario: Scenario) -> float:
    """A first token needs the prompt's operations, and every weight read once."""
    weights = work.weight_read_bytes(scenario.model, scenario.precision.quant) / bandwidth_bytes_s(scenario)
    return max(prefill_floor_s(scenario), weights)


def max_sequences(scenario: Scenario) -> float:
    """Sequences of full length whose cache fits beside the weights, if nothing else needed memory.

    Tokens found in a prefix cache may be held once for all of them.
    """
    quant = scenario.precision.quant
    pool = scenario.num_gpus * scenario.gpu.memory_bytes - work.weight_bytes(scenario.model, quant)
    length: float = scenario.isl + scenario.osl
    if scenario.kept_tokens is not None:
        length = min(length, scenario.kept_tokens)
    if scenario.model.sliding_window is not None:
        length = min(length, scenario.model.sliding_window)
    shared = min(scenario.cached_tokens, length - 1)
    token_bytes = scenario.model.kv_bytes_per_token(quant.kv)
    return max(pool - shared * token_bytes, 0) / (token_bytes * (length - shared))


def step_cache_bytes(scenario: Scenario, running: float) -> float:
    """Keys and values a decode step must read: of one request all, of the others what they do not have in common."""
    model, quant, context = scenario.model, scenario.precision.quant, scenario.cached_context
    own = work.kv_read_bytes(model, quant, [context - min(scenario.cached_tokens, context)])
    return work.kv_read_bytes(model, quant, [context]) + (running - 1) * own


def decode_flops_s_per_token(scenario: Scenario) -> float:
    """Seconds of one output token's operations at the datasheet peaks of one replica."""
    model, precision, gpu = scenario.model, scenario.precision, scenario.gpu
    products = work.linear_flops_per_token(model) / precision.gemm_flops_s(gpu)
    attention = work.decode_flops(model, scenario.cached_context) - work.linear_flops_per_token(model)
    return (products + attention / precision.attention_flops_s(gpu)) / scenario.num_gpus


def tpot_floor_s(scenario: Scenario) -> float:
    """One step reads the weights and every running request's cache, and computes a token for each.

    Requests that cannot fit are not running: they wait, so they do not add bytes to a step.
    """
    running = scenario.concurrency or 1
    if not scenario.static:
        running = max(1, min(running, int(max_sequences(scenario))))
    quant = scenario.precision.quant
    step_bytes = work.weight_read_bytes(scenario.model, quant) + step_cache_bytes(scenario, running)
    return max(step_bytes / bandwidth_bytes_s(scenario), running * decode_flops_s_per_token(scenario))


def throughput_ceiling(scenario: Scenario) -> float:
    """Output tokens per second that no schedule can beat: per token, its share of the bytes or its operations.

    Bytes: the weights over as many requests as fit (or the concurrency), and the token's own cache. Operations: the
    token's own and its share of the prompt's. Perfect overlap of the two.
    """
    most = max(1.0, max_sequences(scenario))
    # Blocks are taken as tokens arrive, so on average a running request holds only half of its output.
    own = scenario.isl - scenario.cached_tokens
    most *= (own + scenario.osl) / (own + scenario.osl / 2)
    running = most if scenario.concurrency is None else min(most, scenario.concurrency)
    running = max(running, 1.0)
    step_bytes = work.weight_read_bytes(scenario.model, scenario.precision.quant) + step_cache_bytes(scenario, running)
    token_bytes = step_bytes / running
    token_s = prefill_floor_s(scenario) / scenario.osl + decode_flops_s_per_token(scenario)
    return 1 / max(token_bytes / bandwidth_bytes_s(scenario), token_s)
