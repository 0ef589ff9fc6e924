"""From what a person names (records, a directory of them, an engine) to the sides of a comparison."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from trtkit.quality.sides import Side
from trtkit.report.records import Records, load_records
from trtkit.spec.bundle import MANIFEST_NAME, open_bundle
from trtkit.spec.errors import InputError, UsageError
from trtkit.spec.result import EngineRef


def load_sides(names: Sequence[str], results: Path) -> tuple[Side, ...]:
    """Find each side's records.

    A name is an engine directory (its records are looked up in `results` by the engine's digest), a record file, a
    directory with one engine's records, or the name or label of an engine in `results`.

    Raises:
        UsageError: a name is given twice, fits several engines or none.
        InputError: a record is damaged, or an engine has none.
    """
    if len(names) < 2:
        raise UsageError("give at least two: engine directories, record files, or directories of records")
    return tuple(_side(name, results) for name in names)


def _side(name: str, results: Path) -> Side:
    path = Path(name)
    if (path / MANIFEST_NAME).is_file():
        return _of_engine(path, results)
    if path.exists():
        return _only_engine(name, _sound([path]))
    return _named(name, results)


def _sound(paths: Sequence[Path]) -> Records:
    """Records, all of which could be read: a comparison over part of them would be a different one."""
    records = load_records(paths)
    if records.problems:
        raise InputError(records.problems[0])
    return records


def _of_engine(path: Path, results: Path) -> Side:
    bundle = open_bundle(path)
    digest = bundle.manifest.digest
    if not results.exists():
        raise InputError(
            f"{path}: has no records, {results} does not exist; run `trtkit bench` and `trtkit eval` on it"
        )
    records = _sound([results])
    engines = [e for e in _engines(records) if e.digest == digest]
    if not engines:
        raise InputError(
            f"{path}: no record of this engine ({digest}) in {results}; run `trtkit bench` or `trtkit eval`"
        )
    return _take(engines[0], records)


def _only_engine(name: str, records: Records) -> Side:
    engines = _engines(records)
    if len(engines) > 1:
        found = ", ".join(engine.label or engine.name for engine in engines)
        raise UsageError(
            f"{name}: holds records of {len(engines)} engines ({found}); name one of them with --results {name}"
        )
    return _take(engines[0], records)


def _named(name: str, results: Path) -> Side:
    if not results.exists():
        raise InputError(f"{name}: no such file or directory, and no results in {results}")
    records = _sound([results])
    engines = [e for e in _engines(records) if name in (e.name, e.label, e.digest)]
    if len(engines) == 1:
        return _take(engines[0], records)
    known = [text for e in _engines(records) for text in dict.fromkeys((e.name, e.label)) if text]
    if engines:
        raise UsageError(f"{name}: {len(engines)} engines in {results} are called so; name one by its directory")
    near = difflib.get_close_matches(name, known, n=3) or known
    raise InputError(f"{name}: no such file, and no engine in {results} is called so; there are {', '.join(near)}")


def _engines(records: Records) -> list[EngineRef]:
    """One per digest and label, in the order found."""
    found: dict[tuple[str, str], EngineRef] = {}
    for engine in (*(r.engine for r in records.bench), *(r.engine for r in records.quality)):
        found.setdefault((engine.digest, engine.label), engine)
    labelled = {digest for digest, label in found if label}
    return [e for (digest, label), e in found.items() if label or digest not in labelled]


def _take(engine: EngineRef, records: Records) -> Side:
    """All records of this engine; those without a label belong to every label of the same engine."""

    def ours(other: EngineRef) -> bool:
        return other.digest == engine.digest and other.label in ("", engine.label)

    return Side(
        engine=engine,
        bench=tuple(r for r in records.bench if ours(r.engine)),
        quality=tuple(r for r in records.quality if ours(r.engine)),
    )
