"""The device path on a CPU: the kernels' torch twins, with steps collected late or at once, captured or not."""

from __future__ import annotations

from typing import Any

from support.engine_models import kv_bytes, limits, spec_of, trtllm_tensors

from trtkit.engine.device.eviction import DeviceEviction
from trtkit.engine.device.graphs import Capture
from trtkit.engine.device.runner import DeviceRunner
from trtkit.engine.eviction import prefill_piece
from trtkit.engine.loop import EmbeddedEngine
from trtkit.engine.open import open_tensors
from trtkit.engine.runner import RunnerFactory
from trtkit.engine.speculation import Proposer
from trtkit.spec.kv import KVPolicySpec
from trtkit.spec.model import ModelSpec
from trtkit.spec.speculation import SpeculationSpec


def device_runner(
    model: ModelSpec,
    policy: KVPolicySpec | None = None,
    *,
    late: int = 1,
    capture: Capture | None = None,
    ring_queries: int | None = None,
    draft_tokens: int = 0,
) -> RunnerFactory:
    """Makes a device runner whose prompts are cut as the CPU engine cuts them."""

    def build(weights: Any, cache: Any, scheduler: Any) -> DeviceRunner:
        eviction = DeviceEviction(
            policy or KVPolicySpec(), model, scheduler, piece=prefill_piece, ring_queries=ring_queries
        )
        return DeviceRunner(
            weights,
            cache,
            scheduler.limits,
            eviction,
            max_in_flight=late,
            capture=capture,
            draft_tokens=draft_tokens,
        )

    return build


def open_device(
    hf: Any,
    *,
    blocks: int = 256,
    policy: KVPolicySpec | None = None,
    late: int = 1,
    capture: Capture | None = None,
    ring_queries: int | None = None,
    speculation: SpeculationSpec | None = None,
    proposer: Proposer | None = None,
    **overrides: Any,
) -> EmbeddedEngine:
    """The device path on a transformers model's weights, with `blocks` KV blocks."""
    spec = spec_of(hf)
    size = overrides.get("tokens_per_block", 4)
    chosen = limits(**{"kv_memory_bytes": kv_bytes(spec, blocks, size), **overrides})
    drafts = 0 if speculation is None else speculation.max_draft_tokens
    factory = device_runner(spec, policy, late=late, capture=capture, ring_queries=ring_queries, draft_tokens=drafts)
    return open_tensors(
        spec,
        trtllm_tensors(hf),
        limits=chosen,
        kv_policy=policy,
        runner_factory=factory,
        speculation=speculation,
        proposer=proposer,
    )


class Replays:
    """A capture that is none: what is replayed is the work itself, which must follow the static memory. Counts replays."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.captured = self.replayed = 0

    def __call__(self, work: Any) -> Any:
        work()
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            work()

        return replay
