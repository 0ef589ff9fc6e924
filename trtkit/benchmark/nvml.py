"""NVIDIA's management library: `pynvml` where it is installed, else the driver's own library through ctypes.

A GPU box that runs from the source tree may have the driver and torch and nothing else; memory and clocks are asked for
outside the engine all the same. Names and results are pynvml's, as far as this project uses them; structures are nvml.h's.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

_LIBRARY = "libnvidia-ml.so.1"
_TEXT_BYTES = 96
_MOST_PROCESSES = 512
_NOT_AVAILABLE = (1 << 64) - 1


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class _Process(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint),
        ("usedGpuMemory", ctypes.c_ulonglong),
        ("gpuInstanceId", ctypes.c_uint),
        ("computeInstanceId", ctypes.c_uint),
    )


class NVMLError(Exception):
    """The library refused a call, or lacks it."""


class DriverLibrary:
    """The calls that this project makes, with pynvml's names and results."""

    NVML_CLOCK_SM = 1
    NVML_CLOCK_MEM = 2
    NVML_TEMPERATURE_GPU = 0
    NVMLError = NVMLError

    def __init__(self, library: Any) -> None:  # noqa: ANN401 - ctypes makes functions as they are asked for
        """`library` is the loaded one."""
        self._library = library

    def nvmlInit(self) -> None:  # noqa: N802
        """Before any other call; as often as one likes."""
        self._call("nvmlInit_v2")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        """Devices."""
        return self._number("nvmlDeviceGetCount_v2")

    def nvmlDeviceGetHandleByIndex(self, index: int) -> ctypes.c_void_p:  # noqa: N802
        """What names a device in the other calls."""
        handle = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
        return handle

    def nvmlDeviceGetMemoryInfo(self, handle: ctypes.c_void_p) -> _Memory:  # noqa: N802
        """Bytes: `total`, `free`, `used`."""
        found = _Memory()
        self._call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(found))
        return found

    def nvmlDeviceGetComputeRunningProcesses(self, handle: ctypes.c_void_p) -> list[SimpleNamespace]:  # noqa: N802
        """`pid` and `usedGpuMemory` of each, None where the driver does not tell."""
        count, found = ctypes.c_uint(_MOST_PROCESSES), (_Process * _MOST_PROCESSES)()
        self._call("nvmlDeviceGetComputeRunningProcesses_v3", handle, ctypes.byref(count), found)
        return [
            SimpleNamespace(
                pid=entry.pid, usedGpuMemory=None if entry.usedGpuMemory == _NOT_AVAILABLE else entry.usedGpuMemory
            )
            for entry in found[: count.value]
        ]

    def nvmlDeviceGetClockInfo(self, handle: ctypes.c_void_p, kind: int) -> int:  # noqa: N802
        """MHz."""
        return self._number("nvmlDeviceGetClockInfo", handle, ctypes.c_uint(kind))

    def nvmlDeviceGetMaxClockInfo(self, handle: ctypes.c_void_p, kind: int) -> int:  # noqa: N802
        """MHz."""
        return self._number("nvmlDeviceGetMaxClockInfo", handle, ctypes.c_uint(kind))

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: ctypes.c_void_p) -> int:  # noqa: N802
        """Bits; named "throttle reasons" before driver 535, a name that newer drivers still know."""
        reasons = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetCurrentClocksThrottleReasons", handle, ctypes.byref(reasons))
        return int(reasons.value)

    def nvmlDeviceGetTemperature(self, handle: ctypes.c_void_p, sensor: int) -> int:  # noqa: N802
        """Degrees Celsius."""
        return self._number("nvmlDeviceGetTemperature", handle, ctypes.c_uint(sensor))

    def nvmlDeviceGetPowerUsage(self, handle: ctypes.c_void_p) -> int:  # noqa: N802
        """Milliwatts."""
        return self._number("nvmlDeviceGetPowerUsage", handle)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: ctypes.c_void_p) -> int:  # noqa: N802
        """Milliwatts."""
        return self._number("nvmlDeviceGetEnforcedPowerLimit", handle)

    def nvmlDeviceGetPersistenceMode(self, handle: ctypes.c_void_p) -> int:  # noqa: N802
        """1 if the driver stays loaded."""
        return self._number("nvmlDeviceGetPersistenceMode", handle)

    def nvmlDeviceGetName(self, handle: ctypes.c_void_p) -> str:  # noqa: N802
        """Such as "NVIDIA H100 80GB HBM3"."""
        return self._text("nvmlDeviceGetName", handle)

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        """Such as "580.95.05"."""
        return self._text("nvmlSystemGetDriverVersion")

    def nvmlSystemGetCudaDriverVersion(self) -> int:  # noqa: N802
        """Such as 13000."""
        return self._number("nvmlSystemGetCudaDriverVersion")

    def _number(self, name: str, *arguments: object) -> int:
        found = ctypes.c_uint()
        self._call(name, *arguments, ctypes.byref(found))
        return int(found.value)

    def _text(self, name: str, *arguments: object) -> str:
        found = ctypes.create_string_buffer(_TEXT_BYTES)
        self._call(name, *arguments, found, ctypes.c_uint(_TEXT_BYTES))
        return found.value.decode(errors="replace")

    def _call(self, name: str, *arguments: object) -> None:
        try:
            code = getattr(self._library, name)(*arguments)
        except AttributeError:
            raise NVMLError(f"{name}: this driver does not have it") from None
        if code:
            raise NVMLError(f"{name}: error {code}")


def management_library() -> Any | None:  # noqa: ANN401 - pynvml is untyped
    """pynvml, or the driver's library under the same names; None where there is no driver."""
    try:
        import pynvml
    except ImportError:
        pass
    else:
        return pynvml
    try:
        return DriverLibrary(ctypes.CDLL(_LIBRARY))
    except OSError:
        return None
