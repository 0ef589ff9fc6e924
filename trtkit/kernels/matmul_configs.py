# ruff: noqa: ANN401
"""Which tiles of the matrix kernel are tried, how they are compiled, and how Triton's autotuner chooses among them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import triton
import triton.testing

from trtkit.kernels.matmul_tiles import GROUPED_WIDTHS, WIDTHS, Tile, grouped_tiles, tiles_for

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton runs kernels in its interpreter in this process: no assembly, and one tile, for nothing is timed."""

EARLY_START = "TRTKIT_EARLY_START"
INTERPRETED_TILE = Tile(outputs=32, inputs=64, stages=1, warps=4, left=False)

_REGISTERS = {2: 248, 4: 248}
"""By warps of a program, what a thread may have: without it the assembler spills to fit more programs on an SM."""

_LAUNCHES = 20


def candidates(width: int, item: int) -> tuple[Tile, ...]:
    """Tiles that may run for a width of the tokens and size of a weight's element."""
    if INTERPRETED:
        return (INTERPRETED_TILE,)
    return tuple(tile for tile in tiles_for(width, item) if (width, tile) not in _rejected())


def reject(width: int, tile: Tile) -> None:
    """Never choose `tile` again in this process, because it failed or was wrong; the others stay."""
    _rejected().add((width, tile))


def grouped_candidates(width: int, item: float, group: int) -> tuple[Tile, ...]:
    """`candidates` for weights of `item` bytes with a scale for each `group` of inputs."""
    if INTERPRETED:
        return (replace(INTERPRETED_TILE, inputs=2 * max(group, INTERPRETED_TILE.inputs)),)
    return tuple(tile for tile in grouped_tiles(width, group) if (width, tile, item) not in _rejected())


def reject_grouped(width: int, item: float, tile: Tile) -> None:
    """`reject` for weights of `item` bytes with a scale for each group."""
    _rejected().add((width, tile, item))


def tile_of(meta: dict[str, Any]) -> Tile:
    """The tile behind a launch's constants."""
    return Tile(
        outputs=meta["BO"], inputs=meta["BI"], stages=meta["STAGES"], warps=meta["WARPS"], left=bool(meta["LEFT"])
    )


def configuration(tile: Tile) -> triton.Config:
    """A tile as the autotuner takes it."""
    shape = {"BO": tile.outputs, "BI": tile.inputs, "STAGES": tile.stages, "WARPS": tile.warps, "LEFT": tile.left}
    return triton.Config(shape, num_warps=tile.warps, maxnreg=_REGISTERS.get(tile.warps))


def configurations() -> list[triton.Config]:
    """All there are."""
    if INTERPRETED:
        return [configuration(INTERPRETED_TILE)]
    return [configuration(tile) for width in WIDTHS for item in (1, 2) for tile in tiles_for(width, item)]


def prune(_: list[triton.Config], named: dict[str, Any], **keywords: Any) -> list[triton.Config]:
    """Those for the launch at hand."""
    return [configuration(tile) for tile in candidates(keywords["BT"], named["weight"].element_size())]


def grouped_configurations() -> list[triton.Config]:
    """All there are for groups of 128; `prune_grouped` has those of other groups."""
    if INTERPRETED:
        return [configuration(INTERPRETED_TILE)]
    return [configuration(tile) for width in GROUPED_WIDTHS for tile in grouped_tiles(width, 128)]


def prune_grouped(_: list[triton.Config], named: dict[str, Any], **keywords: Any) -> list[triton.Config]:
    """Those for the launch at hand."""
    item = 0.5 if keywords["PACKED"] else 1
    return [configuration(tile) for tile in grouped_candidates(keywords["BT"], item, keywords["GROUP"])]


@cache
def starts_early(device: torch.device) -> bool:
    """Whether a product may start, and ask for weights, while the kernel before it ends (TRTKIT_EARLY_START=1).

    Off unless asked for: nobody has run it on a GPU yet. Hopper brought it.
    """
    if os.environ.get(EARLY_START) != "1" or INTERPRETED or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def launch_options(*, early: bool) -> dict[str, bool]:
    """What a launch needs for that; older compilers do not know the word."""
    return {"launch_pdl": True} if early else {}


def bench(call: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
    """Milliseconds of a kernel at `quantiles`; short, for kernels take tens of microseconds and shapes are many.

    Triton's own timer empties the L2 cache through 256 MB of its own; where weights have left no such room, launches
    are timed back to back, which a matrix larger than L2 hardly notices.
    """
    try:
        measured: list[float] = triton.testing.do_bench(call, warmup=3, rep=15, quantiles=quantiles)
    except torch.OutOfMemoryError:
        measured = _back_to_back(call, quantiles)
    return measured


def median_ms(call: Callable[[], object]) -> float:
    """Time of one call on CUDA, the median of a few; waits for the device."""
    return _back_to_back(call, (0.5,))[0]


def _back_to_back(call: Callable[[], object], quantiles: Sequence[float]) -> list[float]:
    call()
    event: Callable[..., torch.cuda.Event] = torch.cuda.Event
    marks = [event(enable_timing=True) for _ in range(_LAUNCHES + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    times = torch.tensor([before.elapsed_time(after) for before, after in pairwise(marks)])
    return [float(value) for value in times.quantile(torch.tensor(list(quantiles)))]


@cache
def _rejected() -> set[tuple[object, ...]]:
    return set()
