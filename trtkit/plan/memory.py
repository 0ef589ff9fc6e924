"""Memory of one rank: weights by group, KV pool by policy, activations, runtime; what fits, and what would make it fit.

Weights and blocks are exact: the same counts the converter writes and the embedded engine allocates. Activations and
the runtime are modeled, and say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from trtkit.plan import embedded, work
from trtkit.plan.calibration import load_calibration
from trtkit.spec.checkpoint import kv_heads_per_rank
from trtkit.spec.gpu import GpuSpec
from trtkit.spec.kv import KVPolicySpec
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Limits, Parallelism
from trtkit.spec.quant import QuantSpec, quant_for
from trtkit.spec.speculation import SpeculationSpec, decode_rows
from trtkit.spec.units import GB, MIB, format_gib

_ACTIVATION_FACTORS = ((1, 11.0), (2, 6.5), (4, 5.0))
"""Live hidden-size vectors per token of a step by tensor-parallel ranks (aiconfigurator's Llama figures, perf-truth.md
section 4.3); more ranks keep the last one's."""
_MIN_ACTIVATION_BYTES = 70 * MIB
_LOGIT_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes of one rank (the largest pipeline stage). `kv_blocks` x `block_bytes` is the pool exactly.

    `max_sequences` is how many requests of `sequence_tokens` fit the pool at once, None where the pool is 0.
    `peak_bytes` is what one such request holds at its fullest and `missing_bytes` by how much that does not fit; 0 if
    it does.
    """

    weights: Mapping[str, int]
    weight_bytes: int
    activation_bytes: int
    runtime_bytes: int
    block_bytes: int
    tokens_per_block: int
    kv_blocks: int
    kv_pool_bytes: int
    device_bytes: int
    sequence_tokens: int
    max_sequences: int
    missing_bytes: int
    peak_bytes: int
    eviction_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Everything a rank holds."""
        beside = self.activation_bytes + self.runtime_bytes + self.eviction_bytes
        return self.weight_bytes + self.kv_pool_bytes + beside

    @property
    def fits(self) -> bool:
        """At least one request of the given length runs."""
        return self.missing_bytes == 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """What is to be held where, and by whose engine: activations and runtime are the target's own."""

    model: ModelSpec
    gpu: GpuSpec
    quant: QuantSpec
    policy: KVPolicySpec
    parallel: Parallelism
    limits: Limits
    target: str = "tensorrt"
    speculation: SpeculationSpec | None = None

    @property
    def drawn_rows(self) -> int:
        """Tokens that a step draws at most: one for each request, and one after each guess."""
        most, drafts = self.limits.max_batch_size, 0 if self.speculation is None else self.speculation.max_draft_tokens
        if self.is_embedded_on_gpu:
            return decode_rows(most, drafts)
        return max(most, min(self.limits.max_num_tokens, most * (1 + drafts)))

    @property
    def is_embedded_on_gpu(self) -> bool:
        """Our own engine's device path; on a CPU it holds what any engine does."""
        return self.target == "embedded" and self.gpu.sm > 0


def rank_block_bytes(placement: Placement) -> int:
    """Bytes of one block on one rank: its layers and KV heads, keys and values."""
    model, limits = placement.model, placement.limits
    layers = model.num_layers // placement.parallel.pp
    heads = kv_heads_per_rank(model, placement.parallel.tp)
    return 2 * layers * heads * model.head_dim * placement.quant.kv.bits // 8 * limits.tokens_per_block


def activation_bytes(placement: Placement) -> int:
    """Working memory of one step of `max_num_tokens` tokens, and the logits of every position that draws (modeled)."""
    if placement.is_embedded_on_gpu:
        return embedded.activation_bytes(placement.model, placement.quant, placement.limits, placement.drawn_rows)
    tp, limits, model = placement.parallel.tp, placement.limits, placement.model
    factor = [value for ranks, value in _ACTIVATION_FACTORS if ranks <= tp][-1]
    hidden = limits.max_num_tokens * model.hidden_size * placement.quant.compute.bits // 8
    logits = placement.drawn_rows * model.vocab_size * _LOGIT_BYTES
    return max(int(factor * hidden), _MIN_ACTIVATION_BYTES) + logits


def runtime_bytes(placement: Placement) -> int:
    """CUDA context, library workspaces and communication buffers of one rank, as the calibration found; 0 on a CPU."""
    if placement.gpu.sm == 0:
        return 0
    if placement.is_embedded_on_gpu:
        return embedded.runtime_bytes(placement.quant)
    pool = load_calibration().pool
    ranks = pool["tp_runtime_gb"] if placement.parallel.world_size > 1 else 0.0
    # The fit's runtime contains the activations of the runs it saw; those are counted apart here.
    return int(max(pool["runtime_gb"] + ranks - activation_bytes(placement) / GB, 0.5) * GB)


def eviction_bytes(placement: Placement) -> int:
    """What our own engine keeps on a GPU to decide what to evict; other targets' runtimes contain theirs."""
    if not placement.is_embedded_on_gpu:
        return 0
    return embedded.eviction_bytes(placement.model, placement.quant, placement.limits, placement.policy)


def sequence_blocks(placement: Placement, tokens: int) -> int:
    """Blocks of one request while it decodes: its tokens, or its budget and what arrives before an eviction."""
    if not placement.policy.is_full:
        budget = placement.policy.resolved(tokens).budget or tokens
        slack = placement.policy.interval or placement.limits.tokens_per_block
        tokens = min(tokens, budget + slack)
    return -(-tokens // placement.limits.tokens_per_block)


def peak_blocks(placement: Placement, tokens: int) -> int:
    """Blocks of one request at its fullest: while its prompt is read, a whole chunk of it lies beside the budget.

    Our own engine cuts prompts into pieces; TensorRT-LLM evicts once a step, after up to `max_num_tokens` tokens.
    """
    policy, limits = placement.policy, placement.limits
    if policy.is_full:
        return sequence_blocks(placement, tokens)
    budget = policy.resolved(tokens).budget or tokens
    chunk = limits.max_num_tokens
    if placement.target == "embedded":
        chunk = min(chunk, embedded.piece_tokens(budget, on_gpu=placement.is_embedded_on_gpu))
    chunk = max(chunk, policy.interval or limits.tokens_per_block)
    return -(-min(tokens, budget + chunk) // limits.tokens_per_block)


def plan_memory(placement: Placement, *, sequence_tokens: int | None = None) -> MemoryPlan:
    """Lay out one rank. `sequence_tokens` is the length requests are counted at, by default `max_seq_len`."""
    limits, parallel = placement.limits, placement.parallel
    stages = [
        work.weight_groups(placement.model, placement.quant.held_by(placement.target), parallel, pp_rank=stage)
        for stage in range(parallel.pp)
    ]
    weights = max(stages, key=lambda groups: sum(groups.values()))
    held = sum(weights.values())
    working, runtime = activation_bytes(placement), runtime_bytes(placement)
    block = rank_block_bytes(placement)
    evicting = eviction_bytes(placement)
    free = placement.gpu.memory_bytes - held - working - runtime - evicting
    if limits.kv_memory_bytes is not None:
        blocks = limits.kv_memory_bytes // block
    else:
        blocks = min(limits.most_blocks, int(max(free, 0) * limits.kv_fraction) // block)
    tokens = sequence_tokens or limits.max_seq_len
    per_sequence, peak = sequence_blocks(placement, tokens), peak_blocks(placement, tokens)
    missing = max(0, peak - blocks) * block + max(0, -free) + max(0, blocks * block - max(free, 0))
    return MemoryPlan(
        weights=weights,
        weight_bytes=held,
        activation_bytes=working,
        runtime_bytes=runtime,
        block_bytes=block,
        tokens_per_block=limits.tokens_per_block,
        kv_blocks=blocks,
        kv_pool_bytes=blocks * block,
        device_bytes=placement.gpu.memory_bytes,
        sequence_tokens=tokens,
        max_sequences=blocks // per_sequence if missing == 0 else 0,
        missing_bytes=missing,
        peak_bytes=peak * block,
        eviction_bytes=evicting,
    )


def what_would_fit(placement: Placement, *, sequence_tokens: int, gpus: Sequence[GpuSpec] = ()) -> tuple[str, ...]:
    """Single changes that make a plan fit, cheapest first; empty where it fits already or nothing known helps."""
    if plan_memory(placement, sequence_tokens=sequence_tokens).fits:
        return ()
    changes: list[tuple[str, Placement]] = []
    if placement.quant.weights.bits > 8:
        changes.append(("--precision int8", replace(placement, quant=quant_for("int8"))))
    if placement.quant.weights.bits > 4:
        int4 = "int4" if placement.target == "embedded" else "int4-awq"
        changes.append((f"--precision {int4}", replace(placement, quant=quant_for(int4))))
    for tp in (2, 4, 8, 16):
        if tp > placement.parallel.tp and placement.model.num_heads % tp == 0:
            changes.append((f"--tp {tp}", replace(placement, parallel=replace(placement.parallel, tp=tp))))
    changes += [(f"--gpu {gpu.name}", replace(placement, gpu=gpu)) for gpu in gpus]
    return tuple(text for text, other in changes if plan_memory(other, sequence_tokens=sequence_tokens).fits)


def memory_lines(memory: MemoryPlan) -> list[str]:
    """The plan as lines of text."""
    groups = ", ".join(f"{name} {format_gib(size)}" for name, size in memory.weights.items())
    verdict = (
        f"fits: {memory.max_sequences} requests of {memory.sequence_tokens} tokens at once"
        if memory.fits
        else f"does not fit: {format_gib(memory.missing_bytes)} too much for one request of {memory.sequence_tokens} tokens"
    )
    evicting = [f"eviction    {format_gib(memory.eviction_bytes)} (modeled)"] if memory.eviction_bytes else []
    return [
        f"weights     {format_gib(memory.weight_bytes)} (exact: {groups})",
        f"KV pool     {format_gib(memory.kv_pool_bytes)} (exact: {memory.kv_blocks} blocks of {memory.tokens_per_block} tokens)",
        f"activations {format_gib(memory.activation_bytes)} (modeled)",
        f"runtime     {format_gib(memory.runtime_bytes)} (modeled)",
        *evicting,
        f"device      {format_gib(memory.device_bytes)}; {verdict}",
    ]
