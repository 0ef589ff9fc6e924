"""The fingerprint every record carries: hardware, driver, versions, commit, clocks, command. No secrets, no names."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from trtkit.benchmark.nvml import management_library
from trtkit.spec.measured import Measured
from trtkit.spec.result import Environment
from trtkit.version import __version__

_PACKAGES = ("torch", "transformers", "tensorrt-llm", "tensorrt", "triton", "numpy", "safetensors", "nvidia-modelopt")
# "token" as a word of its own: --hf-token is secret, --max-num-tokens is not.
_SECRET_FLAG = re.compile(
    r"(?<![a-z])(token|secret|password|passwd|apikey|(api|access|private)[-_]key|credentials?)(?![a-z])", re.IGNORECASE
)
_SECRET_VALUE = re.compile(r"(hf_|sk-|ghp_|gho_|github_pat_|xox[bp]-|nvapi-|AKIA)[A-Za-z0-9_\-]{6,}")
_URL_PASSWORD = re.compile(r"(\w+://)[^/\s:@]+:[^/\s@]+@")
_LIMIT_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
REDACTED = "[redacted]"


def fingerprint(
    *, device: str, device_count: int = 1, command: Sequence[str] = (), limits: Mapping[str, Measured] | None = None
) -> Environment:
    """What this machine is, now.

    Args:
        device: what the engine runs on, "cpu" or "cuda...".
        device_count: how many of them.
        command: the program's arguments; secrets are replaced.
        limits: measured ceilings of the device.
    """
    return Environment(
        hostname_hash=hashlib.sha256(platform.node().encode()).hexdigest()[:12],
        platform=f"{platform.system()} {platform.release()} {platform.machine()}",
        device=device,
        device_count=device_count,
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        python=platform.python_version(),
        versions=_versions(),
        trtkit_commit=_commit(),
        command=redact(command),
        started_utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        gpu=_gpu() if device.startswith("cuda") else {},
        machine_limits=dict(limits or {}),
    )


def redact(command: Sequence[str]) -> str:
    """A command line without values of secret flags, well-known token shapes, or passwords in addresses."""
    words: list[str] = []
    hide_next = False
    for word in command:
        flag, equals, _ = word.partition("=")
        secret_flag = bool(_SECRET_FLAG.search(flag)) and (flag.startswith("-") or bool(equals))
        if hide_next:
            words.append(REDACTED)
        elif secret_flag and equals:
            words.append(f"{flag}={REDACTED}")
        else:
            words.append(_URL_PASSWORD.sub(rf"\1{REDACTED}@", _SECRET_VALUE.sub(REDACTED, word)))
        hide_next = secret_flag and not equals and not hide_next
    return shlex.join(words)


def _versions() -> dict[str, str]:
    found = {"trtkit": __version__}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    found |= {name: os.environ[name] for name in _LIMIT_VARIABLES if name in os.environ}
    return found


def _commit() -> str | None:
    """The checkout's commit, with "+" when files differ from it; None where trtkit is installed as a package.

    A source tree that was carried somewhere without its history is named by its content.
    """
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return source_digest(root) if (root / "pyproject.toml").is_file() else None
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+" if changed else commit


def source_digest(root: Path) -> str:
    """`tree:` and 12 hex digits over the program files of a source tree; equal trees have equal ones, in git or not."""
    sha = hashlib.sha256()
    for folder in ("bench", "plugins", "trtkit"):
        for path in sorted((root / folder).rglob("*.py")):
            sha.update(f"{path.relative_to(root).as_posix()}\0".encode())
            sha.update(path.read_bytes() + b"\0")
    return f"tree:{sha.hexdigest()[:12]}"


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)  # noqa: S603
    return result.stdout.strip()


def _cpu_name() -> str:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu() -> dict[str, str]:
    """Name, driver, power limit and clocks of the first device, as NVML tells them now."""
    nvml = management_library()
    if nvml is None:
        return {}
    facts: dict[str, str] = {}
    try:
        nvml.nvmlInit()
        handle = nvml.nvmlDeviceGetHandleByIndex(0)
    except nvml.NVMLError:
        return facts
    for key, read in _gpu_readers(nvml, handle).items():
        with contextlib.suppress(nvml.NVMLError):
            value = read()
            facts[key] = value.decode() if isinstance(value, bytes) else str(value)
    return facts


def _gpu_readers(nvml: Any, handle: Any) -> dict[str, Any]:  # noqa: ANN401 - pynvml is untyped
    return {
        "name": lambda: nvml.nvmlDeviceGetName(handle),
        "driver": nvml.nvmlSystemGetDriverVersion,
        "cuda": nvml.nvmlSystemGetCudaDriverVersion,
        "memory_bytes": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).total,
        "power_limit_mw": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle),
        "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "sm_clock_max_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "persistence_mode": lambda: nvml.nvmlDeviceGetPersistenceMode(handle),
    }
