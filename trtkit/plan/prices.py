"""The price book: dated, sourced prices from a TOML that a user can replace."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtkit.spec.codec import from_plain
from trtkit.spec.errors import InputError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the same module under its older name
    import tomli as tomllib

BUILT_IN = Path(__file__).with_name("prices.toml")
KINDS = ("cloud", "reserved", "onprem")


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuPrice:
    """What one GPU costs per hour at one vendor. `date` is when, or "unknown"."""

    gpu: str
    kind: str
    name: str
    usd_per_gpu_h: float
    source: str
    date: str

    def __post_init__(self) -> None:
        if self.usd_per_gpu_h <= 0:
            raise InputError(f"price of {self.gpu} ({self.name}) is {self.usd_per_gpu_h} USD/h, must be above 0")
        if self.kind not in ("cloud", "reserved"):
            raise InputError(f"price of {self.gpu} ({self.name}): kind {self.kind!r} is not cloud or reserved")


@dataclass(frozen=True, kw_only=True, slots=True)
class OnPrem:
    """An owned GPU: purchase spread over `amortise_months`, power at `power_overhead` times the board's, upkeep."""

    capex_usd: float
    amortise_months: int
    power_overhead: float
    usd_per_kwh: float
    maintenance_usd_month: float
    source: str
    date: str

    def __post_init__(self) -> None:
        if self.amortise_months < 1 or self.power_overhead < 1:
            raise InputError("on-prem prices: amortise_months and power_overhead must be at least 1")
        if min(self.capex_usd, self.usd_per_kwh, self.maintenance_usd_month) < 0:
            raise InputError("on-prem prices: no amount may be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiPrice:
    """What a hosted model asks per million tokens; `basis` says which tokens."""

    name: str
    usd_per_million: float
    basis: str
    source: str
    date: str

    def __post_init__(self) -> None:
        if self.usd_per_million <= 0:
            raise InputError(f"API price of {self.name} is {self.usd_per_million}, must be above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class PriceBook:
    """Every price a command knows."""

    gpu: tuple[GpuPrice, ...]
    onprem: OnPrem
    api: tuple[ApiPrice, ...] = ()

    def gpu_price(self, gpu: str, *, kind: str = "cloud", name: str | None = None) -> GpuPrice:
        """The hourly price of a catalog GPU.

        Raises:
            UsageError: no such price; the message says which there are.
        """
        found = self.find(gpu, kind=kind, name=name)
        if found is None:
            known = sorted({f"{p.gpu}/{p.kind}/{p.name}" for p in self.gpu})
            asked = f"{gpu}/{kind}" + (f"/{name}" if name else "")
            raise UsageError(
                f"no price for {asked}: give --usd-per-gpu-h, or a --prices file with it (known: {', '.join(known)})"
            )
        return found

    def find(self, gpu: str, *, kind: str = "cloud", name: str | None = None) -> GpuPrice | None:
        """The first matching price, None without one."""
        matches = (p for p in self.gpu if p.gpu == gpu and p.kind == kind and name in (None, p.name))
        return next(matches, None)


def load_prices(path: Path | None = None) -> PriceBook:
    """The built-in book, overlaid with a user's file: its GPU and API entries come first, `[onprem]` keys replace ours.

    Raises:
        InputError: the file is missing, not TOML, or has an unknown key or an absurd value; the message names it.
    """
    built_in = _read(BUILT_IN)
    if path is None:
        return from_plain(PriceBook, built_in, BUILT_IN.name)
    user = _read(path)
    unknown = sorted(set(user) - set(built_in))
    if unknown:
        raise InputError(f"{path}: unknown section {unknown[0]!r}; known are {', '.join(built_in)}")
    try:
        merged = {
            "gpu": [*user.get("gpu", []), *built_in["gpu"]],
            "onprem": {**built_in["onprem"], **user.get("onprem", {})},
            "api": [*user.get("api", []), *built_in["api"]],
        }
    except TypeError:
        raise InputError(f"{path}: gpu and api are lists of tables ([[gpu]]), onprem is one table ([onprem])") from None
    return from_plain(PriceBook, merged, path.name)


def _read(path: Path) -> Mapping[str, Any]:
    try:
        loaded: Mapping[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the prices ({error.strerror or error})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML: {error}") from None
    return loaded
