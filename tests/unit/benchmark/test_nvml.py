"""The driver's management library without pynvml: the same names, asked for as nvml.h declares them.

The library is a real one, compiled here where there is a C compiler, so that arguments and structures are tried in C.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trtkit.benchmark import nvml
from trtkit.benchmark.memory import NvmlGauge

SOURCE = """
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu, compute; } process_t;
typedef struct device *device_t;
static int ready;
int nvmlInit_v2(void) { ready = 1; return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; return ready ? 0 : 1; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, device_t *d) {
  if (i > 1) return 2;
  *d = (device_t)(0x7000000000000000ULL + i);
  return 0;
}
static int is_first(device_t d) { return d == (device_t)0x7000000000000000ULL; }
int nvmlDeviceGetMemoryInfo(device_t d, memory_t *m) {
  m->total = 85000000000ULL; m->used = is_first(d) ? 73000000000ULL : 5; m->free = m->total - m->used;
  return 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(device_t d, unsigned *n, process_t *p) {
  if (!is_first(d)) return 3;
  if (*n < 2) return 7;
  p[0].pid = 4321; p[0].used = 72000000000ULL; p[1].pid = 1; p[1].used = (unsigned long long)-1;
  *n = 2;
  return 0;
}
int nvmlDeviceGetClockInfo(device_t d, unsigned kind, unsigned *mhz) { *mhz = kind == 1 ? 1755 : 2619; return 0; }
int nvmlDeviceGetMaxClockInfo(device_t d, unsigned kind, unsigned *mhz) { *mhz = 1980; return 0; }
int nvmlDeviceGetCurrentClocksThrottleReasons(device_t d, unsigned long long *r) { *r = 0x84; return 0; }
int nvmlDeviceGetPowerUsage(device_t d, unsigned *mw) { *mw = 650500; return 0; }
int nvmlDeviceGetName(device_t d, char *s, unsigned n) { strncpy(s, "NVIDIA H100 80GB HBM3", n); return 0; }
int nvmlSystemGetDriverVersion(char *s, unsigned n) { strncpy(s, "580.95.05", n); return 0; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> nvml.DriverLibrary:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    folder = tmp_path_factory.mktemp("nvml")
    (folder / "nvml.c").write_text(SOURCE, encoding="utf-8")
    made = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(made), str(folder / "nvml.c")], check=True)
    return nvml.DriverLibrary(ctypes.CDLL(str(made)))


def test_numbers_texts_and_structures_come_back_as_pynvml_gives_them(library: nvml.DriverLibrary) -> None:
    library.nvmlInit()
    assert library.nvmlDeviceGetCount() == 2
    handle = library.nvmlDeviceGetHandleByIndex(0)
    found = library.nvmlDeviceGetMemoryInfo(handle)
    assert (found.total, found.used, found.free) == (85_000_000_000, 73_000_000_000, 12_000_000_000)
    assert library.nvmlDeviceGetClockInfo(handle, library.NVML_CLOCK_SM) == 1755
    assert library.nvmlDeviceGetClockInfo(handle, library.NVML_CLOCK_MEM) == 2619
    assert library.nvmlDeviceGetMaxClockInfo(handle, library.NVML_CLOCK_SM) == 1980
    assert library.nvmlDeviceGetCurrentClocksEventReasons(handle) == 0x84
    assert library.nvmlDeviceGetPowerUsage(handle) == 650_500
    assert library.nvmlDeviceGetName(handle) == "NVIDIA H100 80GB HBM3"
    assert library.nvmlSystemGetDriverVersion() == "580.95.05"


def test_memory_of_a_process_is_read_through_it(library: nvml.DriverLibrary) -> None:
    handle = library.nvmlDeviceGetHandleByIndex(0)
    held = {entry.pid: entry.usedGpuMemory for entry in library.nvmlDeviceGetComputeRunningProcesses(handle)}
    assert held == {4321: 72_000_000_000, 1: None}
    assert NvmlGauge(4321, library, {0: 0}).read_bytes() == 72_000_000_000
    assert NvmlGauge(99, library, {1: 2}).read_bytes() == 3


def test_what_the_driver_refuses_or_lacks_is_an_error_of_the_library(library: nvml.DriverLibrary) -> None:
    with pytest.raises(library.NVMLError, match="error 2"):
        library.nvmlDeviceGetHandleByIndex(7)
    with pytest.raises(library.NVMLError, match="does not have it"):
        library.nvmlDeviceGetPersistenceMode(library.nvmlDeviceGetHandleByIndex(0))


def test_pynvml_comes_first_and_without_driver_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = object()
    monkeypatch.setitem(sys.modules, "pynvml", stand_in)
    assert nvml.management_library() is stand_in
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(nvml, "_LIBRARY", str(Path("no") / "such.so"))
    assert nvml.management_library() is None


def test_the_drivers_own_library_serves_where_pynvml_is_missing(
    library: nvml.DriverLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(nvml, "_LIBRARY", library._library._name)
    found = nvml.management_library()
    found.nvmlInit()
    assert found.nvmlDeviceGetCount() == 2
