"""`bench/gpu/kernels.py --rehearse` with every Triton kernel in the interpreter, reached through its public function.

Run in a process of its own: `python -m support.interpreted_bench --out FILE [more of the script's options]`.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
from support.interpreter import round_bfloat16_to_nearest

from bench.gpu import kernel_bench, kernels
from trtkit.kernels import fused, matmul, paged, ranking, sampling


def main() -> None:
    """Let every family think that it is on CUDA, and run."""
    np.seterr(all="ignore")  # GPUs overflow silently
    round_bfloat16_to_nearest(type("Forever", (), {"setattr": staticmethod(setattr)}))
    for module in (fused, matmul, paged, ranking, sampling, kernel_bench):
        module.use_triton = lambda *_: True
    sys.argv = ["kernels.py", "--rehearse", *sys.argv[1:]]
    kernels.main()


if __name__ == "__main__":
    main()
