"""Numbers out of a GPU run's records, as their JSON has them. Nothing is computed but shares of floors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def load(path: Path) -> dict[str, Any] | None:
    """A record's content, None where there is none or it is damaged (a killed writer leaves the one before)."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(body, dict):
        return None
    data = body.get("data", body)
    return data if isinstance(data, dict) else None


def cells_of(record: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Each row with each of its cells."""
    for row in record.get("rows", ()):
        for cell in row.get("cells", ()):
            yield row, cell


def stat(cell: Mapping[str, Any], key: str, name: str = "p50") -> float | None:
    """One statistic of a cell's metric."""
    result = cell.get("result") or {}
    return ((result.get("metrics") or {}).get(key, {}).get("stats", {}).get(name) or {}).get("value")


def spread(cell: Mapping[str, Any], key: str, name: str = "p50") -> str:
    """Lowest to highest of the repeats, empty below two."""
    result = cell.get("result") or {}
    found = (result.get("metrics") or {}).get(key, {}).get("stats", {}).get(name) or {}
    repeats = found.get("repeats") or []
    return f"{min(repeats):.4g}-{max(repeats):.4g}" if len(repeats) > 1 else ""


def number(cell: Mapping[str, Any], which: str, key: str) -> float | None:
    """One of a floor's or a prediction's numbers."""
    return (((cell.get(which) or {}).get(key)) or {}).get("value")


def share(cell: Mapping[str, Any], which: str, key: str, measured: float | None) -> float | None:
    """Floor over measured time; 1 is the limit."""
    least = number(cell, which, key)
    return least / measured if least and measured else None


def peak(cell: Mapping[str, Any], name: str) -> int | None:
    """Largest value of a pool counter over the repeats."""
    repeats = ((cell.get("result") or {}).get("repeats")) or []
    return max((repeat["kv"][name] for repeat in repeats if repeat["kv"][name] is not None), default=None)
