"""Opening an engine: from a bundle, a checkpoint directory, or tensors in memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from trtkit.engine.dummy import dummy_weights
from trtkit.engine.eviction import eviction_observer
from trtkit.engine.loop import EmbeddedEngine
from trtkit.engine.paged_cache import block_bytes
from trtkit.engine.runner import ObserverFactory, RunnerFactory
from trtkit.engine.speculation import Proposer
from trtkit.engine.weights import ModelWeights, load_weights, weights_from_tensors
from trtkit.plan.work import weight_bytes
from trtkit.spec.bundle import EngineBundle
from trtkit.spec.dtype import DType
from trtkit.spec.errors import CapacityError, MissingDependencyError, UnsupportedError, UsageError
from trtkit.spec.kv import KVPolicySpec, parse_kv_policy
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import BuildPlan, Limits, check_speculation
from trtkit.spec.quant import QuantSpec, quant_for
from trtkit.spec.speculation import SpeculationSpec, parse_speculation
from trtkit.spec.units import format_gib

AUTO = "auto"
_PATHS = (AUTO, "device")
_KV_TYPES = (DType.FP32, DType.FP16, DType.BF16, DType.FP8)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Setup:
    """What an opener has decided about an engine, weights aside."""

    limits: Limits
    kv_dtype: DType
    kv_policy: KVPolicySpec
    device: str
    path: str = AUTO
    speculation: SpeculationSpec | None = None
    proposer: Proposer | None = None
    notes: tuple[str, ...] = ()
    observer_factory: ObserverFactory | None = None
    runner_factory: RunnerFactory | None = None


def open_embedded(  # noqa: PLR0913 - what replaces the plan's values, all by keyword
    bundle: EngineBundle,
    *,
    kv: KVPolicySpec | str | None = None,
    speculation: SpeculationSpec | str | None = None,
    proposer: Proposer | None = None,
    dtype: DType | str | None = None,
    kv_dtype: DType | str | None = None,
    device: str = AUTO,
    path: str = AUTO,
    **limits: int | None,
) -> EmbeddedEngine:
    """Open a built bundle. What is given replaces the plan's value; `limits` are fields of `Limits` by name.

    Args:
        bundle: the engine on disk; one of random weights has none, they are made here.
        kv: another KV policy.
        speculation: another speculation; "off" for none.
        proposer: guesses in place of n-grams where there is speculation.
        dtype: another compute type; the cache takes it too, unless it was built narrower.
        kv_dtype: another cache type.
        device: "cpu", "cuda", "cuda:1"; "auto" is CUDA where the plan is for a GPU and one is here, else the CPU.
        path: "auto" runs the device path on CUDA and the CPU engine elsewhere; "device" runs the device path anywhere.
        **limits: see above.

    Raises:
        InputError: the checkpoint is damaged.
        UsageError: an override that does not exist, or a value that is not allowed.
        CapacityError: not even one block fits the KV memory.
    """
    plan = bundle.manifest.plan
    compute = DType.parse(dtype) if isinstance(dtype, str) else dtype
    setup = _Setup(
        limits=_changed(plan.limits, limits),
        kv_dtype=_cache_type(plan.quant, compute, DType.parse(kv_dtype) if isinstance(kv_dtype, str) else kv_dtype),
        kv_policy=parse_kv_policy(kv) if isinstance(kv, str) else kv or plan.kv,
        speculation=parse_speculation(speculation) if isinstance(speculation, str) else speculation or plan.speculation,
        proposer=proposer,
        device=chosen_device(device, plan.gpu),
        path=path,
    )
    check_speculation(setup.speculation, setup.kv_policy)
    _check_device(setup.device)
    if setup.device != "cpu":
        from trtkit.engine.device.setup import checked_kernels

        limits_now = effective_limits(plan.model, setup.limits)
        found = checked_kernels(plan.model, plan.quant, setup.kv_dtype, limits_now, setup.device)
        setup = replace(setup, notes=found)
    return _assemble(_bundle_weights(bundle, compute, setup.device), setup)


def _bundle_weights(bundle: EngineBundle, compute: DType | None, device: str) -> ModelWeights:
    """The bundle's weights on the device; random ones are made there."""
    plan = bundle.manifest.plan
    with _fitting("the weights"):
        if plan.load_format != "dummy":
            return load_weights(bundle.checkpoint_dir, dtype=compute, device=device)[0]
        _check_room(plan, device)
        quant = plan.quant
        if compute is not None:
            quant = replace(quant_for(quant.precision, compute=compute), group_size=quant.group_size)
        return dummy_weights(plan.model, quant, device=device)


def _changed(limits: Limits, given: Mapping[str, int | None]) -> Limits:
    """The plan's limits with those given in their place."""
    allowed = [field.name for field in fields(Limits)]
    unknown = sorted(set(given) - set(allowed))
    if unknown:
        raise UsageError(
            f"no limit is called {', '.join(unknown)}; there are {', '.join(allowed)}, kv, speculation, dtype, kv_dtype, "
            "device, path"
        )
    return replace(limits, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def open_checkpoint(
    directory: Path,
    *,
    limits: Limits | None = None,
    kv_policy: KVPolicySpec | None = None,
    dtype: DType | None = None,
    device: str = "cpu",
    observer_factory: ObserverFactory | None = None,
) -> EmbeddedEngine:
    """Open a TensorRT-LLM checkpoint directory. `dtype` replaces the compute type, and the cache type unless narrower."""
    _check_device(device)
    weights, quant = load_weights(directory, dtype=dtype, device=device)
    setup = _Setup(
        limits=limits or Limits(),
        kv_dtype=_cache_type(quant, dtype, None),
        kv_policy=kv_policy or KVPolicySpec(),
        device=device,
        observer_factory=observer_factory,
    )
    return _assemble(weights, setup)


def open_tensors(  # noqa: PLR0913 - options of one opener, all but two by keyword
    model: ModelSpec,
    tensors: Mapping[str, Tensor],
    *,
    limits: Limits | None = None,
    kv_policy: KVPolicySpec | None = None,
    dtype: DType = DType.FP32,
    kv_dtype: DType | None = None,
    device: str = "cpu",
    observer_factory: ObserverFactory | None = None,
    runner_factory: RunnerFactory | None = None,
    speculation: SpeculationSpec | None = None,
    proposer: Proposer | None = None,
) -> EmbeddedEngine:
    """Open an unsplit checkpoint held in memory, by its TensorRT-LLM tensor names. `kv_dtype` defaults to `dtype`."""
    _check_device(device)
    setup = _Setup(
        limits=limits or Limits(),
        kv_dtype=kv_dtype or dtype,
        kv_policy=kv_policy or KVPolicySpec(),
        device=device,
        observer_factory=observer_factory,
        runner_factory=runner_factory,
        speculation=speculation,
        proposer=proposer,
    )
    return _assemble(weights_from_tensors(model, tensors, dtype=dtype, device=device), setup)


def chosen_device(device: str, gpu: str) -> str:
    """The device that "auto" means for a plan made for `gpu`; any other name as it is.

    A GPU that only the user's own catalog knows is one, too.
    """
    if device != AUTO:
        return device
    return "cuda" if gpu != "cpu" and torch.cuda.is_available() else "cpu"


def effective_limits(model: ModelSpec, limits: Limits) -> Limits:
    """Limits as the model allows them: no longer than its positions or its sliding window.

    Attention here always sees every live slot, so a model with a sliding window is run inside the window, where
    the two are the same, and longer requests are refused.
    """
    longest = min(limits.max_seq_len, model.max_position_embeddings, model.sliding_window or limits.max_seq_len)
    return replace(limits, max_seq_len=longest)


def pool_blocks(model: ModelSpec, limits: Limits, kv_dtype: DType, available_bytes: int) -> int:
    """Blocks of the pool: the memory given, or a share of what is available, at most what the limits can ever use.

    Raises:
        CapacityError: it is less than one block.
    """
    per_block = block_bytes(model, limits.tokens_per_block, kv_dtype)
    if limits.kv_memory_bytes is not None:
        blocks = limits.kv_memory_bytes // per_block
    else:
        blocks = min(limits.most_blocks, int(available_bytes * limits.kv_fraction) // per_block)
    if blocks < 1:
        raise CapacityError(
            f"the KV memory holds no block: one of {limits.tokens_per_block} tokens takes {format_gib(per_block)}, "
            f"there is {format_gib(limits.kv_memory_bytes or available_bytes * limits.kv_fraction)}"
        )
    return blocks


def _assemble(weights: ModelWeights, setup: _Setup) -> EmbeddedEngine:
    kv_dtype, policy, device = setup.kv_dtype, setup.kv_policy, setup.device
    if kv_dtype not in _KV_TYPES:
        allowed = ", ".join(t.value for t in _KV_TYPES)
        raise UnsupportedError(f"KV cache type {kv_dtype.value}: the embedded engine stores {allowed}")
    if setup.path not in _PATHS:
        raise UsageError(f"path is {setup.path!r}: allowed are {', '.join(_PATHS)}")
    limits = effective_limits(weights.model, setup.limits)
    factory, beside = setup.runner_factory, 0
    if factory is None and (device != "cpu" or setup.path == "device"):
        from trtkit.engine.device.setup import device_needs, runner_factory

        with _fitting(f"a step of {limits.max_num_tokens} tokens beside the weights"):
            needs = device_needs(weights, limits, kv_dtype, policy, device, setup.speculation)
        factory = runner_factory(policy, limits, device, needs, setup.notes, setup.speculation)
        beside = needs.total
    with _fitting("the engine's own buffers beside the KV pool"):
        return EmbeddedEngine(
            weights,
            limits,
            pool_blocks(weights.model, limits, kv_dtype, max(0, _available_bytes(device) - beside)),
            kv_dtype=kv_dtype,
            kv_policy=policy,
            observer_factory=setup.observer_factory or eviction_observer(policy, weights.model),
            runner_factory=factory,
            speculation=setup.speculation,
            proposer=setup.proposer,
            device=device,
        )


def _cache_type(quant: QuantSpec, compute: DType | None, wanted: DType | None) -> DType:
    """The cache's type: as wanted, else as built where that is narrower than another compute type asked for."""
    if wanted is not None:
        return wanted
    narrower = quant.kv.bits < quant.compute.bits
    return quant.kv if compute is None or narrower else compute


def _available_bytes(device: str) -> int:
    if device == "cpu":
        import psutil

        return int(psutil.virtual_memory().available)
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


def _check_device(device: str) -> None:
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise MissingDependencyError(f"device {device!r}: no CUDA device here; use device 'cpu'")
    if torch.device(device).index is not None:
        torch.cuda.set_device(device)


def _check_room(plan: BuildPlan, device: str) -> None:
    """Refuse random weights that memory cannot hold: on a CPU nobody else would before the machine swaps."""
    needed = weight_bytes(plan.model, plan.quant.embedded)
    free = _available_bytes(device)
    if needed > free:
        raise CapacityError(
            f"{plan.name}: random weights of {plan.model.name} take {format_gib(needed)} in {plan.quant.precision}, "
            f"{device} has {format_gib(free)} free; open it on a larger device, or build a smaller model"
        )


@contextlib.contextmanager
def _fitting(what: str) -> Iterator[None]:
    """Say in one line that the device's memory ran out."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise CapacityError(
            f"the device's memory does not hold {what}; use a narrower precision, lower max_num_tokens or max_batch_size"
        ) from None
