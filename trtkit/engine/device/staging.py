"""What a step tells the device, as one packed int32 array: one copy a step, and nothing waits for it.

The host fills one of a few pinned buffers in turn and starts the copy; a buffer is filled again only after its copy
has ended, which by then it long has. Words are int32; float64 fields take two words an element.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

_BUFFERS = 4
_WORD_BYTES = 4
_ALIGNED_WORDS = 4


class Fence(Protocol):
    """A moment in the device's work."""

    def wait(self) -> None:
        """Block until the device has come to it."""


class Passed:
    """A moment that is over: the CPU works in order."""

    def wait(self) -> None:
        """Nothing to wait for."""


class CudaFence:
    """A moment in the current CUDA stream."""

    def __init__(self) -> None:
        """Mark what has been launched so far."""
        self._event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> None:
        """Block until the stream has come to it."""
        self._event.synchronize()


def fence(device: torch.device) -> Fence:
    """The moment at which all that has been launched so far is done."""
    return CudaFence() if device.type == "cuda" else Passed()


def pinned(words: int, device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """Host memory that copies to and from `device` do not wait for."""
    return torch.zeros(words, dtype=dtype, pin_memory=device.type == "cuda")


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One named part of the array: its shape, and "int32" or "float64"."""

    shape: tuple[int, ...]
    kind: str = "int32"

    @property
    def words(self) -> int:
        """int32 words it takes."""
        return math.prod(self.shape) * (2 if self.kind == "float64" else 1)


class Layout:
    """Where each field lies. Fields begin at multiples of 16 bytes, which kernels read fastest."""

    def __init__(self, fields: Mapping[str, Field]) -> None:
        """Lay fields out in the order given."""
        self._places: dict[str, tuple[int, Field]] = {}
        self.words = 0
        for name, field in fields.items():
            self._places[name] = (self.words, field)
            self.words += -(-field.words // _ALIGNED_WORDS) * _ALIGNED_WORDS

    def arrays(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """Views to fill, by name."""
        return {
            name: flat[start : start + field.words].view(field.kind).reshape(field.shape)
            for name, (start, field) in self._places.items()
        }

    def tensors(self, flat: Tensor) -> dict[str, Tensor]:
        """Views to read on the device, by name."""
        return {
            name: flat[start : start + field.words].view(getattr(torch, field.kind)).view(field.shape)
            for name, (start, field) in self._places.items()
        }


class Staging:
    """The pinned buffers and the way to the device."""

    def __init__(self, device: torch.device, words: int) -> None:
        """Buffers of `words`; they grow when a step needs more."""
        self._device = device
        self._buffers = [pinned(words, device) for _ in range(_BUFFERS)]
        self._fences: list[Fence] = [Passed() for _ in range(_BUFFERS)]
        self._turn = 0

    def send(self, layout: Layout, values: Mapping[str, Any], into: Tensor | None = None) -> dict[str, Tensor]:
        """Start the copy of a step's fields; returns their views on the device.

        Args:
            layout: the fields.
            values: what each holds; fields left out hold what was there before, so leave none out.
            into: int32 memory on the device to use, of at least the layout's words; new memory if None.
        """
        self._turn = (self._turn + 1) % _BUFFERS
        self._fences[self._turn].wait()
        if self._buffers[self._turn].numel() < layout.words:
            self._buffers[self._turn] = pinned(2 * layout.words, self._device)
        host = self._buffers[self._turn][: layout.words]
        for name, array in layout.arrays(host.numpy()).items():
            array[...] = values[name]
        if into is None:
            into = torch.empty(layout.words, dtype=torch.int32, device=self._device)
        into[: layout.words].copy_(host, non_blocking=True)
        self._fences[self._turn] = fence(self._device)
        return layout.tensors(into)

    @property
    def num_bytes(self) -> int:
        """Pinned host memory."""
        return sum(buffer.numel() * _WORD_BYTES for buffer in self._buffers)
