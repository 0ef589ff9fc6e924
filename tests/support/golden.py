"""Golden files: compared byte for byte, rewritten only with UPDATE_GOLDEN=1 in the environment."""

from __future__ import annotations

import os
from pathlib import Path


def check_golden(path: Path, text: str) -> None:
    """`text` must be what `path` holds."""
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"{path.name} is missing; make it with UPDATE_GOLDEN=1 and review it"
    assert text == path.read_text(encoding="utf-8")
