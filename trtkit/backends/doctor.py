"""What this machine can build and run, with the reason for everything it cannot: `trtkit doctor`."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trtkit.spec.catalog import gpu_spec, load_catalog, model_preset
from trtkit.spec.errors import MissingDependencyError, TrtkitError, UnsupportedError
from trtkit.spec.kv import KVFidelity, KVPolicySpec
from trtkit.spec.plan import TARGETS, BuildPlan
from trtkit.spec.quant import PRECISIONS
from trtkit.spec.units import format_gib
from trtkit.trtllm.capabilities import broken, kv_fidelity, unbuildable
from trtkit.trtllm.installed import Device, Installation, ask, installation, visible_devices
from trtkit.trtllm.policies import adapter_names
from trtkit.trtllm.probe_child import NAMES
from trtkit.trtllm.requirements import require_target
from trtkit.version import __version__

PACKAGES = ("torch", "transformers", "safetensors", "tensorrt", "nvidia-modelopt", "mpi4py", "lm-eval", "triton")
PROBE_GROUP = "trtkit.trtllm_probes"
"""Entry points "module:function" of plugins' own probes: no arguments, a list of findings (name, ok, detail)."""

_SAMPLE_MODEL = "llama-3-70b"
_EVICTING = KVPolicySpec(kind="h2o", budget_fraction=0.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One answer: what was asked, whether it is there or possible, and why."""

    name: str
    ok: bool
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """Everything that was looked at. `precisions` and `kv` are by target; `plugins` is empty unless asked for."""

    machine: tuple[Finding, ...]
    devices: tuple[Device, ...]
    installation: Installation
    names: tuple[Finding, ...]
    targets: tuple[Finding, ...]
    precisions: dict[str, tuple[Finding, ...]]
    kv: dict[str, tuple[Finding, ...]]
    plugins: dict[str, tuple[Finding, ...]]

    def require(self, target: str) -> None:
        """Raise if a target is not possible here.

        Raises:
            MissingDependencyError: it is not; says why.
        """
        finding = next(finding for finding in self.targets if finding.name == target)
        if not finding.ok:
            raise MissingDependencyError(f"target {target!r} is not possible here: {finding.detail}")


def diagnose(*, plugins: bool = False) -> Diagnosis:
    """Look at everything; `plugins` runs their own probes too, each in a process that imports TensorRT-LLM."""
    found, devices = installation(), visible_devices()
    targets = tuple(_target(name, found, devices) for name in TARGETS)
    gpu = next((name for device in devices if (name := catalog_name(device)) is not None), None)
    return Diagnosis(
        machine=tuple(_machine()),
        devices=devices,
        installation=found,
        names=tuple(_name(name, found) for name in NAMES) if found.present else (),
        targets=targets,
        precisions={target: tuple(_precision(p, target, gpu) for p in PRECISIONS) for target in TARGETS},
        kv={target: _kv(target, found) for target in TARGETS},
        plugins={point.name: _plugin(point.value) for point in _probes()} if plugins else {},
    )


def catalog_name(device: Device) -> str | None:
    """The catalog's GPU with this compute capability, form and the nearest memory, within a tenth; None without one."""
    is_card = "pcie" in device.name.lower()
    candidates = [
        (("pcie" in name) != is_card, abs(spec.memory_bytes - device.memory_bytes), name)
        for name, entry in load_catalog().gpus.items()
        if entry.sm == device.sm and (spec := gpu_spec(name)).memory_bytes
    ]
    _, difference, name = min(candidates, default=(True, device.memory_bytes, ""))
    return name if difference < 0.1 * device.memory_bytes else None


def _machine() -> list[Finding]:
    found = [
        Finding(name="trtkit", ok=True, detail=__version__),
        Finding(name="python", ok=True, detail=platform.python_version()),
    ]
    for package in PACKAGES:
        try:
            found.append(Finding(name=package, ok=True, detail=importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(name=package, ok=False, detail="not installed"))
    return found


def _name(name: str, found: Installation) -> Finding:
    arguments = found.names.get(name)
    detail = "not in this release" if name not in found.names else ""
    return Finding(name=name, ok=name in found.names, detail=detail if not arguments else f"{len(arguments)} arguments")


def _target(name: str, found: Installation, devices: Sequence[Device]) -> Finding:
    if name == "embedded":
        where = f"{len(devices)} CUDA device(s)" if devices else "this CPU"
        return Finding(name=name, ok=True, detail=f"runs on {where}, no TensorRT-LLM needed")
    try:
        require_target(name, found)
    except TrtkitError as error:
        return Finding(name=name, ok=False, detail=str(error))
    if not devices:
        return Finding(name=name, ok=False, detail=f"TensorRT-LLM {found.version} is here, an NVIDIA GPU is not")
    return Finding(name=name, ok=True, detail=f"TensorRT-LLM {found.version} on {len(devices)} x {devices[0].name}")


def _sample(precision: str, target: str, gpu: str | None) -> BuildPlan:
    return BuildPlan(
        name=precision,
        model=model_preset(_SAMPLE_MODEL),
        model_source="",
        gpu=gpu or "h100-sxm",
        quant=PRECISIONS[precision],
        target=target,
    )


def _precision(precision: str, target: str, gpu: str | None) -> Finding:
    plan = _sample(precision, target, gpu)
    where = f" ({gpu})" if gpu else " (as if on an H100)"
    rules = [rule for rule in broken(plan) if not rule.adjusts]
    if rules:
        return Finding(name=precision, ok=False, detail=f"{rules[0].says}{where} [{rules[0].source}]")
    reason = unbuildable(plan)
    return Finding(name=precision, ok=reason is None, detail=reason or f"no known obstacle{where}")


def _kv(target: str, found: Installation) -> tuple[Finding, ...]:
    exact = Finding(name="full", ok=True, detail=KVFidelity.EXACT.value)
    if target == "embedded":
        return exact, Finding(name="eviction", ok=True, detail=f"{KVFidelity.EXACT.value}, any installed policy")
    if target == "tensorrt":
        detail = f"the runtime has no place for it; --allow-approximate gives {KVFidelity.WINDOW_ONLY.value}"
        return exact, Finding(name="eviction", ok=False, detail=detail)
    kinds = adapter_names()
    plan = replace(_sample("fp16", target, None), kv=_EVICTING, target_version=found.version)
    if plan.kv.kind not in kinds:
        return exact, Finding(name="eviction", ok=False, detail="no adapter installed")
    try:
        fidelity = kv_fidelity(plan, allow_approximate=False)
    except UnsupportedError as error:
        return exact, Finding(name="eviction", ok=False, detail=str(error).partition(": ")[2])
    detail = f"{fidelity.value}, adapters: {', '.join(kinds)}; ask --h2o whether this release has room"
    return exact, Finding(name="eviction", ok=True, detail=detail)


def _probes() -> list[importlib.metadata.EntryPoint]:
    return sorted(importlib.metadata.entry_points(group=PROBE_GROUP), key=lambda point: point.name)


def _plugin(function: str) -> tuple[Finding, ...]:
    findings, error = ask((function,))
    if error:
        return (Finding(name=function, ok=False, detail=error),)
    return tuple(
        Finding(name=" ".join(filter(None, (f.get("path"), f["name"]))), ok=f["ok"], detail=f["detail"])
        for f in findings
    )


def render(diagnosis: Diagnosis) -> str:
    """For people."""
    found = diagnosis.installation
    version = found.version or "?"
    lines = ["machine", *_lines(diagnosis.machine)]
    lines += ["devices"] + (
        [
            f"  yes  {d.index}: {d.name}, sm{d.sm}, {format_gib(d.memory_bytes)}, driver {d.driver} "
            f"({catalog_name(d) or 'not in the catalog'})"
            for d in diagnosis.devices
        ]
        or ["  no   no NVIDIA GPU is visible"]
    )
    lines += [
        f"TensorRT-LLM {version if found.present else 'is not installed'}{' ' + found.error if found.error else ''}"
    ]
    lines += [
        f"  {_sign(path is not None)} {name}: {path or 'not on PATH'}"
        for name, path in (
            ("trtllm-build", found.trtllm_build), ("mpirun", found.mpirun), ("trtllm-llmapi-launch", found.launcher)
        )
    ]  # fmt: skip
    lines += _lines(diagnosis.names)
    lines += ["targets", *_lines(diagnosis.targets)]
    for title, table in (
        ("precisions", diagnosis.precisions),
        ("KV cache", diagnosis.kv),
        ("plugin", diagnosis.plugins),
    ):
        for key, findings in table.items():
            lines += [f"{title}: {key}", *_lines(findings)]
    return "\n".join(lines)


def _lines(findings: Sequence[Finding]) -> list[str]:
    return [f"  {_sign(f.ok)} {f.name}{': ' if f.detail else ''}{f.detail}" for f in findings]


def _sign(ok: bool) -> str:
    return "yes " if ok else "no  "
