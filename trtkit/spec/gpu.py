"""`GpuSpec`: what a device can do at most, by its datasheet. Prices live elsewhere, on purpose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trtkit.spec.dtype import DType
from trtkit.spec.errors import UnsupportedError


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuSpec:
    """One device.

    `memory_bytes` is what the driver reports as total; `memory_bandwidth_bytes_s` and `peak_flops` (by operand
    type, dense, no sparsity) are datasheet peaks; `link_bytes_s` is one direction between two devices, None
    without one; `sm` is the compute capability times ten (90 for Hopper), 0 for a CPU. `sources` maps a field
    name to "where, date".
    """

    name: str
    title: str
    memory_bytes: int
    memory_bandwidth_bytes_s: float
    peak_flops: Mapping[DType, float]
    sm: int = 0
    link_bytes_s: float | None = None
    tdp_w: float | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    def flops(self, dtype: DType) -> float:
        """Peak operations per second on operands of `dtype`.

        Raises:
            UnsupportedError: this device has no such unit; nothing is guessed from another type.
        """
        if dtype not in self.peak_flops:
            known = ", ".join(d.value for d in self.peak_flops)
            raise UnsupportedError(f"{self.name} has no {dtype.value} peak on record (it has: {known})")
        return self.peak_flops[dtype]
