"""Is what a plan needs on this machine? One line each if not, before any work is done."""

from __future__ import annotations

from collections.abc import Sequence

from trtkit.spec.catalog import gpu_spec
from trtkit.spec.errors import MissingDependencyError, UnsupportedError
from trtkit.spec.plan import BuildPlan
from trtkit.spec.quant import GPTQ_INT8
from trtkit.spec.units import format_gib
from trtkit.trtllm.capabilities import ENGINE_RELEASES, PYTORCH_SINCE
from trtkit.trtllm.guesses import KIND, NGRAM_CLASS, guess_arguments
from trtkit.trtllm.installed import Device, Installation, installation, visible_devices

_IMAGE = "docker run --gpus all -it nvcr.io/nvidia/tensorrt-llm/release:1.2.1"
_WAYS_OUT = f"use its container ({_IMAGE}, or docker/), --target embedded, or --dry-run"
_ENGINE_NAMES = ("tensorrt_llm.llmapi.SamplingParams", "tensorrt_llm.llmapi.KvCacheConfig")
PACKING_FUNCTION = "tensorrt_llm.quantization.functional.preprocess_weights_for_mixed_gemm"
_MEMORY_SHARE = 0.9
"""A device with a tenth less memory than the catalog's is another device."""


def choose_target(found: Installation) -> tuple[str, str]:
    """The target that `auto` means for a GPU, and why.

    Returns:
        (target, reason)
    """
    if not found.present:
        return "tensorrt", "TensorRT-LLM is not installed here; its engine backend is the default for a GPU"
    if found.has_engines and found.release in ENGINE_RELEASES:
        return "tensorrt", f"TensorRT-LLM {found.version} has the engine backend"
    if found.has_pytorch:
        return "pytorch", f"TensorRT-LLM {found.version} has the PyTorch backend only (engines ended with 1.2)"
    return "tensorrt", f"TensorRT-LLM is installed and cannot be used: {found.error or 'no LLM class found'}"


def require_target(target: str, found: Installation | None = None) -> Installation:
    """The installation, if it can build for a target.

    Raises:
        MissingDependencyError: not installed, broken, or it hangs.
        UnsupportedError: a release without that backend.
    """
    found = found or installation()
    if not found.present:
        raise MissingDependencyError(f"target {target!r} needs TensorRT-LLM, which is not installed here; {_WAYS_OUT}")
    if found.error:
        raise MissingDependencyError(f"TensorRT-LLM is installed and does not start: {found.error}; {_WAYS_OUT}")
    if target == "tensorrt":
        if not found.has_engines or found.release not in ENGINE_RELEASES:
            known = ", ".join(f"{major}.{minor}" for major, minor in ENGINE_RELEASES)
            raise UnsupportedError(
                f"target 'tensorrt' needs TensorRT-LLM {known}.x with its engine backend, here is {found.version}; "
                "use --target pytorch, or the release:1.2.1 container"
            )
        if found.trtllm_build is None:
            raise MissingDependencyError(
                f"TensorRT-LLM {found.version} is here, but `trtllm-build` is not on PATH; {_WAYS_OUT}"
            )
    elif not found.has_pytorch or found.release < PYTORCH_SINCE:
        raise UnsupportedError(f"target 'pytorch' needs TensorRT-LLM 1.2 or later, here is {found.version}")
    missing = [name for name in _ENGINE_NAMES if name not in found.names]
    if missing:
        raise UnsupportedError(f"TensorRT-LLM {found.version} has no {', '.join(missing)}; trtkit knows 1.2.x and 1.3")
    return found


def require_builder_device(plan: BuildPlan, devices: Sequence[Device] | None = None) -> None:
    """A GPU of the plan's architecture: engines are compiled on the kind of device they will run on.

    Raises:
        MissingDependencyError: there is none.
    """
    devices = visible_devices() if devices is None else devices
    wanted = gpu_spec(plan.gpu)
    if not any(device.sm == wanted.sm for device in devices):
        raise MissingDependencyError(
            f"{plan.name}: an engine for {plan.gpu} is built on a GPU of compute capability {wanted.sm / 10:.1f}; "
            f"this machine has {_listed(devices)}; build there, or look with --dry-run"
        )


def require_packing(plan: BuildPlan, found: Installation | None = None) -> None:
    """The function that packs GPTQ weights, for a plan that needs it.

    Raises:
        UnsupportedError: the installed release has none by that name.
    """
    if plan.quant.algo != GPTQ_INT8:
        return
    found = found or installation()
    if PACKING_FUNCTION not in found.names:
        raise UnsupportedError(
            f"{plan.name}: TensorRT-LLM {found.version} has no {PACKING_FUNCTION}, which packs GPTQ weights; use 1.2.x, or "
            "--precision int8, which rounds again"
        )


def require_guesses(plan: BuildPlan, found: Installation | None = None) -> None:
    """The class of n-gram speculation with the arguments it is given, for a plan that guesses.

    Raises:
        UnsupportedError: the installed release has none, or one that takes other arguments.
    """
    if plan.speculation is None:
        return
    found = found or installation()
    taken = found.names.get(NGRAM_CLASS, ())
    missing = [] if taken is None else sorted(set(guess_arguments(plan)["speculative_config"]) - {KIND, *taken})
    if NGRAM_CLASS not in found.names or missing:
        what = f"no {NGRAM_CLASS}" if NGRAM_CLASS not in found.names else f"an NGramDecodingConfig without {missing[0]}"
        raise UnsupportedError(
            f"{plan.name}: TensorRT-LLM {found.version} has {what}, so it cannot guess ({plan.speculation.label}); use 1.2.x "
            "or 1.3, or --speculate off"
        )


def require_runtime(plan: BuildPlan, found: Installation, devices: Sequence[Device] | None = None) -> None:
    """Enough GPUs of the right kind for every rank, and MPI if there is more than one.

    Raises:
        MissingDependencyError: says what is missing.
    """
    devices = visible_devices() if devices is None else devices
    wanted, ranks = gpu_spec(plan.gpu), plan.parallel.world_size
    fitting = [d for d in devices if d.sm == wanted.sm and d.memory_bytes >= _MEMORY_SHARE * (wanted.memory_bytes or 0)]
    if len(fitting) < ranks:
        raise MissingDependencyError(
            f"{plan.name}: was built for {ranks} x {plan.gpu} (compute capability {wanted.sm / 10:.1f}, "
            f"{format_gib(wanted.memory_bytes)}); this machine has {_listed(devices)}"
        )
    if ranks > 1 and "mpi4py.MPI" not in found.names:
        raise MissingDependencyError(
            f"{plan.name}: {ranks} ranks need MPI, and mpi4py cannot be imported here; install libopenmpi-dev and mpi4py"
        )


def _listed(devices: Sequence[Device]) -> str:
    if not devices:
        return "no NVIDIA GPU"
    return ", ".join(f"{d.name} ({d.sm / 10:.1f}, {format_gib(d.memory_bytes)})" for d in devices)
