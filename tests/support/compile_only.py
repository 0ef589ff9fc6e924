"""Compile Triton kernels for a GPU that is not here, through our own wrappers, and read what the compiler made.

Triton's driver is replaced by one that only names an architecture, and launches compile and stop. A wrapper called
with CPU tensors then compiles exactly what it would compile on that GPU. Needs a process in which Triton's
interpreter is off: run `python -m support.compile_only FAMILY ...` (tests do, see `compiled_rows`).

`Compiled.serialised` holds the assembler's complaint (C7510, C7514, C7515 and their like) that it puts the asynchronous
products of Hopper (wgmma) one after the other, each waited for at once. Triton reads the assembler's output only where
it fails, and a kernel from Triton's cache meets no assembler at all, so a kernel that has wgmma is assembled once more,
by Triton's own call of ptxas, with its output kept. To guard another family, add its cases and hold
`[row for row in compiled_rows([family], [90]) if row.serialised]` against nothing, as
`test_compiles_for_hopper.py` does for every family.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Shared memory one block can have, from NVIDIA's table of compute capabilities (datasheet)."""


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One kernel as the assembler left it; `sass` is empty unless it was asked for, `serialised` if all is well."""

    case: str
    kernel: str
    capability: int
    registers: int
    local_bytes: int
    stack_bytes: int
    shared_bytes: int
    warps: int
    stages: int
    constants: str
    serialised: str
    sass: str


def compiled_rows(
    families: Sequence[str], capabilities: Sequence[int] = (90, 80), *, extra_path: Path | None = None
) -> list[Compiled]:
    """Compile every case of `families` in a fresh process.

    A case lives in `support/compile_FAMILY_cases.py`, in a module `compile_FAMILY_cases` under `extra_path` if given.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    path = [str(extra_path)] if extra_path else []
    path += [str(root / "tests"), str(root), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "support.compile_only", *families, *(f"sm_{number}" for number in capabilities)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return [Compiled(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


@contextlib.contextmanager
def compile_only(capability: int = 90, *, all_configs: bool = False, sass: bool = False) -> Iterator[list[Compiled]]:
    """Inside, `kernel[grid](...)` compiles for `sm_<capability>` and does not run; the list fills with the kernels.

    Args:
        capability: 90 or 80.
        all_configs: compile every configuration of an autotuned kernel, not only the first.
        sass: disassemble too.
    """
    import triton.testing
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("Triton's interpreter is on: compile in a process of its own")
    found: list[Compiled] = []
    seen: set[str] = set()
    launch, tune, prune = JITFunction.run, Autotuner.run, Autotuner.prune_configs

    def compile_and_stop(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        made = getattr(kernel, "hash", None)  # none yet where kernels are compiled ahead, in threads
        if made is not None and made not in seen:
            seen.add(made)
            found.append(_describe(kernel, kwargs, capability, sass=sass))
        return kernel

    def forget_and_tune(self, *args, **kwargs):
        self.cache.clear()  # what was chosen for another architecture is not chosen for this one
        return tune(self, *args, **kwargs)

    def first_only(self, kwargs, *args, **options):
        return prune(self, kwargs, *args, **options)[:1]

    with contextlib.ExitStack() as stack:
        stack.enter_context(_patched(JITFunction, "run", compile_and_stop))
        stack.enter_context(_patched(Autotuner, "run", forget_and_tune))
        stack.enter_context(_patched(triton.testing, "do_bench", _call_once))
        stack.enter_context(_fake_driver(triton, capability))
        if not all_configs:
            stack.enter_context(_patched(Autotuner, "prune_configs", first_only))
        yield found


def run_cases(families: Sequence[str], capabilities: Sequence[int], *, sass: bool = False) -> Iterator[Compiled]:
    """Every kernel of every case of `families`, in this process; for older GPUs an autotuned kernel's first tile only."""
    from dataclasses import replace

    for family in families:
        name = f"compile_{family}_cases"
        own = importlib.util.find_spec(name) is None
        cases: dict[str, Callable[[], object]] = importlib.import_module(f"support.{name}" if own else name).CASES
        for capability in capabilities:
            for name, call in cases.items():
                started = time.perf_counter()
                with compile_only(capability, all_configs=capability >= 90, sass=sass) as found:
                    call()
                spent_s = time.perf_counter() - started
                sys.stderr.write(f"{family}: {name}, sm_{capability}: {len(found)} kernels in {spent_s:.1f} s\n")
                if not found:
                    sys.stderr.write(f"{family}: {name}, sm_{capability}: nothing to compile\n")
                yield from (replace(one, case=f"{family}: {name}") for one in found)


def _describe(kernel, kwargs, capability: int, *, sass: bool) -> Compiled:
    metadata = kernel.metadata
    usage, listing = _read_cubin(kernel.asm["cubin"], sass=sass)
    constants = {key: value for key, value in kwargs.items() if key.isupper()}
    return Compiled(
        case="", kernel=metadata.name, capability=capability,
        registers=_count(usage, "REG"), local_bytes=_count(usage, "LOCAL"), stack_bytes=_count(usage, "STACK"),
        shared_bytes=metadata.shared, warps=metadata.num_warps, stages=metadata.num_stages,
        constants=str(constants), serialised=_serialised(kernel), sass=listing,
    )  # fmt: skip


def _serialised(kernel) -> str:
    """What ptxas says about products that it puts one after the other."""
    from triton import knobs
    from triton.compiler.compiler import make_backend

    if "wgmma" not in kernel.asm["ptx"]:
        return ""
    metadata = kernel.metadata._asdict()
    backend = make_backend(kernel.metadata.target)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), knobs.nvidia.scope():
        knobs.nvidia.dump_ptxas_log = True
        backend.make_cubin(kernel.asm["ptx"], metadata, backend.parse_options(metadata), backend.target.arch)
    assert "registers" in said.getvalue(), "the assembler's words were not caught"
    return "\n".join(line for line in said.getvalue().splitlines() if "serialized" in line)


def _read_cubin(cubin: bytes, *, sass: bool) -> tuple[str, str]:
    """`cuobjdump`'s line on resources, and the machine code where it is wanted."""
    import triton.testing

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
        listing = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True) if sass else None
    return usage.stdout + usage.stderr, listing.stdout if listing else ""


def _count(usage: str, name: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", usage)
    assert found, f"no {name} in what cuobjdump says: {usage}"
    return int(found.group(1))


@contextlib.contextmanager
def _patched(owner, name: str, value) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _fake_driver(triton, capability: int) -> Iterator[None]:
    config = triton.runtime.driver
    before = config.__dict__.copy()
    config.set_active(_Driver(capability))
    try:
        yield
    finally:
        config.__dict__.clear()
        config.__dict__.update(before)


class _Driver:
    """A driver that names an architecture; the device's number is the architecture, so caches stay apart."""

    def __init__(self, capability: int):
        self.get_current_device = lambda: capability
        self.get_current_stream = lambda _=None: 0
        self.set_current_device = self.clear_cache = lambda _: None
        self.get_benchmarker = lambda: _call_once

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.get_current_device(), 32)

    def get_active_torch_device(self):
        import torch

        return torch.device("cpu")


def _call_once(call, **_):
    call()
    return [1.0, 1.0, 1.0]


def main(arguments: Sequence[str]) -> None:
    """`FAMILY ... [sm_90] [sm_80] [--sass]`: one JSON object a kernel."""
    capabilities = [int(word.removeprefix("sm_")) for word in arguments if word.startswith("sm_")] or [90, 80]
    families = [word for word in arguments if not word.startswith(("sm_", "--"))]
    for row in run_cases(families, capabilities, sass="--sass" in arguments):
        sys.stdout.write(json.dumps(asdict(row)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
