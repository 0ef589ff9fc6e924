"""What the embedded engine holds on one CUDA device, part by part, beside what `trtkit plan` says and what was seen.

`trtkit plan` models TensorRT-LLM's activations and runtime; this engine has its own. Weights and blocks are exact in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from trtkit.benchmark.shares import lowered_kv
from trtkit.plan import work
from trtkit.plan.memory import Placement, plan_memory, sequence_blocks
from trtkit.spec.catalog import gpu_spec
from trtkit.spec.engine import EngineInfo
from trtkit.spec.measured import Measured, Source
from trtkit.spec.plan import BuildPlan
from trtkit.spec.quant import QuantSpec
from trtkit.spec.result import MemorySplit
from trtkit.spec.units import GIB, MIB
from trtkit.spec.workload import Workload

WORKSPACE_BYTES = 256 * MIB
"""Tiles of weights widened to 16 bits for a prompt's products, at most (modeled: the kernel's own bound)."""
CONTEXT_BYTES = int(0.75 * GIB)
"""CUDA context, library handles and their workspaces, captured graphs (assumed until measured)."""
LOGIT_BYTES = 4
SAMPLING_BYTES = 48
"""Per logit while a token is drawn: sorted values and ids, probabilities and their sums (the engine's own count)."""
RING_QUERIES = 16
RING_LSE_BYTES = 4
LEDGER_SLOT_BYTES = 8
MIN_PIECE, PIECES_PER_BUDGET = 256, 8
"""What the device's eviction holds for each place in a batch: decode queries that wait, and a mass and a position a slot."""


def placement(plan: BuildPlan) -> Placement:
    """The plan as `trtkit plan` takes it."""
    return Placement(
        model=plan.model,
        gpu=gpu_spec(plan.gpu),
        quant=plan.quant,
        policy=plan.kv,
        parallel=plan.parallel,
        limits=plan.limits,
    )


def activation_bytes(plan: BuildPlan) -> int:
    """Live tensors of the widest moment of one step of `max_num_tokens` tokens, and the logits of a full batch.

    In a block's MLP: residual, normed input, gate and up, and their product; in its attention: residual, normed input,
    q/k/v, rotated queries and their output. The larger counts.
    """
    model, limits = plan.model, plan.limits
    hidden, heads = model.hidden_size, model.num_heads * model.head_dim
    mlp = 2 * hidden + 3 * model.intermediate_size
    attention = 2 * hidden + heads + 2 * model.num_kv_heads * model.head_dim + 2 * heads
    step = limits.max_num_tokens * max(mlp, attention) * plan.quant.compute.bits // 8
    logits = limits.max_batch_size * model.vocab_size
    return max(step + logits * LOGIT_BYTES, logits * SAMPLING_BYTES)


def eviction_bytes(plan: BuildPlan) -> int:
    """Rings of queries and ledgers of a full batch of the longest requests, allocated whether or not they run."""
    if plan.kv.is_full:
        return 0
    model, longest = plan.model, plan.limits.max_seq_len
    budget = plan.kv.resolved(longest).budget or longest
    piece = max(MIN_PIECE, budget // PIECES_PER_BUDGET, plan.kv.interval or plan.limits.tokens_per_block)
    ledger = model.num_layers * model.num_kv_heads * min(budget + piece, longest) * LEDGER_SLOT_BYTES
    place = model.num_layers * model.num_heads * (model.head_dim * plan.quant.compute.bits // 8 + RING_LSE_BYTES)
    return plan.limits.max_batch_size * (RING_QUERIES * place + ledger)


def workspace_bytes(quant: QuantSpec) -> int:
    """Room for widened weights; none where the product takes them as they are."""
    return WORKSPACE_BYTES if quant.is_weight_only else 0


def device_model(plan: BuildPlan) -> dict[str, int] | None:
    """Bytes by part on a GPU, the pool being what is left; None on a CPU."""
    gpu = gpu_spec(plan.gpu)
    if gpu.sm == 0:
        return None
    parts = {
        "weights": work.weight_bytes(plan.model, plan.quant),
        "activations": activation_bytes(plan),
        "workspace": workspace_bytes(plan.quant),
        "eviction": eviction_bytes(plan),
        "context": CONTEXT_BYTES,
    }
    block = plan.limits.tokens_per_block * plan.model.kv_bytes_per_token(plan.quant.kv)
    free = max(gpu.memory_bytes - sum(parts.values()), 0)
    asked = plan.limits.kv_memory_bytes
    most = plan.limits.max_batch_size * math.ceil(plan.limits.max_seq_len / plan.limits.tokens_per_block)
    blocks = asked // block if asked is not None else min(most, int(free * plan.limits.kv_fraction) // block)
    return {**parts, "kv_pool": blocks * block}


def most_in_flight(plan: BuildPlan, tokens: int) -> int | None:
    """Requests of this length whose cache fits the modeled pool at once; None on a CPU, where the pool is not the limit."""
    parts = device_model(plan)
    if parts is None:
        return None
    block = plan.limits.tokens_per_block * plan.model.kv_bytes_per_token(plan.quant.kv)
    return parts["kv_pool"] // block // sequence_blocks(placement(plan), tokens)


def fits(plan: BuildPlan) -> bool:
    """At least one request of the longest length runs."""
    found = most_in_flight(plan, plan.limits.max_seq_len)
    return found is None or found >= 1


def memory_rows(
    plan: BuildPlan, info: EngineInfo | None = None, seen: MemorySplit | None = None
) -> Mapping[str, Measured]:
    """Every part by who says so: "plan.*" is `trtkit plan`, "model.*" this file, "engine.*" the engine when it had opened
    (its allocator and the driver), "seen.*" NVML from outside at the peak.
    """
    planned = plan_memory(placement(plan))
    rows = {
        "plan.weights": planned.weight_bytes,
        "plan.activations": planned.activation_bytes,
        "plan.runtime": planned.runtime_bytes,
        "plan.kv_pool": planned.kv_pool_bytes,
        "plan.total": planned.total_bytes,
    }
    model = device_model(plan)
    if model is not None:
        rows |= {f"model.{name}": size for name, size in model.items()} | {"model.total": sum(model.values())}
    found = {name: _bytes(size, Source.MODELED) for name, size in rows.items()}
    if info is not None:
        parts = {**info.device_memory, "weights": info.weight_bytes, "kv_pool": info.kv_pool_bytes}
        found |= {f"engine.{name}": _bytes(size, Source.MEASURED) for name, size in parts.items()}
    if seen is not None and seen.peak_bytes is not None:
        found["seen.total"] = _bytes(seen.peak_bytes, Source.MEASURED)
        if seen.other_bytes is not None:
            found["seen.other"] = _bytes(seen.other_bytes, Source.MEASURED)
    return found


def kept_tokens(plan: BuildPlan, workload: Workload) -> int:
    """Cache tokens one request of this workload holds at its peak."""
    policy = lowered_kv(plan, workload)
    tokens = workload.isl + workload.osl
    return tokens if policy.is_full else min(tokens, (policy.budget or tokens) + (policy.interval or 0))


def _bytes(size: int, source: Source) -> Measured:
    return Measured(value=float(size), unit="B", source=source)
