"""What a policy has evicted in TensorRT-LLM's workers, told through one small file a rank.

TensorRT-LLM's statistics have fixed fields and none for this. An adapter's workers therefore leave `rank{N}.json` in a
directory of the engine's, replaced as a whole whenever a number changes: `evictions`, `tokens_evicted` and `blocks_freed`
since they started. Every rank drops as many tokens, so rank 0's file speaks for all; it runs where the engine was opened.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

from trtkit.spec.engine import KVStats

NAMES = ("evictions", "tokens_evicted", "blocks_freed")


class EvictionCounters:
    """The directory and its reader."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="trtkit-evictions-")

    @property
    def directory(self) -> Path:
        """Where workers write."""
        return Path(self._directory.name)

    def added_to(self, stats: KVStats) -> KVStats:
        """`stats` with what rank 0 last reported; None for each number as long as it has said nothing."""
        try:
            told = json.loads((self.directory / "rank0.json").read_text(encoding="utf-8"))
            numbers = {name: int(told[name]) for name in NAMES}
        except (OSError, ValueError, KeyError, TypeError):
            return unknown(stats)
        return replace(stats, **numbers)

    def close(self) -> None:
        """Remove the directory; again is harmless."""
        self._directory.cleanup()


def unknown(stats: KVStats) -> KVStats:
    """`stats` of a runtime that evicts and does not tell."""
    return replace(stats, evictions=None, tokens_evicted=None, blocks_freed=None)
