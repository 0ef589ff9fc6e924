"""Planned levers from a JSON file: `[{"name", "gpu", "num_gpus", "tok_s", "change", "friction"}, ...]`."""

from __future__ import annotations

import json
from pathlib import Path

from trtkit.quality.advice import PlannedLever
from trtkit.spec.codec import from_plain
from trtkit.spec.errors import InputError


def read_planned(path: Path | None) -> tuple[PlannedLever, ...]:
    """The levers of a file, none without one.

    Raises:
        InputError: missing, not JSON, or a lever is malformed (its place is named).
    """
    if path is None:
        return ()
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file of planned levers") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(rows, list):
        raise InputError(f"{path}: a list of levers is expected")
    return tuple(from_plain(PlannedLever, row, f"{path}[{i}]") for i, row in enumerate(rows))
