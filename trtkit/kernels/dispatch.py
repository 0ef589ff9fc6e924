"""Which implementation runs: the Triton kernel on CUDA, its torch twin elsewhere and wherever a kernel was switched off.

A family is kernels that stand or fall together. The self-check of `trtkit.kernels.selfcheck` switches a family off when it is wrong on
the device at hand; so does the environment variable TRTKIT_KERNELS_OFF ("score,ranking"). The reason is kept and
reported.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

FAMILIES = ("matmul", "fused", "sampling", "decode", "prefill", "score", "compact", "ranking")
SWITCH = "TRTKIT_KERNELS_OFF"
_ASSUMED_MULTIPROCESSORS = 132
"""Of an H100 SXM: what grids are sized for where no GPU can be asked (compile tests, the interpreter)."""


def use_triton(tensor: Tensor, family: str) -> bool:
    """Whether `family`'s kernels run on `tensor` instead of their twins."""
    return tensor.is_cuda and triton_is_installed() and family not in _switched_off()


def disable(family: str, reason: str) -> None:
    """Switch the kernels of `family` off in this process; its twins take over. The first reason stays."""
    _switched_off().setdefault(family, reason)


def enable(family: str) -> None:
    """Undo `disable`."""
    _switched_off().pop(family, None)


def disabled() -> dict[str, str]:
    """What fell back to its twin and why, family by family; a copy."""
    return dict(_switched_off())


@cache
def triton_is_installed() -> bool:
    """Whether Triton can be imported; asked once, for launches must cost nothing."""
    return importlib.util.find_spec("triton") is not None


@cache
def num_multiprocessors(device: torch.device) -> int:
    """SMs of a CUDA device; those of an H100 for any other device."""
    if device.type != "cuda":
        return _ASSUMED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def has_fp8(device: torch.device) -> bool:
    """Whether a CUDA device's hardware makes and multiplies FP8: from Ada and Hopper on. False for other devices."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@cache
def _switched_off() -> dict[str, str]:
    named = os.environ.get(SWITCH, "").replace(",", " ").split()
    return dict.fromkeys(named, f"switched off by {SWITCH}")
