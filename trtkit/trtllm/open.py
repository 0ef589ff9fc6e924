"""Opening a TensorRT-LLM bundle in this process, which is the engine's child process: see `trtkit.backends.child`.

The only module that imports `tensorrt_llm`, and only inside functions.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from trtkit.plan.work import weight_bytes
from trtkit.spec.bundle import EngineBundle
from trtkit.spec.errors import EngineError, TrtkitError, UsageError
from trtkit.spec.kv import KVFidelity, KVPolicySpec, parse_kv_policy
from trtkit.spec.plan import BuildPlan, Limits
from trtkit.spec.quant import GPTQ_INT8
from trtkit.spec.speculation import SpeculationSpec, parse_speculation
from trtkit.trtllm.capabilities import check_plan
from trtkit.trtllm.counters import EvictionCounters
from trtkit.trtllm.engine_build import ENGINE_DIR, check_engine
from trtkit.trtllm.guesses import guess_handicaps, native_guesses
from trtkit.trtllm.installed import Installation, installation_here
from trtkit.trtllm.lower import llm_arguments
from trtkit.trtllm.policies import handicaps, with_policy
from trtkit.trtllm.requirements import require_guesses, require_runtime, require_target
from trtkit.trtllm.runtime import LlmEngine, Native
from trtkit.trtllm.stored import stored_tensors

_CEILINGS = ("max_batch_size", "max_num_tokens", "max_seq_len")


def open_tensorrt(bundle: EngineBundle, **overrides: object) -> LlmEngine:
    """Open an engine of the TensorRT backend (1.2.x).

    Raises:
        EngineError: a rank is missing, or the engine was built by another version.
        MissingDependencyError: TensorRT-LLM, a GPU or MPI is not here.
    """
    plan = with_overrides(bundle.manifest.plan, overrides)
    directory = bundle.path / ENGINE_DIR
    built_by = check_engine(directory, bundle.manifest.plan)
    found = require_target("tensorrt", installation_here())
    require_runtime(plan, found)
    if built_by != found.version:
        raise EngineError(
            f"{bundle.path}: built by TensorRT-LLM {built_by}, here is {found.version}; engines only load in the "
            "version that built them: rebuild it here with `trtkit build --force`"
        )
    return _open(plan, directory, "tensorrt_llm._tensorrt_engine", found, _engine_bytes(plan, bundle.checkpoint_dir))


def open_pytorch(bundle: EngineBundle, **overrides: object) -> LlmEngine:
    """Open a bundle of the PyTorch backend (1.2.x and later).

    Raises:
        MissingDependencyError: TensorRT-LLM, a GPU or MPI is not here.
    """
    plan = with_overrides(bundle.manifest.plan, overrides)
    found = require_target("pytorch", installation_here())
    require_guesses(plan, found)
    require_runtime(plan, found)
    return _open(plan, bundle.checkpoint_dir, "tensorrt_llm", found, _bytes(plan), bundle.manifest.fidelity)


def _bytes(plan: BuildPlan) -> int:
    """Weights of the fullest rank, by the plan's arithmetic."""
    stages = range(plan.parallel.pp)
    return max(weight_bytes(plan.model, plan.quant, plan.parallel, pp_rank=stage) for stage in stages)


def _engine_bytes(plan: BuildPlan, checkpoint_dir: Path) -> int:
    """The same of an engine: GPTQ's groups, scales and zeros as its checkpoint has them, which has groups even for rows."""
    if plan.quant.algo != GPTQ_INT8:
        return _bytes(plan)
    config = json.loads((checkpoint_dir / "config.json").read_text(encoding="utf-8"))
    stored = replace(plan.quant, group_size=int(config["quantization"]["group_size"]))
    stages = range(plan.parallel.pp)
    tensors = (stored_tensors(plan.model, stored, plan.parallel, pp_rank=stage) for stage in stages)
    return max(sum(tensor.num_bytes for tensor in stage) for stage in tensors)


def with_overrides(plan: BuildPlan, overrides: Mapping[str, object]) -> BuildPlan:
    """The plan with run-time limits and speculation in it.

    Raises:
        UsageError: an override that this target does not take, or a limit above what was built.
        UnsupportedError: the target cannot do what is asked together.
    """
    given: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    kv, device = given.pop("kv", plan.kv), given.pop("device", "cuda")
    speculation = given.pop("speculation", plan.speculation)
    policy = parse_kv_policy(kv) if isinstance(kv, str) else kv
    if not isinstance(policy, KVPolicySpec) or policy != plan.kv:
        raise UsageError(f"{plan.name}: its KV policy is {plan.kv.label}, decided when it was built; build another one")
    if not str(device).startswith("cuda"):
        raise UsageError(f"{plan.name}: device {device!r}: target {plan.target} runs on CUDA devices")
    unknown = sorted(set(given) - {field.name for field in fields(Limits)})
    if unknown:
        raise UsageError(f"{plan.name}: target {plan.target} has no option {', '.join(unknown)}")
    limits = replace(plan.limits, **given)
    for name in _CEILINGS:
        if plan.target == "tensorrt" and getattr(limits, name) > getattr(plan.limits, name):
            raise UsageError(
                f"{plan.name}: {name} {getattr(limits, name)} is above the {getattr(plan.limits, name)} it was built for"
            )
    guesses = parse_speculation(speculation) if isinstance(speculation, str) else speculation
    assert guesses is None or isinstance(guesses, SpeculationSpec)
    changed = replace(plan, limits=limits, speculation=guesses)
    if changed != plan:
        check_plan(changed)
    return changed


def _open(
    plan: BuildPlan,
    model: Path,
    module: str,
    found: Installation,
    weights: int,
    fidelity: KVFidelity = KVFidelity.EXACT,
) -> LlmEngine:
    llm_class = getattr(importlib.import_module(module), "LLM")  # noqa: B009 - untyped package
    api = importlib.import_module("tensorrt_llm.llmapi")
    counters = EvictionCounters() if plan.target == "pytorch" and not plan.kv.is_full else None

    def plain_arguments(scoring: bool) -> dict[str, Any]:
        return with_policy(
            plan,
            llm_arguments(plan, scoring=scoring),
            pin_prompt=fidelity is KVFidelity.GENERATED_ONLY,
            counters_dir=None if counters is None else counters.directory,
        )

    def open_llm(scoring: bool) -> Native:
        arguments = native_arguments(plain_arguments(scoring), api)
        _check_arguments(arguments, plan, found)
        try:
            llm: Native = llm_class(str(model), **arguments)
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise EngineError(f"{plan.name}: TensorRT-LLM cannot open it: {first}") from error
        return llm

    try:
        notes = handicaps(plan, plain_arguments(scoring=False)) + guess_handicaps(plan)
    except TrtkitError:
        if counters is not None:
            counters.close()
        raise
    return LlmEngine(plan, open_llm, api.SamplingParams, weight_bytes=weights, counters=counters, notes=notes)


def native_arguments(arguments: Mapping[str, Any], api: Any) -> dict[str, Any]:  # noqa: ANN401 - tensorrt_llm.llmapi
    """Plain arguments with TensorRT-LLM's own classes where it has some."""
    makers: dict[str, Callable[[Any], Any]] = {
        "kv_cache_config": lambda value: api.KvCacheConfig(**value),
        "scheduler_config": lambda value: api.SchedulerConfig(
            capacity_scheduler_policy=api.CapacitySchedulerPolicy(value["capacity_scheduler_policy"])
        ),
        "extended_runtime_perf_knob_config": lambda value: api.ExtendedRuntimePerfKnobConfig(**value),
        "speculative_config": lambda value: native_guesses(value, api),
    }
    return {name: makers[name](value) if name in makers else value for name, value in arguments.items()}


def _check_arguments(arguments: Mapping[str, Any], plan: BuildPlan, found: Installation) -> None:
    """Refuse by name what this release does not take, instead of letting its validator talk for a page."""
    model = "TrtLlmArgs" if plan.target == "tensorrt" else "TorchLlmArgs"
    taken = found.names.get(f"tensorrt_llm.llmapi.llm_args.{model}")
    unknown = sorted(set(arguments) - set(taken)) if taken else []
    if unknown:
        raise EngineError(
            f"{plan.name}: TensorRT-LLM {found.version} takes no {', '.join(unknown)}; this trtkit knows 1.2.x and 1.3"
        )
