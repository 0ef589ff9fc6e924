"""Every kernel against float64 on the device at hand, at start-up: what is wrong is switched off before it is used.

Kernels are compiled for a GPU that their authors may not have had; an engine that starts on one runs this first. A
family that fails falls back to its torch twin and says so; of the matrix kernel only the tiles that fail are given up
while others are left. Shapes are small in every direction but those that kernels are compiled for, so what the check
compiles is what the engine then runs. On a CPU the twins are checked.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trtkit.kernels.dispatch import disable, disabled

Answers = Iterable[tuple[Tensor, Tensor]]
"""What a kernel gave beside what is right."""


@dataclass(frozen=True, kw_only=True)
class CheckShape:
    """The sizes and types of the engine to be started; the defaults are Llama 3 70B's."""

    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype = torch.bfloat16
    weight_dtypes: tuple[torch.dtype, ...] = (torch.int8, torch.bfloat16)
    num_heads: int = 64
    num_kv_heads: int = 8
    head_dim: int = 128
    hidden_size: int = 8192
    intermediate_size: int = 28672
    vocab_size: int = 128_256
    tokens_per_block: int = 32
    max_tokens: int = 512
    has_bias: bool = False
    weight_group: int = 0
    """Input channels that share a scale of a quantised weight; 0 is one scale for an output channel (INT4: groups of 128)."""
    zero_points: bool = False


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing to try. `bound` is on the largest error, as a share of the largest right value.

    `on_failure` gives up less than the whole family, if it can.
    """

    family: str
    name: str
    bound: float
    run: Callable[[], Answers]
    on_failure: Callable[[], bool] | None = None


@dataclass(frozen=True, kw_only=True)
class CheckRow:
    """What came of one check. `error` is None where the kernel failed to run; `message` says why, or what followed."""

    family: str
    name: str
    error: float | None
    bound: float
    ok: bool
    message: str
    seconds: float


class Draws:
    """Seeded random tensors on one device; the process's own generators are left alone."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal numbers, drawn in fp32."""
        return torch.randn(shape, generator=self._generator, device=self.device).to(dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1), fp32."""
        return torch.rand(shape, generator=self._generator, device=self.device)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Integers in [low, high)."""
        return torch.randint(low, high, shape, generator=self._generator, device=self.device, dtype=dtype)

    def order(self, count: int) -> Tensor:
        """0 to `count` - 1, shuffled, int32."""
        return torch.randperm(count, generator=self._generator, device=self.device).to(torch.int32)


def self_check(
    device: torch.device,
    shape: CheckShape | None = None,
    *,
    families: Sequence[str] | None = None,
    thorough: bool = False,
    limit_s: float = 120.0,
) -> tuple[CheckRow, ...]:
    """Check what would run on `device`, and switch off what is wrong.

    Args:
        device: where the engine will run.
        shape: its sizes and types.
        families: only these; all if None.
        thorough: then check other models' shapes and odd ones too; what fails there is told and not switched off.
        limit_s: no odd shape is begun after so many seconds. Each compiles kernels that nothing else here needs.
    """
    started = time.perf_counter()
    rows = [_tried(check, device) for check in _wanted(checks(device, shape or CheckShape()), families)]
    if thorough:
        from trtkit.kernels import check_odd

        for check in _wanted(check_odd.checks(device), families):
            if time.perf_counter() - started > limit_s:
                break
            rows.append(_tried(check, device))
    return tuple(rows)


def _wanted(offered: Iterable[Check], families: Sequence[str] | None) -> Iterator[Check]:
    """Those of the named families; asked for one by one, so what was just switched off is left out."""
    for check in offered:
        if (families is None or check.family in families) and check.family not in disabled():
            yield check


def checks(device: torch.device, shape: CheckShape) -> Iterator[Check]:
    """All checks, those of the costliest families to lose first."""
    from trtkit.kernels import check_fused, check_matmul, check_paged

    yield from check_matmul.checks(device, shape)
    yield from check_paged.checks(device, shape)
    yield from check_fused.checks(device, shape)


def _tried(check: Check, device: torch.device) -> CheckRow:
    started = time.perf_counter()
    error, message = None, ""
    try:
        error = max(_error(found, expected) for found, expected in check.run())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except failures() as failure:
        message = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
    ok = error is not None and error <= check.bound
    if not ok:
        what = message or f"an error of {error:.2g} where {check.bound:.2g} is allowed"
        message = f"{check.name}: {what}"
        if check.on_failure is None or not check.on_failure():
            disable(check.family, message)
    return CheckRow(
        family=check.family, name=check.name, error=error, bound=check.bound, ok=ok, message=message,
        seconds=time.perf_counter() - started,
    )  # fmt: skip


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest difference as a share of the largest right value; infinite where numbers are not finite alike."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.to(torch.float64), expected.to(torch.float64)
    alike = torch.where(expected.isfinite(), 0.0, expected).nan_to_num(1.5, 2.5, -2.5) == torch.where(
        found.isfinite(), 0.0, found
    ).nan_to_num(1.5, 2.5, -2.5)
    if not bool(alike.all()):
        return float("inf")
    finite = expected.isfinite()
    size = float(expected[finite].abs().max()) if bool(finite.any()) else 0.0
    difference = float((found - expected)[finite].abs().max()) if bool(finite.any()) else 0.0
    return difference / size if size else difference


def failures() -> tuple[type[Exception], ...]:
    """What a kernel that does not work here raises, from the compiler, the driver or torch."""
    known: tuple[type[Exception], ...] = (
        RuntimeError, ValueError, TypeError, AttributeError, AssertionError, LookupError, NotImplementedError, OSError,
    )  # fmt: skip
    if importlib.util.find_spec("triton") is None:
        return known
    from triton.errors import TritonError

    return (*known, TritonError)
