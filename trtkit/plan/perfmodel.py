"""The forecast's formulas: the floor's counts, divided by efficiencies, plus what a roofline leaves out.

Every quantity is a float or a numpy array of one value per configuration, so that the same lines serve one
question, a table of rows and the fit of the constants (`bench/calibrate.py`). No constant is written here.

A decode step is weights and matrix products (a smooth maximum of the two), keys and values, all-reduces, a fixed
overhead and an overhead per sequence. A prefill is the same with its own matrix efficiency and causal attention. In
a closed loop each request's decode is interrupted once by every other request's prefill.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any
"""A float or a numpy array of floats."""

EFFICIENCY_CAP = 0.93
"""No efficiency comes out above this share of a datasheet peak, whatever the fit would like."""

RATE_NAMES = (
    "weight_bw",
    "kv_bw",
    "decode_mfu",
    "attention_mfu",
    "comm_us",
    "link",
    "step_ms",
    "seq_us",
    "prefill_mfu",
)
"""Constants of one (GPU, precision): shares of datasheet peaks, then microseconds and milliseconds."""

SERVING_NAMES = (
    "slowdown",
    "step",
    "seq",
    "comm",
    "interrupt",
    "host_ms",
    "first",
    "queue",
    "queue_power",
    "pool",
    "burst",
)
"""Constants of one serving stack: factors on a GPU's constants, then what its queue adds to the first token."""

VERSION_NAMES = ("speed", "max_batch", "reserve")
"""Constants of one release: throughput factor, effective batch limit in thousands, share of the output reserved."""

POOL_NAMES = ("runtime_gb", "pool_fraction", "sharpness", "tp_runtime_gb")


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked, and its exact counts. `concurrency` is NaN at maximum load; times follow from these alone."""

    isl: Array
    osl: Array
    concurrency: Array
    tp: Array
    pp: Array
    new_tokens: Array
    """Prompt tokens that are computed, those of a prefix cache left out."""
    weight_read_bytes: Array
    weight_bytes: Array
    linear_flops: Array
    head_flops: Array
    attention_flops: Array
    comm_bytes: Array
    all_reduces: Array
    kv_token_bytes: Array
    kv_ranks: Array
    bandwidth_bytes_s: Array
    gemm_flops_s: Array
    attention_flops_s: Array
    link_bytes_s: Array
    memory_bytes: Array
    kept_tokens: Array
    """Cache tokens per sequence at most: infinity without eviction."""
    evict_interval: Array
    """Steps between evictions: infinity without."""
    static: Array
    """True where one fixed batch runs to its end (no in-flight batching)."""
    stream_steps: Array
    """Decode steps that pass before the first tokens are sent, beyond the first."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The constants that apply to each configuration, by name (`RATE_NAMES`, `SERVING_NAMES`, ...)."""

    rate: Mapping[str, Array]
    serving: Mapping[str, Array]
    version: Mapping[str, Array]
    pool: Mapping[str, Array]
    correction: Array = 0.0

    def efficiency(self, name: str) -> Array:
        """A share of peak, after the serving stack's slowdown and below the cap."""
        share = self.rate[name] / self.serving["slowdown"]
        return share * (1 + (share / EFFICIENCY_CAP) ** 8) ** (-1 / 8)


@dataclass(frozen=True, kw_only=True)
class Times:
    """Answers, in seconds and output tokens per second. `in_flight` is how many requests run at once."""

    step_s: Array
    ttft_s: Array
    tpot_s: Array
    tok_s: Array
    in_flight: Array
    capacity: Array


def decode_step_s(load: Load, rates: Rates, sequences: Array, context: Array) -> Array:
    """Seconds of one step in which `sequences` requests each get a token, with `context` tokens cached."""
    weights = load.weight_read_bytes / (load.tp * load.bandwidth_bytes_s * rates.efficiency("weight_bw"))
    products = (
        sequences
        * (load.linear_flops + load.head_flops)
        / (load.tp * load.gemm_flops_s * rates.efficiency("decode_mfu"))
    )
    visible = np.minimum(context, load.kept_tokens)
    # Scoring reads the keys (half of the cache) once per interval; compaction reads and writes a token per step.
    evicting = np.where(np.isinf(load.evict_interval), 0.0, visible / 2 / load.evict_interval + 2)
    cached = sequences * (visible + evicting) * load.kv_token_bytes
    cache_s = cached / (load.kv_ranks * load.bandwidth_bytes_s * rates.efficiency("kv_bw"))
    return (
        _smooth_max(weights, products, rates.pool["sharpness"])
        + cache_s
        + _all_reduce_s(load, rates, sequences)
        + rates.rate["step_ms"] * rates.serving["step"] * 1e-3
        + sequences * rates.rate["seq_us"] * rates.serving["seq"] * 1e-6
    )


def prefill_s(load: Load, rates: Rates, sequences: Array = 1.0) -> Array:
    """Seconds of compute from `sequences` prompts to their first tokens, without waiting and host work."""
    weights = load.weight_read_bytes / (load.tp * load.bandwidth_bytes_s * rates.efficiency("weight_bw"))
    tokens = sequences * load.new_tokens
    products = tokens * load.linear_flops / (load.tp * load.gemm_flops_s * rates.efficiency("prefill_mfu"))
    attention = (
        sequences * load.attention_flops / (load.tp * load.attention_flops_s * rates.efficiency("attention_mfu"))
    )
    return _smooth_max(weights, products, rates.pool["sharpness"]) + attention + _all_reduce_s(load, rates, tokens)


def _smooth_max(a: Array, b: Array, sharpness: Array) -> Array:
    return (a**sharpness + b**sharpness) ** (1 / sharpness)


def _all_reduce_s(load: Load, rates: Rates, tokens: Array) -> Array:
    """Seconds of the all-reduces of one pass over `tokens` tokens: a latency per call and the ring's traffic."""
    latency = rates.rate["comm_us"] * rates.serving["comm"] * 1e-6 * (np.log2(load.tp) + 1)
    ring = 2 * (load.tp - 1) / load.tp
    traffic = tokens * load.comm_bytes * ring / (load.link_bytes_s * rates.rate["link"])
    return np.where(load.tp > 1, load.all_reduces * (latency + traffic), 0.0)


def capacity(load: Load, rates: Rates) -> Array:
    """Requests whose cache fits at once. A release that reserves the whole output ahead has `reserve` 1."""
    runtime_gb = rates.pool["runtime_gb"] + (load.tp > 1) * rates.pool["tp_runtime_gb"]
    ranks = load.tp * load.pp
    free = load.memory_bytes * ranks - load.weight_bytes - runtime_gb * 1e9 * ranks
    # Sources report runs that by this arithmetic barely fit; a small floor keeps the fit differentiable there.
    pool = np.maximum(rates.pool["pool_fraction"] * rates.serving["pool"] * free, 2e9)
    tokens = np.minimum(load.isl + load.osl * rates.version["reserve"], load.kept_tokens)
    return pool / (load.kv_token_bytes * tokens)


def closed_loop(load: Load, rates: Rates) -> Times:
    """Latency and throughput with `concurrency` requests always in the system, or at maximum load where it is NaN."""
    maximum = np.isnan(load.concurrency)
    fits = capacity(load, rates)
    asked = np.where(maximum, 1e9, load.concurrency)
    batch_limit = np.where(maximum, rates.version["max_batch"] * 1024, 1e9)
    sharp = np.where(maximum, 4.0, 6.0)
    # A smooth minimum of what is asked, what fits and what the release admits.
    admitted = (asked**-sharp + fits**-sharp + batch_limit**-sharp) ** (-1 / sharp)
    running = np.where(load.static, load.concurrency, admitted)
    # Pipeline stages work on different requests at a time: each sweep carries a share of those in flight.
    sweep = np.maximum(running / load.pp, np.minimum(running, 1.0))
    step = decode_step_s(load, rates, sweep, load.isl + load.osl / 2)
    prefill = prefill_s(load, rates)
    interrupted = rates.serving["interrupt"] * prefill / load.osl / load.pp
    tpot = np.where(load.static, step, step + np.maximum(running - 1, 0) * interrupted)
    ttft = _first_token_s(load, rates, running, prefill, tpot)
    tok_s = np.where(
        maximum,
        rates.version["speed"] * np.exp(rates.correction) * running / (step + running * interrupted),
        np.where(load.concurrency > 0, load.concurrency, 1.0) * load.osl / (ttft + (load.osl - 1) * tpot),
    )
    batch_s = np.where(load.static, prefill_s(load, rates, np.where(maximum, 1.0, load.concurrency)), 1.0)
    tok_s = np.where(load.static, load.concurrency * load.osl / (batch_s + load.osl * step), tok_s)
    return Times(step_s=step, ttft_s=ttft, tpot_s=tpot, tok_s=tok_s, in_flight=running, capacity=fits)


def _first_token_s(load: Load, rates: Rates, running: Array, prefill: Array, tpot: Array) -> Array:
    """Host work, the prompt's own prefill, other prompts ahead of it, and a wait for a free place where there is none."""
    asked: Array = np.where(np.isnan(load.concurrency), running, load.concurrency)
    others: Array = np.maximum(asked - 1, 0)
    serving = rates.serving
    own = serving["first"] + serving["queue"] * others ** serving["queue_power"] + serving["burst"] * others
    waiting = np.maximum(others + 1 - running, 0) / running * load.osl * tpot
    in_flight = serving["host_ms"] * 1e-3 + prefill * own + waiting + load.stream_steps * tpot
    batch = prefill_s(load, rates, others + 1)
    return np.where(load.static, serving["host_ms"] * 1e-3 + serving["first"] * batch, in_flight)


CORRECTION_TERMS = 9


def correction_terms(isl: Array, osl: Array, tp: Array) -> Array:
    """Quadratic terms in the logarithms of lengths and ranks, for the throughput at maximum load.

    They stand for what published tables do not state: how many requests were sent, and the tail in which the batch
    runs empty. Shape [..., CORRECTION_TERMS].
    """
    a, b, c = np.log2(isl / 800) / 2.5, np.log2(osl / 800) / 2, np.log2(tp) / 1.5 - 1
    return np.stack([a, b, c, a * b, a * c, b * c, a * a, b * b, c * c], axis=-1)
