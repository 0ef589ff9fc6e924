"""`ModelRunner`: weights, cache and observer together; runs one step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trtkit.engine import llama
from trtkit.engine.batch import Batch, RowInput, build_batch
from trtkit.engine.observer import LayerObserver
from trtkit.engine.paged_cache import PagedCache
from trtkit.engine.rope import RopeTable
from trtkit.engine.scheduler import Scheduler
from trtkit.engine.sequence import Sequence
from trtkit.engine.weights import ModelWeights
from trtkit.spec.errors import UnsupportedError
from trtkit.spec.kv import KVPolicySpec

__all__ = ["Batch", "ModelRunner", "ObserverFactory"]

ObserverFactory = Callable[[PagedCache, Scheduler], LayerObserver]


class ModelRunner:
    """Feeds rows through the model. Sequences are advanced here, so that `cache_len` always tells what is cached."""

    def __init__(
        self, weights: ModelWeights, cache: PagedCache, max_positions: int, observer: LayerObserver | None = None
    ) -> None:
        """Build the rotary tables for `max_positions`."""
        model = weights.model
        self.weights = weights
        self.cache = cache
        self.observer = observer
        self._rope = RopeTable(model.rope, model.head_dim, max_positions, weights.dtype, str(cache.device))

    def admit(self, sequence: Sequence, default: KVPolicySpec) -> None:
        """Let eviction prepare a sequence under its own policy, or else the engine's.

        Raises:
            TrtkitError: the policy cannot be carried out here.
        """
        policy = sequence.request.kv or default
        sequence.kv_policy = policy
        if self.observer is not None:
            self.observer.admit(sequence)
        elif not policy.is_full:
            raise UnsupportedError(f"KV policy {policy.label!r}: this engine was opened without eviction")

    def forget(self, sequence: Sequence) -> None:
        """A sequence was preempted or has ended."""
        if self.observer is not None:
            self.observer.forget(sequence)

    @property
    def failures(self) -> list[tuple[Sequence, str]]:
        """Sequences that eviction has to give up, each with its line."""
        return [] if self.observer is None else list(self.observer.failed.items())

    def run(self, inputs: list[RowInput], new_blocks: list[int]) -> tuple[Batch, Tensor]:
        """One step: the batch as laid out, and hidden states before the final norm, [T, E].

        Args:
            inputs: what to feed; blocks for it are in the sequences' tables.
            new_blocks: blocks allocated since the last step.
        """
        self.cache.clear(new_blocks)
        batch = build_batch(inputs, self.cache, self.weights.dtype)
        hidden_TE = llama.forward(self.weights, self._rope, batch, self.observer)
        for row in batch.rows:
            row.sequence.advance(row.count)
        if self.observer is not None:
            self.observer.end_step(batch)
        return batch, hidden_TE

    def logits(self, hidden_TE: Tensor, tokens: list[int]) -> Tensor:
        """Float32 logits of some of the step's tokens, [R, V]."""
        index = torch.tensor(tokens, device=hidden_TE.device)
        return llama.logits(self.weights, hidden_TE.index_select(0, index))
