"""Calls that compile the probe's own kernels."""

from __future__ import annotations

import torch

from bench.gpu import probe_kernels


def _read(shape: tuple[int, int, int]) -> None:
    tile, warps, tiles = shape
    source = torch.zeros(2 * tile * tiles, dtype=torch.int32)
    probe_kernels.read_all(source, torch.zeros(2, dtype=torch.int32), tile=tile, warps=warps, tiles=tiles)


CASES = {
    **{f"read {shape}": lambda shape=shape: _read(shape) for shape in probe_kernels.READ_SHAPES},
    "nothing": lambda: probe_kernels.nothing(torch.zeros(1, dtype=torch.int32)),
}
