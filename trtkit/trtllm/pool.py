"""The block pool as TensorRT-LLM's iteration statistics tell it."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any, Protocol

from trtkit.spec.engine import KVStats
from trtkit.spec.errors import EngineError
from trtkit.spec.plan import BuildPlan
from trtkit.trtllm.guesses import guess_counts
from trtkit.trtllm.lower import kv_bytes_per_token

_POLL_S = 0.2
_FIRST_S = 30.0


class HasStats(Protocol):
    """The part of `LLM` that is asked."""

    def get_stats(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        """Statistics of the iterations since the last call."""


class PoolWatch:
    """Reads every iteration's statistics in a thread, so that peaks are of iterations and not of samples."""

    def __init__(self, llm: HasStats, plan: BuildPlan) -> None:
        self._llm = llm
        self._plan = plan
        self._lock = threading.Lock()
        self._stats: KVStats | None = None
        self._guesses: tuple[int | None, int | None] = (0, 0) if plan.speculation is None else (None, None)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trtllm-stats", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when the first statistics are there.

        Raises:
            EngineError: none came; the pool's size would be unknown.
        """
        deadline = time.monotonic() + _FIRST_S
        while self._stats is None:
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{self._plan.name}: TensorRT-LLM reported no KV-cache statistics within {_FIRST_S:g} s; "
                    "this release names them differently (see docs/tensorrt-llm.md)"
                )
            time.sleep(0.01)

    def stats(self) -> KVStats:
        """The latest state, with peaks since `forget_peaks`."""
        with self._lock:
            assert self._stats is not None
            return self._stats

    def forget_peaks(self) -> None:
        """Start the peaks anew from now."""
        with self._lock:
            assert self._stats is not None
            self._stats = replace(self._stats, blocks_peak=0, requests_peak=0, preemptions=0)

    def close(self) -> None:
        """Stop asking."""
        self._stop.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                entries = self._llm.get_stats(timeout=_POLL_S)
            except (RuntimeError, TimeoutError, OSError):
                return
            for entry in entries:
                self._note(entry)
            if not entries:
                self._stop.wait(_POLL_S)

    def _note(self, entry: dict[str, Any]) -> None:
        cache = entry.get("kvCacheStats") or {}
        if "maxNumBlocks" not in cache:
            return
        batching = entry.get("inflightBatchingStats") or {}
        tokens_per_block = int(cache.get("tokensPerBlock") or self._plan.limits.tokens_per_block)
        used, running = int(cache.get("usedNumBlocks", 0)), int(entry.get("numActiveRequests", 0))
        with self._lock:
            before = self._stats
            self._guesses = guess_counts(entry, self._guesses)
            self._stats = KVStats(
                tokens_per_block=tokens_per_block,
                block_bytes=kv_bytes_per_token(self._plan) * tokens_per_block,
                blocks_total=int(cache["maxNumBlocks"]),
                blocks_used=used,
                blocks_peak=max(used, before.blocks_peak if before else 0),
                requests_running=running,
                requests_waiting=int(entry.get("numQueuedRequests", 0)),
                requests_peak=max(running, before.requests_peak if before else 0),
                preemptions=(before.preemptions if before else 0) + int(batching.get("numPausedRequests", 0)),
                draft_tokens=self._guesses[0],
                accepted_tokens=self._guesses[1],
                prompt_tokens_reused=self._tokens_reused(cache, tokens_per_block),
                blocks_cached=None if self._plan.limits.enable_block_reuse else 0,
            )

    def _tokens_reused(self, cache: dict[str, Any], tokens_per_block: int) -> int | None:
        """Blocks found again since the engine started, all of them whole; how many wait to be is not told."""
        if not self._plan.limits.enable_block_reuse:
            return 0
        blocks = cache.get("reusedBlocks")
        return None if blocks is None else int(blocks) * tokens_per_block
