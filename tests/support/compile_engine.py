"""Compile, for an H100, every kernel that the engine launches, exactly as it launches them; prints their names.

Kernels compile and stop here, so tokens are whatever lay in memory, and only prompts and steps are looked at.
"""

from __future__ import annotations

import sys

from support.compile_only import compile_only
from support.triton_engine import kernels_everywhere, opened, requests


def main() -> None:
    """Run every kind of step."""
    kernels_everywhere()
    names: set[str] = set()
    for policy, cache, weights in (("full", "fp16", "fp16"), ("h2o:32", "fp8", "int8")):
        with compile_only(90) as found, opened(policy, cache, weights, on_kernels=True) as engine:
            for _ in engine.generate(requests()):
                pass
        names |= {kernel.kernel for kernel in found}
    sys.stdout.write(" ".join(sorted(names)))


if __name__ == "__main__":
    main()
