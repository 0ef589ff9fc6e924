"""TensorRT-LLM and the GPUs on this machine, asked without importing anything here."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from trtkit.spec.units import MIB
from trtkit.trtllm.probe_child import ANSWER, probe

PROBE_TIMEOUT_S = 300.0
"""An import of TensorRT-LLM takes tens of seconds; one that takes minutes hangs in MPI."""

_SMI_TIMEOUT_S = 30.0
_SMI_FIELDS = "index,uuid,name,memory.total,compute_cap,driver_version"


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One visible GPU. `sm` is the compute capability times ten."""

    index: int
    uuid: str
    name: str
    memory_bytes: int
    sm: int
    driver: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Installation:
    """What TensorRT-LLM is here. `names` maps each name that exists to the arguments it takes, where they can be read."""

    present: bool
    version: str | None = None
    error: str = ""
    names: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)
    trtllm_build: str | None = None
    mpirun: str | None = None
    launcher: str | None = None

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor version; (0, 0) if it is not installed or its version cannot be read."""
        parts = (self.version or "").split(".")
        numbers = [int(part) for part in parts[:2] if part.isdecimal()]
        return (numbers[0], numbers[1]) if len(numbers) == 2 else (0, 0)

    @property
    def has_engines(self) -> bool:
        """The TensorRT engine backend: its `LLM` exists, whatever the version says."""
        return "tensorrt_llm._tensorrt_engine.LLM" in self.names

    @property
    def has_pytorch(self) -> bool:
        """The PyTorch backend's `LLM` exists."""
        return "tensorrt_llm.LLM" in self.names


def installation(*, timeout_s: float = PROBE_TIMEOUT_S) -> Installation:
    """Probe once; asking again gives the same answer, unless another Python path or version is set by then."""
    return _probed(os.environ.get("PYTHONPATH", ""), os.environ.get("PATH", ""), timeout_s)


def installation_here() -> Installation:
    """The same by importing it into this process: for the engine's child, which imports it anyway."""
    if importlib.util.find_spec("tensorrt_llm") is None:
        return _Tools().absent()
    return _Tools().answered(probe())


@cache
def _probed(_python_path: str, _path: str, timeout_s: float) -> Installation:
    tools = _Tools()
    if not _importable():
        return tools.absent()
    found, error = ask((), timeout_s=timeout_s)
    return tools.failed(error) if error else tools.answered(found)


def ask(arguments: Sequence[str], *, timeout_s: float = PROBE_TIMEOUT_S) -> tuple[Any, str]:
    """What the probing process answers, and what is wrong if it gives no answer."""
    command = [sys.executable, "-m", "trtkit.trtllm.probe_child", *arguments]
    try:
        done = subprocess.run(  # noqa: S603 - our own module
            command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"importing it did not end within {timeout_s:g} s (MPI?)"
    lines = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if not lines:
        tail = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return None, f"importing it ended with exit code {done.returncode}: {tail}"
    return json.loads(lines[-1].removeprefix(ANSWER)), ""


class _Tools:
    """The programs on PATH, and the installation that goes with them."""

    def __init__(self) -> None:
        self._programs = [shutil.which(name) for name in ("trtllm-build", "mpirun", "trtllm-llmapi-launch")]

    def absent(self) -> Installation:
        return self._with(Installation(present=False))

    def failed(self, error: str) -> Installation:
        return self._with(Installation(present=True, error=error))

    def answered(self, answer: Mapping[str, Any]) -> Installation:
        names = {name: None if found is None else tuple(found) for name, found in answer["names"].items()}
        found = Installation(present=True, version=answer["version"], error=answer["error"], names=names)
        return self._with(found)

    def _with(self, found: Installation) -> Installation:
        build, mpirun, launcher = self._programs
        return replace(found, trtllm_build=build, mpirun=mpirun, launcher=launcher)


def _importable() -> bool:
    """Whether a fresh Python would find the package; `PYTHONPATH` may have changed since this one started."""
    if importlib.util.find_spec("tensorrt_llm") is not None:
        return True
    extra = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return any((Path(entry) / "tensorrt_llm" / "__init__.py").is_file() for entry in extra if entry)


def visible_devices() -> tuple[Device, ...]:
    """The GPUs that `CUDA_VISIBLE_DEVICES` leaves, by `nvidia-smi`; none without a driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(  # noqa: S603 - a fixed program
            command, capture_output=True, text=True, check=True, timeout=_SMI_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    devices = [_device(line) for line in done.stdout.splitlines() if line.count(",") >= 5]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return tuple(devices)
    wanted = [item.strip() for item in chosen.split(",") if item.strip()]
    by_name = {str(device.index): device for device in devices} | {device.uuid: device for device in devices}
    return tuple(by_name[item] for item in wanted if item in by_name)


def _device(line: str) -> Device:
    index, uuid, name, memory_mib, capability, driver = (part.strip() for part in line.split(","))
    major, _, minor = capability.partition(".")
    return Device(
        index=int(index),
        uuid=uuid,
        name=name,
        memory_bytes=int(memory_mib) * MIB,
        sm=int(major) * 10 + int(minor or 0),
        driver=driver,
    )
