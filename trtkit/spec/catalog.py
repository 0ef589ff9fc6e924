"""The shipped catalog of GPUs and models, and the user's own additions to it.

`gpu_spec("h100")`, `model_preset("llama-3-70b")`: names, aliases and hub ids match whatever their case and separators.
A user's file has the form of the shipped ones (`[gpus.NAME]` and `[models.NAME]` tables); its entries win over shipped
ones of the same name. Unknown keys are refused, so a misspelled figure is an error and not a missing one.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from trtkit.spec.codec import from_plain
from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError, UnsupportedError, UsageError
from trtkit.spec.gpu import GpuSpec
from trtkit.spec.model import ModelSpec
from trtkit.spec.units import GB, MIB, TERA

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")
_DATA = Path(__file__).parent / "data"
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_SUGGESTIONS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuEntry:
    """One `[gpus.NAME]` table. `sources` has a text for each figure, or "all" for those without one of their own.

    Without `memory_mib` the entry is this machine: its memory is asked of the operating system.
    """

    title: str
    memory_bandwidth_gb_s: float
    peak_tflops: Mapping[DType, float]
    memory_mib: float | None = None
    sm: int = 0
    link_gb_s: float | None = None
    tdp_w: float | None = None
    aliases: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPreset:
    """One `[models.NAME]` table: a shape, the hub ids that have it (the first is the default), and its source."""

    spec: ModelSpec
    hub_ids: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    published_params: int | None = None
    source: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalog:
    """Everything known, by canonical name."""

    gpus: Mapping[str, GpuEntry]
    models: Mapping[str, ModelPreset]


def gpu_spec(name: str, *, catalogs: Sequence[Path] = ()) -> GpuSpec:
    """Look up a device.

    Raises:
        UsageError: no such device; the message suggests near misses and lists all.
        InputError: a file in `catalogs` cannot be read or has a wrong entry.
    """
    gpus = load_catalog(*catalogs).gpus
    key = _find(name, gpus, lambda entry: entry.aliases, "GPU")
    return _gpu_from_entry(key, gpus[key])


def model_preset(name: str, *, catalogs: Sequence[Path] = ()) -> ModelSpec:
    """Look up a model's shape by name, alias or hub id.

    Raises:
        UsageError: no such model; the message suggests near misses.
        InputError: a file in `catalogs` cannot be read or has a wrong entry.
    """
    return model_entry(name, catalogs=catalogs).spec


def model_hub_id(name: str, *, catalogs: Sequence[Path] = ()) -> str:
    """The hub id that `name` means: itself where it is one of a preset's, else the preset's first.

    Raises:
        UsageError: no such model, or the preset names no hub id.
    """
    entry = model_entry(name, catalogs=catalogs)
    wanted = _normalised(name)
    for hub_id in entry.hub_ids:
        if wanted in _spellings((hub_id,)):
            return hub_id
    if not entry.hub_ids:
        raise UsageError(f"model {entry.spec.name!r} has no hub id in the catalog; give its directory")
    return entry.hub_ids[0]


def model_entry(name: str, *, catalogs: Sequence[Path] = ()) -> ModelPreset:
    """Like `model_preset`, with hub ids and source."""
    models = load_catalog(*catalogs).models
    return models[_find(name, models, lambda entry: (*entry.aliases, *entry.hub_ids), "model")]


def load_catalog(*paths: Path) -> Catalog:
    """The shipped catalog with the entries of `paths` over it, later files last.

    Raises:
        InputError: a file cannot be read, is not TOML, or has an unknown key or an impossible figure.
    """
    catalog = _shipped()
    for path in paths:
        own = _read(Path(path))
        catalog = Catalog(gpus={**catalog.gpus, **own.gpus}, models={**catalog.models, **own.models})
    return catalog


@cache
def _shipped() -> Catalog:
    return Catalog(gpus=_read(_DATA / "gpus.toml").gpus, models=_read(_DATA / "models.toml").models)


def _read(path: Path) -> Catalog:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a catalog (TOML expected): {error}") from None
    unknown = sorted(set(data) - {"gpus", "models"})
    if unknown:
        raise InputError(f"{path}: unknown table {unknown[0]!r}; a catalog has [gpus.NAME] and [models.NAME]")
    return Catalog(
        gpus={name: _gpu_entry(path, name, table) for name, table in _tables(path, data, "gpus")},
        models={name: _preset(path, name, table) for name, table in _tables(path, data, "models")},
    )


def _tables(path: Path, data: Mapping[str, Any], section: str) -> Iterable[tuple[str, dict[str, Any]]]:
    tables = data.get(section, {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise InputError(f"{path}: [{section}] must hold tables, one [{section}.NAME] each")
    return tables.items()


def _gpu_entry(path: Path, name: str, table: dict[str, Any]) -> GpuEntry:
    where = f"{path.name}: gpus.{name}"
    entry = from_plain(GpuEntry, {"sources": {"all": f"user catalog {path.name}"}, **table}, where)
    figures: dict[str, float | None] = {
        "memory_mib": entry.memory_mib,
        "memory_bandwidth_gb_s": entry.memory_bandwidth_gb_s,
        "link_gb_s": entry.link_gb_s,
        "tdp_w": entry.tdp_w,
    }
    figures |= {f"peak_tflops.{dtype.value}": value for dtype, value in entry.peak_tflops.items()}
    for key, value in figures.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InputError(f"{where}.{key}: is {value}, must be above 0")
    if not entry.peak_tflops:
        raise InputError(f"{where}.peak_tflops: needs at least one type, for example fp16 = 312")
    stray = sorted(set(entry.sources) - set(figures) - {"all"})
    if stray:
        raise InputError(f"{where}.sources: {stray[0]!r} is no figure; figures are {', '.join(figures)}")
    return entry


def _preset(path: Path, name: str, table: dict[str, Any]) -> ModelPreset:
    beside = {f.name for f in fields(ModelPreset)} - {"spec"}
    shape = {key: value for key, value in table.items() if key not in beside}
    rest = {key: value for key, value in table.items() if key in beside}
    where = f"{path.name}: models.{name}"
    from_plain(ModelSpec, {"name": name, **shape}, where)  # names a wrong key by its path in the file
    return from_plain(
        ModelPreset, {"source": f"user catalog {path.name}", **rest, "spec": {"name": name, **shape}}, where
    )


def _gpu_from_entry(name: str, entry: GpuEntry) -> GpuSpec:
    def source(key: str) -> str:
        return entry.sources.get(key, entry.sources.get("all", ""))

    memory_bytes = host_memory_bytes() if entry.memory_mib is None else round(entry.memory_mib * MIB)
    sources = {
        "memory_bytes": "this machine's operating system" if entry.memory_mib is None else source("memory_mib"),
        "memory_bandwidth_bytes_s": source("memory_bandwidth_gb_s"),
        "link_bytes_s": source("link_gb_s"),
        "tdp_w": source("tdp_w"),
        **{f"peak_flops.{dtype.value}": source(f"peak_tflops.{dtype.value}") for dtype in entry.peak_tflops},
    }
    known = {"link_bytes_s": entry.link_gb_s, "tdp_w": entry.tdp_w}
    return GpuSpec(
        name=name,
        title=entry.title,
        memory_bytes=memory_bytes,
        memory_bandwidth_bytes_s=entry.memory_bandwidth_gb_s * GB,
        peak_flops={dtype: value * TERA for dtype, value in entry.peak_tflops.items()},
        sm=entry.sm,
        link_bytes_s=None if entry.link_gb_s is None else entry.link_gb_s * GB,
        tdp_w=entry.tdp_w,
        sources={key: text for key, text in sources.items() if known.get(key, 0) is not None},
    )


def host_memory_bytes() -> int:
    """RAM this process may use: the machine's, or its control group's limit where that is lower.

    Raises:
        UnsupportedError: the operating system does not say.
    """
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        raise UnsupportedError(
            "cannot tell this machine's memory; name it in a catalog file (memory_mib under [gpus.cpu])"
        ) from None
    try:
        limit = int(_CGROUP_LIMIT.read_text())
    except (OSError, ValueError):
        return physical
    return min(physical, limit)


def _find(name: str, table: Mapping[str, T], aliases: Callable[[T], Sequence[str]], what: str) -> str:
    wanted = _normalised(name)
    by_spelling: dict[str, str] = {}
    for key, entry in table.items():
        by_spelling.update(dict.fromkeys(_spellings(aliases(entry)), key))
    by_spelling.update({_normalised(key): key for key in table})
    if wanted in by_spelling:
        return by_spelling[wanted]
    near = difflib.get_close_matches(wanted, by_spelling, n=2 * _SUGGESTIONS, cutoff=0.5)
    likely = list(dict.fromkeys(by_spelling[spelling] for spelling in near))[:_SUGGESTIONS]
    hint = f"did you mean {' or '.join(likely)}? " if likely else ""
    raise UsageError(f"unknown {what} {name[:80]!r}: {hint}Known are {', '.join(table)}")


def _normalised(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.lower())


def _spellings(names: Sequence[str]) -> set[str]:
    """Each name, and a hub id's part after the slash."""
    return {_normalised(part) for name in names for part in (name, name.rpartition("/")[2])}
