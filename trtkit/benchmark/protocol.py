"""Protocol files: TOML that names workloads, with lists where a grid is meant; and what flags change in them.

A file has `name`, `description`, `repeats`, optional `[defaults]` with keys of `Workload`, and `[[workload]]` tables
of the same keys, in which `isl`, `osl`, `concurrency` and `request_rate` may be lists.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtkit.benchmark.checks import MIN_ROUNDS
from trtkit.spec.codec import from_plain
from trtkit.spec.errors import InputError, TrtkitError, UsageError
from trtkit.spec.workload import SLO, Protocol, Workload

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_PROTOCOL = "token-tax"
_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "data" / "bench" / "protocols", _PACKAGE.parent / "bench" / "protocols")
_KEYS = ("name", "description", "repeats", "defaults", "workload")
_AXES = ("isl", "osl", "concurrency", "request_rate")


def protocol_files() -> dict[str, Path]:
    """The protocols that come with trtkit, by name."""
    return {path.stem: path for folder in _FOLDERS for path in sorted(folder.glob("*.toml"))}


def load_protocol(name_or_path: str) -> Protocol:
    """A protocol by its name, or from a TOML file.

    Raises:
        UsageError: no such name; the message lists those there are.
        InputError: the file is missing, not TOML, or has unknown or wrong keys.
    """
    known = protocol_files()
    path = known.get(name_or_path, Path(name_or_path))
    if path.suffix != ".toml":
        raise UsageError(f"unknown protocol {name_or_path!r}: known are {', '.join(known)}, or give a TOML file")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such protocol file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: not a TOML file: {error}") from None
    return parse_protocol(data, str(path))


def parse_protocol(data: Mapping[str, Any], where: str) -> Protocol:
    """A protocol from a TOML document; see the module's text."""
    unknown = sorted(set(data) - set(_KEYS))
    if unknown:
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}")
    tables = data.get("workload", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables) or not tables:
        raise InputError(f"{where}: needs at least one [[workload]] table")
    try:
        workloads = [
            from_plain(Workload, point, f"workload[{index}]")
            for index, table in enumerate(tables)
            for point in _grid({**data.get("defaults", {}), **table})
        ]
        plain = {key: data[key] for key in ("name", "description", "repeats") if key in data}
        return replace(from_plain(_Head, plain, "protocol"), workloads=tuple(workloads)).protocol()
    except TrtkitError as error:
        raise InputError(f"{where}: {error}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Head:
    """The file's scalar keys, for the codec to check."""

    name: str
    repeats: int
    description: str = ""
    workloads: tuple[Workload, ...] = ()

    def protocol(self) -> Protocol:
        return Protocol(name=self.name, repeats=self.repeats, description=self.description, workloads=self.workloads)


def _grid(table: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    axes = {key: table[key] for key in _AXES if isinstance(table.get(key), list)}
    if "request_rate" in table and "concurrency" not in table:
        table = {**table, "concurrency": None}
    for values in itertools.product(*axes.values()):
        yield {**table, **dict(zip(axes, values, strict=True))}


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """What flags replace in a protocol; None leaves it. A list replaces that axis of the grid."""

    concurrency: Sequence[int] | None = None
    isl: Sequence[int] | None = None
    osl: Sequence[int] | None = None
    request_rate: Sequence[float] | None = None
    num_requests: int | None = None
    warmup_requests: int | None = None
    dataset: str | None = None
    seed: int | None = None
    shared_prefix_tokens: int | None = None
    slo: SLO | None = None
    repeats: int | None = None


def changed(protocol: Protocol, changes: Changes) -> Protocol:
    """The protocol with the flags' values; its name says so if anything that is measured differs.

    Where a new concurrency would leave fewer than three rounds of requests, their number is raised, unless
    `num_requests` is given.
    """
    workloads = tuple(dict.fromkeys(itertools.chain.from_iterable(_variants(w, changes) for w in protocol.workloads)))
    distinct = {(w.isl, w.osl, w.concurrency, w.request_rate, w.shared_prefix_tokens): w for w in reversed(workloads)}
    kept = tuple(w for w in workloads if w in distinct.values())
    result = replace(protocol, workloads=kept, repeats=changes.repeats or protocol.repeats)
    if result == protocol:
        return protocol
    return replace(result, name=f"{protocol.name} (modified)")


def _variants(workload: Workload, changes: Changes) -> Iterator[Workload]:
    scalars = {
        name: value
        for name in ("num_requests", "warmup_requests", "dataset", "seed", "slo")
        if (value := getattr(changes, name)) is not None
    }
    shared = workload.shared_prefix_tokens if changes.shared_prefix_tokens is None else changes.shared_prefix_tokens
    workload = replace(workload, **scalars, shared_prefix_tokens=0)
    isls, osls = changes.isl or (workload.isl,), changes.osl or (workload.osl,)
    for isl, osl, (concurrency, rate) in itertools.product(isls, osls, _loads(workload, changes)):
        requests = workload.num_requests
        if changes.num_requests is None and rate is None and concurrency is not None:
            requests = max(requests, MIN_ROUNDS * concurrency)
        load = replace(workload, isl=isl, osl=osl, concurrency=concurrency, request_rate=rate, num_requests=requests)
        yield replace(load, shared_prefix_tokens=shared)


def _loads(workload: Workload, changes: Changes) -> list[tuple[int | None, float | None]]:
    """Pairs of concurrency and rate; an infinite rate is everything at once, a closed loop of all requests."""
    if changes.request_rate is None:
        caps: Sequence[int | None] = changes.concurrency or (workload.concurrency,)
        return [(cap, workload.request_rate) for cap in caps]
    caps = changes.concurrency or (None,)
    pairs = itertools.product(caps, changes.request_rate)
    return [(cap or workload.num_requests, None) if math.isinf(rate) else (cap, rate) for cap, rate in pairs]


def parse_slo(text: str) -> SLO:
    """Read `ttft:200,tpot:50,e2el:5000`, milliseconds.

    Raises:
        UsageError: an unknown metric or no number.
    """
    names = {"ttft": "ttft_ms", "tpot": "tpot_ms", "e2e": "e2e_ms", "e2el": "e2e_ms"}
    limits: dict[str, float] = {}
    for part in filter(None, text.replace(" ", ",").split(",")):
        key, _, value = part.partition(":")
        if key not in names:
            raise UsageError(f"--goodput {text!r}: unknown metric {key!r}; allowed are ttft, tpot, e2el (in ms)")
        limits[names[key]] = _positive(value, f"--goodput {text!r}")
    return SLO(**limits)


def parse_numbers(text: str, flag: str) -> list[int]:
    """Read `1,8,32`: integers of at least 1."""
    numbers = []
    for part in text.split(","):
        if not part.strip().isdigit() or int(part) < 1:
            raise UsageError(f"{flag} {text!r}: {part.strip()!r} is not a whole number of at least 1 (e.g. 1,8,32)")
        numbers.append(int(part))
    return numbers


def parse_rates(text: str) -> list[float]:
    """Read `0.5,2,inf`: requests per second."""
    return [_positive(part, f"--request-rate {text!r}") for part in text.split(",")]


def _positive(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise UsageError(f"{where}: {text.strip()!r} is not a number above 0")
    return value
