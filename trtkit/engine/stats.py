"""What an engine tells of itself: its sizes when it is open, its pool at a moment."""

from __future__ import annotations

import os

from trtkit.engine.observer import EvictionCounters
from trtkit.engine.paged_cache import PagedCache
from trtkit.engine.runner import Runner
from trtkit.engine.scheduler import Scheduler
from trtkit.engine.speculation import Speculator
from trtkit.engine.weights import ModelWeights
from trtkit.spec.engine import EngineInfo, KVStats
from trtkit.spec.kv import KVPolicySpec
from trtkit.spec.plan import Limits
from trtkit.spec.speculation import SpeculationSpec


def engine_info(  # noqa: PLR0913, PLR0917 - an engine's parts, each told of
    weights: ModelWeights,
    limits: Limits,
    cache: PagedCache,
    policy: KVPolicySpec,
    speculation: SpeculationSpec | None,
    runner: Runner,
    device: str,
) -> EngineInfo:
    """Sizes and limits of an engine made of these parts, in this process."""
    model = weights.model
    return EngineInfo(
        target="embedded",
        device=device,
        vocab_size=model.vocab_size,
        max_seq_len=limits.max_seq_len,
        max_batch_size=limits.max_batch_size,
        max_num_tokens=limits.max_num_tokens,
        weight_bytes=weights.num_bytes,
        kv_pool_bytes=cache.num_bytes,
        kv_policy=policy,
        speculation=speculation,
        eos_ids=model.eos_ids,
        pid=os.getpid(),
        notes=runner.notes,
        device_memory=runner.memory,
    )


def kv_stats(
    scheduler: Scheduler, counters: EvictionCounters, speculator: Speculator | None, block_bytes: int
) -> KVStats:
    """The block pool and what was done in it so far."""
    pool = scheduler.pool
    return KVStats(
        tokens_per_block=scheduler.limits.tokens_per_block,
        block_bytes=block_bytes,
        blocks_total=pool.num_blocks,
        blocks_used=pool.num_used,
        blocks_peak=pool.peak,
        requests_running=len(scheduler.running),
        requests_waiting=len(scheduler.waiting),
        requests_peak=scheduler.peak_running,
        preemptions=scheduler.preemptions,
        evictions=counters.evictions,
        tokens_evicted=counters.tokens_evicted,
        blocks_freed=counters.blocks_freed,
        side_bytes=counters.side_bytes,
        prompt_tokens_reused=scheduler.prompt_tokens_reused,
        blocks_cached=pool.num_idle,
        draft_tokens=0 if speculator is None else speculator.drafted,
        accepted_tokens=0 if speculator is None else speculator.accepted,
    )
