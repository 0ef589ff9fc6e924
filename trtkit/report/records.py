"""Finds and reads record files. A damaged one is named and left out; the rest is still reported."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trtkit.spec.codec import read_record
from trtkit.spec.errors import InputError, TrtkitError
from trtkit.spec.result import BENCH_KIND, QUALITY_KIND, BenchResult, QualityResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Records:
    """What was found. `problems` holds one line per file that could not be read."""

    bench: tuple[BenchResult, ...] = ()
    quality: tuple[QualityResult, ...] = ()
    problems: tuple[str, ...] = ()


def load_records(paths: Sequence[Path]) -> Records:
    """Read the given record files and every record under the given directories.

    In a directory, JSON that is no bench or quality record (a report, a manifest, a summary) is passed over.

    Raises:
        InputError: a path does not exist, or nothing readable was found at all.
    """
    bench: list[BenchResult] = []
    quality: list[QualityResult] = []
    problems: list[str] = []
    for file in _files(paths):
        try:
            record = _read(file, named=file in paths)
        except TrtkitError as error:
            problems.append(_naming(file, error))
            continue
        if isinstance(record, BenchResult):
            bench.append(record)
        elif isinstance(record, QualityResult):
            quality.append(record)
    if not bench and not quality:
        reason = "; ".join(problems) or f"no bench or quality record in {', '.join(str(p) for p in paths)}"
        raise InputError(f"nothing to report: {reason}")
    return Records(bench=tuple(bench), quality=tuple(quality), problems=tuple(problems))


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    seen: set[Path] = set()
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file or directory; give record files or a directory that holds them")
        for file in sorted(path.rglob("*.json")) if path.is_dir() else [path]:
            if file.resolve() not in seen and not file.name.startswith("."):
                seen.add(file.resolve())
                yield file


def _read(file: Path, *, named: bool) -> BenchResult | QualityResult | None:
    """The record in `file`; None where a searched directory holds JSON of another kind."""
    kind = _kind(file)
    if kind == BENCH_KIND:
        return read_record(file, BENCH_KIND, BenchResult)
    if kind == QUALITY_KIND:
        return read_record(file, QUALITY_KIND, QualityResult)
    if named:
        raise InputError(f"{file}: is no bench or quality record (its kind is {kind!r})")
    return None


def _kind(file: Path) -> object:
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror or error})") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file}: damaged record, not JSON ({error}); measure that cell again") from None
    except RecursionError:
        raise InputError(f"{file}: damaged record, nested too deeply") from None
    return body.get("kind") if isinstance(body, dict) else None


def _naming(file: Path, error: TrtkitError) -> str:
    """One line that starts with the whole path, whatever the codec called the file."""
    text = " ".join(str(error).split())
    if text.startswith(str(file)):
        return text
    return f"{file}: damaged record: {text.removeprefix(file.name).lstrip('.: ')}"
