"""`ModelRunner`: weights, cache and observer together; runs one step. `Runner` is what the loop asks of any runner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trtkit.engine import llama
from trtkit.engine.batch import Batch, RowInput, build_batch
from trtkit.engine.observer import EvictionCounters, LayerObserver
from trtkit.engine.paged_cache import PagedCache
from trtkit.engine.rope import RopeTable
from trtkit.engine.sampler import sample
from trtkit.engine.scheduler import Scheduler
from trtkit.engine.sequence import Sequence
from trtkit.engine.step import StepInput
from trtkit.engine.weights import ModelWeights
from trtkit.spec.errors import UnsupportedError
from trtkit.spec.kv import KVPolicySpec

ObserverFactory = Callable[[PagedCache, Scheduler], LayerObserver]
RunnerFactory = Callable[[ModelWeights, PagedCache, Scheduler], "Runner"]


class Laid(Protocol):
    """A step as laid out."""

    @property
    def last_tokens(self) -> list[int]:
        """Index of each row's last token, in the caller's order."""


class Runner(Protocol):
    """What the engine's loop and scoring ask of a runner.

    `max_in_flight` steps may be launched and not yet collected while another one is launched; what is launched is
    collected in that order, or dropped. A step with drafts has at most `most_rows` tokens, a prompt counted as one.
    """

    weights: ModelWeights
    cache: PagedCache
    max_in_flight: int
    most_rows: int | None

    def admit(self, sequence: Sequence, default: KVPolicySpec) -> None:
        """See `ModelRunner.admit`."""

    def forget(self, sequence: Sequence) -> None:
        """See `ModelRunner.forget`."""

    @property
    def counters(self) -> EvictionCounters:
        """Totals of eviction."""

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of the device by what holds them; empty where nobody can tell."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What does not run as it should, one line each."""

    @property
    def failures(self) -> list[tuple[Sequence, str]]:
        """See `ModelRunner.failures`."""

    def run(self, inputs: list[RowInput], new_blocks: list[int]) -> tuple[Laid, Tensor]:
        """See `ModelRunner.run`."""

    def logits(self, hidden_TE: Tensor, tokens: list[int]) -> Tensor:
        """See `ModelRunner.logits`."""

    def launch(self, step: StepInput) -> Any:  # noqa: ANN401 - opaque: only this runner's `collect` takes it
        """Start a step; sequences are advanced at once."""

    def collect(self, launched: Any) -> list[int]:  # noqa: ANN401 - what `launch` gave
        """Wait for a step; its tokens, in the order of the rows that draw."""

    def take_back(self, sequence: Sequence, count: int) -> None:
        """The newest `count` slots of a sequence held wrong guesses and are about to be given up."""

    def close(self) -> None:
        """Release weights and cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """A step that was finished when its launch returned."""

    tokens: list[int]


class ModelRunner:
    """Feeds rows through the model. Sequences are advanced here, so that `cache_len` always tells what is cached."""

    max_in_flight = 0
    most_rows: int | None = None
    memory: dict[str, int] = {}  # noqa: RUF012 - nothing is known, for ever
    notes: tuple[str, ...] = ()

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

    @property
    def counters(self) -> EvictionCounters:
        """Totals of eviction."""
        return EvictionCounters() if self.observer is None else self.observer.counters

    @torch.inference_mode()
    def launch(self, step: StepInput) -> Ready:
        """Run a step to its end."""
        batch, hidden_TE = self.run(step.rows, step.new_blocks)
        drawn = [
            (last - row.drafts + place, draw.later(place), guess)
            for row, last, draw in zip(step.rows, batch.last_tokens, step.draws, strict=True)
            if draw is not None
            for place, guess in enumerate((None, *row.token_ids[len(row.token_ids) - row.drafts :]))
        ]
        if not drawn:
            return Ready(tokens=[])
        logits_RV = self.logits(hidden_TE, [token for token, _, _ in drawn])
        draws = [draw for _, draw, _ in drawn]
        guesses = [guess for _, _, guess in drawn]
        return Ready(tokens=sample(logits_RV, [d.how for d in draws], [(d.seed, d.index) for d in draws], guesses))

    def collect(self, launched: Ready) -> list[int]:
        """The step's tokens, in the order of the rows that draw."""
        return launched.tokens

    def take_back(self, sequence: Sequence, count: int) -> None:
        """Zero slots that are given up: a masked slot is still multiplied by zero, which a NaN survives."""
        first = sequence.cache_len - count
        self.cache.clear_slots(sequence.block_table, first, sequence.cache_len)

    def close(self) -> None:
        """Release weights and cache."""
        self.cache.release()
        del self.weights

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
