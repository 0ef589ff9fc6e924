"""What every row of `kernels.py` goes through: run, compare with float64, time, hold against its ceiling and torch's way."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bench.gpu.common import Call, Session, Timing, errors, first_line
from trtkit.kernels.dispatch import disabled, use_triton
from trtkit.plan.names import gpu_word
from trtkit.spec.catalog import gpu_spec
from trtkit.spec.codec import from_plain
from trtkit.spec.dtype import DType
from trtkit.spec.errors import TrtkitError
from trtkit.spec.limits import READ_BYTES_S, matmul_key
from trtkit.spec.measured import Measured, Source

GRAPH_NODE_S = "graph_node_s"
COMPUTE = {
    "int4": torch.float16,
    "int8": torch.float16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,
    "bf16": torch.bfloat16,
}
"""What the engine computes in, by the type of the weights; the names of `trtkit build --precision`'s defaults."""

MAIN = torch.float16
"""What the INT8 rows compute in, and therefore what kernels without weights are measured in."""
Pairs = Sequence[tuple[Tensor, Tensor]]
"""What came out beside what should have."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Sizes: one layer of Llama 3 70B, or a rehearsal's."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    dim: int
    vocab: int
    layers: int
    block: int
    tokens: tuple[int, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    budget: int
    interval: int
    group: int

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """[out, in] of the block matrices and the head."""
        width = self.dim
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * width, self.hidden),
            "dense": (self.hidden, self.heads * width),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "lm_head": (self.vocab, self.hidden),
        }


LLAMA_70B = Scale(
    hidden=8192, intermediate=28672, heads=64, kv_heads=8, dim=128, vocab=128_256, layers=80, block=32,
    tokens=(1, 8, 32, 64, 512, 4096), contexts=(512, 4096), batches=(1, 8, 32), budget=2048, interval=32, group=128,
)  # fmt: skip
TINY = Scale(
    hidden=64, intermediate=96, heads=8, kv_heads=2, dim=16, vocab=300, layers=2, block=4,
    tokens=(1, 3, 70), contexts=(5, 24), batches=(1, 3), budget=16, interval=4, group=32,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a call must at least do: bytes it reads and writes, operations and the type of their operands.

    `wide_flops` of the operations have operands of 16 bits whatever `operands` says, such as attention beside FP8 products.
    """

    bytes_moved: int
    flops: float = 0.0
    operands: DType = DType.BF16
    wide_flops: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Other:
    """torch's own way to the same result."""

    name: str
    call: Call


@dataclass(frozen=True, kw_only=True)
class KernelRow:
    """One call at one shape. Times are measured, floors modeled from measured ceilings or from the datasheet.

    `share` is floor over time, `limit_by` what the floor is made of: "bytes", "flops", or "launch" where both are less
    than a node of a graph costs. `error` and `error_largest` (see `common.errors`) are None where a result was no
    number. `times_torch` is torch's time over ours. In a rehearsal times and shares are None.
    """

    family: str
    name: str
    shape: dict[str, int]
    dtype: str
    runs: str
    ok: bool
    error: float | None
    error_largest: float | None
    error_bound: float
    reference: str
    bytes_moved: int
    flops: float
    wide_flops: float = 0.0
    operands: str = ""
    timing: Timing | None = None
    floor_us: float | None = None
    floor_datasheet_us: float | None = None
    limit_by: str = ""
    share: float | None = None
    share_datasheet: float | None = None
    torch_name: str = ""
    torch_timing: Timing | None = None
    times_torch: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row to be: what runs, with how many rotating inputs, and what makes it right."""

    family: str
    name: str
    shape: dict[str, int]
    dtype: str
    call: Call
    check: Callable[[], Pairs]
    bound: float
    work: Work
    copies: int = 1
    reference: str = "float64"
    other: Other | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A session, the sizes, and the ceilings rows are held against."""

    session: Session
    scale: Scale
    limits: dict[str, Measured] = field(default_factory=dict)
    datasheet: dict[str, Measured] = field(default_factory=dict)

    def measure(self, case: Case) -> None:
        """Check, time, compare, and keep the row."""
        session = self.session
        found = [errors(actual, expected) for actual, expected in case.check()]
        worst = (
            None if any(one is None for one in found) else tuple(max(one[i] for one in found if one) for i in (0, 1))
        )
        ok = worst is not None and worst[0] <= case.bound
        timing = session.time(case.call, case.copies)
        theirs, note = None, case.note
        if case.other is not None:
            try:
                theirs = session.time(case.other.call, case.copies)
            except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
                if session.rehearsal:
                    raise
                note = f"{note}; torch's way failed: {type(error).__name__}: {first_line(error)[:160]}".lstrip("; ")
        floor_us, limit_by = floor(case.work, self.limits)
        sheet_us, _ = floor(case.work, self.datasheet)
        median = timing.median_us if timing else None
        session.add(
            KernelRow(
                family=case.family, name=case.name, shape=case.shape, dtype=case.dtype,
                runs=runs_on(case.family, session.device), ok=ok,
                error=worst[0] if worst else None, error_largest=worst[1] if worst else None,
                error_bound=case.bound, reference=case.reference,
                bytes_moved=case.work.bytes_moved, flops=case.work.flops, wide_flops=case.work.wide_flops,
                operands=case.work.operands.value, timing=timing,
                floor_us=floor_us, floor_datasheet_us=sheet_us, limit_by=limit_by if floor_us else "",
                share=floor_us / median if floor_us and median else None,
                share_datasheet=sheet_us / median if sheet_us and median else None,
                torch_name=case.other.name if case.other else "", torch_timing=theirs,
                times_torch=theirs.median_us / median if theirs and median else None, note=note,
            )
        )  # fmt: skip


def floor(work: Work, limits: dict[str, Measured]) -> tuple[float | None, str]:
    """The least time in microseconds at these rates, and what bounds it; None where no rate is known."""
    reading, products = limits.get(READ_BYTES_S), limits.get(matmul_key(work.operands))
    wide = limits.get(matmul_key(DType.BF16)) if work.wide_flops else products
    if reading is None or (work.flops and (products is None or wide is None)):
        return None, ""
    parts = {"bytes": work.bytes_moved / reading.value * 1e6}
    if products is not None and wide is not None and work.flops:
        parts["flops"] = ((work.flops - work.wide_flops) / products.value + work.wide_flops / wide.value) * 1e6
    if GRAPH_NODE_S in limits:
        parts["launch"] = limits[GRAPH_NODE_S].value * 1e6
    bound = max(parts, key=lambda name: parts[name])
    return parts[bound], bound


def runs_on(family: str, device: torch.device) -> str:
    """Whether the family's Triton kernels run on the device, or its torch twins."""
    return "triton" if use_triton(torch.empty(0, device=device), family) else "twin"


def probed_limits(path: Path) -> dict[str, Measured]:
    """Ceilings of a probe's record; empty where there is none or it is a rehearsal's."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, KeyError):
        return {}
    if data.get("rehearsal"):
        return {}
    return {key: from_plain(Measured, value) for key, value in data["limits"].items()}


def datasheet_limits(gpu: str) -> dict[str, Measured]:
    """Peaks of the catalog under the same names; empty for a GPU it does not know."""
    try:
        spec = gpu_spec(gpu_word(gpu))
    except TrtkitError:
        return {}
    limits = {matmul_key(dtype): (rate, "FLOP/s") for dtype, rate in spec.peak_flops.items()}
    limits[READ_BYTES_S] = (spec.memory_bandwidth_bytes_s, "B/s")
    return {key: Measured(value=rate, unit=unit, source=Source.DATASHEET) for key, (rate, unit) in limits.items()}


def fallbacks() -> list[str]:
    """Families whose kernels were switched off, with their reasons."""
    return [f"{family} fell back to its twin: {reason}" for family, reason in disabled().items()]


def num_bytes(*tensors: Tensor) -> int:
    """Bytes of tensors read or written once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
