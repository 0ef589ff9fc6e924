"""Preparing a device before an engine is opened on it: kernels checked, activations measured, the runner made."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trtkit.engine.batch import RowInput
from trtkit.engine.block_pool import BlockPool
from trtkit.engine.device.eviction import DeviceEviction
from trtkit.engine.device.graphs import CudaCapture
from trtkit.engine.device.rings import ring_bytes
from trtkit.engine.device.runner import DeviceRunner
from trtkit.engine.paged_cache import PagedCache, torch_dtype
from trtkit.engine.runner import RunnerFactory
from trtkit.engine.scheduler import Scheduler
from trtkit.engine.sequence import Sequence, blocks_for
from trtkit.engine.weights import ModelWeights
from trtkit.kernels.sampling import sample_rows
from trtkit.kernels.tuning import forget_choices
from trtkit.kv.ledger import BYTES_PER_SLOT
from trtkit.spec.dtype import DType
from trtkit.spec.engine import Request
from trtkit.spec.kv import KVPolicySpec
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Limits
from trtkit.spec.quant import QuantSpec
from trtkit.spec.speculation import SpeculationSpec, decode_rows

_SAMPLING_BYTES = 48
"""Peak of drawing a token, per logit: sorted values and ids, probabilities and their sums in float64 (counted)."""


_WARM_TOKENS = (12, 24, 48, 128, 256, 512, 1024, 2048)
"""Prompts that bring every kernel of small steps to be compiled and tuned before a request waits for it. They come after
the largest step, on which kernels that are tuned but once should choose."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceNeeds:
    """Bytes beside weights and KV pool. `activations` is the peak of the largest step, measured on CUDA, 0 elsewhere."""

    activations: int
    eviction: int
    sampling: int

    @property
    def total(self) -> int:
        """What the pool must leave free: sampling happens when a step's activations are gone."""
        return max(self.activations, self.sampling) + self.eviction


def checked_kernels(
    model: ModelSpec, quant: QuantSpec, kv_dtype: DType, limits: Limits, device: str
) -> tuple[str, ...]:
    """Hold every kernel against float64 on `device` before weights fill it; what failed, one line each.

    What is wrong is switched off and its twin takes over, so an engine opens on a GPU that nobody has tried.
    """
    from trtkit.kernels.selfcheck import CheckShape, self_check

    compute, stored = torch_dtype(quant.compute), torch_dtype(quant.weights)
    shape = CheckShape(
        dtype=compute,
        kv_dtype=torch_dtype(kv_dtype),
        weight_dtypes=(compute,) if stored is compute else (stored, compute),
        weight_group=quant.group_size,
        zero_points=quant.zero_points,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        vocab_size=model.vocab_size,
        tokens_per_block=limits.tokens_per_block,
        max_tokens=min(limits.max_num_tokens, CheckShape().max_tokens),
    )
    rows = self_check(torch.device(device), shape)
    forget_choices()
    return tuple(f"{row.family} kernel: {row.message}" for row in rows if not row.ok)


def runner_factory(
    policy: KVPolicySpec,
    limits: Limits,
    device: str,
    needs: DeviceNeeds | None = None,
    notes: tuple[str, ...] = (),
    speculation: SpeculationSpec | None = None,
) -> RunnerFactory:
    """Makes the runner of an engine on `device`, its decode steps captured where that is CUDA."""

    def build(weights: ModelWeights, cache: PagedCache, scheduler: Scheduler) -> DeviceRunner:
        return DeviceRunner(
            weights,
            cache,
            limits,
            DeviceEviction(policy, weights.model, scheduler),
            capture=None if device == "cpu" else CudaCapture(torch.device(device)),
            draft_tokens=0 if speculation is None else speculation.max_draft_tokens,
            activation_bytes=None if needs is None else needs.activations,
            notes=notes,
        )

    return build


def device_needs(
    weights: ModelWeights,
    limits: Limits,
    kv_dtype: DType,
    policy: KVPolicySpec,
    device: str,
    speculation: SpeculationSpec | None = None,
) -> DeviceNeeds:
    """What an engine will hold beside weights and pool; runs its largest step on a cache of one block."""
    rows = decode_rows(limits.max_batch_size, 0 if speculation is None else speculation.max_draft_tokens)
    return DeviceNeeds(
        activations=_activation_bytes(weights, limits, kv_dtype, device),
        eviction=eviction_bytes(weights, limits, policy),
        sampling=rows * weights.model.vocab_size * _SAMPLING_BYTES,
    )


def eviction_bytes(weights: ModelWeights, limits: Limits, policy: KVPolicySpec) -> int:
    """Rings and ledgers of a full batch of the longest requests under the engine's policy (counted)."""
    if policy.is_full:
        return 0
    model = weights.model
    eviction = DeviceEviction(policy, model, Scheduler(limits, BlockPool(1)))
    sequence = Sequence(request=_request(max(1, limits.max_seq_len - 1)), arrival=0, max_new_tokens=1, kv_policy=policy)
    eviction.admit(sequence)
    ledger = model.num_layers * model.num_kv_heads * sequence.peak_slots * BYTES_PER_SLOT
    rings = ring_bytes(model, limits.max_batch_size, eviction.ring_size, weights.dtype.itemsize)
    return rings + limits.max_batch_size * ledger


def prompt_step(limits: Limits, tokens: int) -> list[RowInput]:
    """Prompts of that many tokens together, as far as the batch holds them, all in block 0."""
    rows: list[RowInput] = []
    left = tokens
    while left > 0 and len(rows) < limits.max_batch_size:
        count = min(left, limits.max_seq_len)
        sequence = Sequence(request=_request(count), arrival=len(rows), max_new_tokens=1)
        sequence.block_table = [0] * blocks_for(count, limits.tokens_per_block)
        rows.append(RowInput(sequence=sequence, token_ids=sequence.request.prompt_ids, observed=False))
        left -= count
    return rows


def _activation_bytes(weights: ModelWeights, limits: Limits, kv_dtype: DType, device: str) -> int:
    """Peak memory of the largest step beyond what lay there before; it also compiles and tunes the prompts' kernels."""
    if device == "cpu":
        return 0
    cache = PagedCache(weights.model, 1, limits.tokens_per_block, kv_dtype, device)
    runner = DeviceRunner(weights, cache, limits)
    for tokens in (limits.max_num_tokens, *(n for n in _WARM_TOKENS if n < limits.max_num_tokens)):
        _read_prompts(runner, limits, tokens)
    _draw_once(weights, device)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    _read_prompts(runner, limits, limits.max_num_tokens)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _read_prompts(runner: DeviceRunner, limits: Limits, tokens: int) -> None:
    rows = prompt_step(limits, tokens)
    runner.run(rows, [])
    for row in rows:
        runner.forget(row.sequence)


def _draw_once(weights: ModelWeights, device: str) -> None:
    """Have the kernel that draws tokens at random compiled, which no greedy step needs."""
    logits_RV = torch.zeros(1, weights.model.vocab_size, dtype=weights.dtype, device=device)
    real = torch.ones(1, dtype=torch.float64, device=device)
    sample_rows(logits_RV, real, real.to(torch.int32), real, real / 2)


def _request(count: int) -> Request:
    return Request(request_id="", prompt_ids=(0,) * count, max_tokens=1)
