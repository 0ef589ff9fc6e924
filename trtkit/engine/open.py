"""Opening an engine: from a bundle, a checkpoint directory, or tensors in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from trtkit.engine.eviction import eviction_observer
from trtkit.engine.loop import EmbeddedEngine
from trtkit.engine.paged_cache import block_bytes
from trtkit.engine.runner import ObserverFactory, RunnerFactory
from trtkit.engine.sequence import blocks_for
from trtkit.engine.weights import ModelWeights, load_weights, weights_from_tensors
from trtkit.spec.bundle import EngineBundle
from trtkit.spec.dtype import DType
from trtkit.spec.errors import CapacityError, MissingDependencyError, UnsupportedError, UsageError
from trtkit.spec.kv import KVPolicySpec, parse_kv_policy
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Limits
from trtkit.spec.units import format_gib

_KV_TYPES = (DType.FP32, DType.FP16, DType.BF16, DType.FP8)


def open_embedded(
    bundle: EngineBundle,
    *,
    kv: KVPolicySpec | str | None = None,
    dtype: DType | str | None = None,
    device: str = "cpu",
    **limits: int | None,
) -> EmbeddedEngine:
    """Open a built bundle. What is given replaces the plan's value; `limits` are fields of `Limits` by name.

    Raises:
        InputError: the checkpoint is damaged.
        UsageError: an override that does not exist, or a value that is not allowed.
        CapacityError: not even one block fits the KV memory.
    """
    plan = bundle.manifest.plan
    allowed = [field.name for field in fields(Limits)]
    unknown = sorted(set(limits) - set(allowed))
    if unknown:
        raise UsageError(f"no limit is called {', '.join(unknown)}; there are {', '.join(allowed)}, kv, dtype, device")
    given = {name: value for name, value in limits.items() if value is not None}
    return open_checkpoint(
        bundle.checkpoint_dir,
        limits=replace(plan.limits, **given),  # type: ignore[arg-type]
        kv_policy=parse_kv_policy(kv) if isinstance(kv, str) else kv or plan.kv,
        dtype=DType.parse(dtype) if isinstance(dtype, str) else dtype,
        device=device,
    )


def open_checkpoint(
    directory: Path,
    *,
    limits: Limits | None = None,
    kv_policy: KVPolicySpec | None = None,
    dtype: DType | None = None,
    device: str = "cpu",
    observer_factory: ObserverFactory | None = None,
) -> EmbeddedEngine:
    """Open a TensorRT-LLM checkpoint directory. `dtype` replaces the compute and the cache type."""
    _check_device(device)
    weights, quant = load_weights(directory, dtype=dtype, device=device)
    return _assemble(weights, limits or Limits(), dtype or quant.kv, kv_policy, device, observer_factory)


def open_tensors(  # noqa: PLR0913 - options of one opener, all but two by keyword
    model: ModelSpec,
    tensors: Mapping[str, Tensor],
    *,
    limits: Limits | None = None,
    kv_policy: KVPolicySpec | None = None,
    dtype: DType = DType.FP32,
    device: str = "cpu",
    observer_factory: ObserverFactory | None = None,
    kv_dtype: DType | None = None,
    runner_factory: RunnerFactory | None = None,
) -> EmbeddedEngine:
    """Open an unsplit checkpoint held in memory, by its TensorRT-LLM tensor names. `kv_dtype` defaults to `dtype`."""
    _check_device(device)
    weights = weights_from_tensors(model, tensors, dtype=dtype, device=device)
    return _assemble(
        weights, limits or Limits(), kv_dtype or dtype, kv_policy, device, observer_factory, runner_factory
    )


def effective_limits(model: ModelSpec, limits: Limits) -> Limits:
    """Limits as the model allows them: no longer than its positions or its sliding window.

    Attention here always sees every live slot, so a model with a sliding window is run inside the window, where
    the two are the same, and longer requests are refused.
    """
    longest = min(limits.max_seq_len, model.max_position_embeddings, model.sliding_window or limits.max_seq_len)
    return replace(limits, max_seq_len=longest)


def pool_blocks(model: ModelSpec, limits: Limits, kv_dtype: DType, available_bytes: int) -> int:
    """Blocks of the pool: the memory given, or a share of what is available, at most what the batch can ever use.

    Raises:
        CapacityError: it is less than one block.
    """
    per_block = block_bytes(model, limits.tokens_per_block, kv_dtype)
    if limits.kv_memory_bytes is not None:
        blocks = limits.kv_memory_bytes // per_block
    else:
        most = limits.max_batch_size * blocks_for(limits.max_seq_len, limits.tokens_per_block)
        blocks = min(most, int(available_bytes * limits.kv_fraction) // per_block)
    if blocks < 1:
        raise CapacityError(
            f"the KV memory holds no block: one of {limits.tokens_per_block} tokens takes {format_gib(per_block)}, "
            f"there is {format_gib(limits.kv_memory_bytes or available_bytes * limits.kv_fraction)}"
        )
    return blocks


def _assemble(  # noqa: PLR0913, PLR0917 - what both openers have decided
    weights: ModelWeights,
    limits: Limits,
    kv_dtype: DType,
    kv_policy: KVPolicySpec | None,
    device: str,
    observer_factory: ObserverFactory | None,
    runner_factory: RunnerFactory | None = None,
) -> EmbeddedEngine:
    if kv_dtype not in _KV_TYPES:
        allowed = ", ".join(t.value for t in _KV_TYPES)
        raise UnsupportedError(f"KV cache type {kv_dtype.value}: the embedded engine stores {allowed}")
    limits = effective_limits(weights.model, limits)
    return EmbeddedEngine(
        weights,
        limits,
        pool_blocks(weights.model, limits, kv_dtype, _available_bytes(device)),
        kv_dtype=kv_dtype,
        kv_policy=kv_policy,
        observer_factory=observer_factory or eviction_observer(kv_policy or KVPolicySpec(), weights.model),
        runner_factory=runner_factory,
        device=device,
    )


def _available_bytes(device: str) -> int:
    if device == "cpu":
        import psutil

        return int(psutil.virtual_memory().available)
    return int(torch.cuda.mem_get_info(device)[0])


def _check_device(device: str) -> None:
    if device != "cpu" and not torch.cuda.is_available():
        raise MissingDependencyError(f"device {device!r}: no CUDA device here; use device 'cpu'")
