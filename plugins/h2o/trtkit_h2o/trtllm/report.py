"""What a worker has evicted, told through a small file that is replaced whenever a number changes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

from trtkit_h2o.trtllm.tracked import Counters


class CounterFile:
    """`rank{N}.json` in a directory that somebody reads; without a directory nothing is written.

    A file is enough and honest: TensorRT-LLM's statistics have fixed fields, and its workers take no calls of ours. It is
    renamed into place, so a reader sees old or new numbers. A reader that has gone away does not stop the worker.
    """

    def __init__(self, directory: str, rank: int) -> None:
        self._path = Path(directory) / f"rank{rank}.json" if directory else None
        self._told: dict[str, int] | None = None

    def tell(self, counters: Counters) -> None:
        """Write if anything has changed since the last time."""
        numbers = dataclasses.asdict(counters)
        if self._path is None or numbers == self._told:
            return
        self._told = numbers
        beside = self._path.with_suffix(".tmp")
        with contextlib.suppress(OSError):
            beside.write_text(json.dumps(numbers), encoding="utf-8")
            beside.replace(self._path)
