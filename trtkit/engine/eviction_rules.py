"""Which requests are evicted, how their prompts are cut, when a round is due, and what it changes on the host.

No tensors here: both engines decide by these rules, so they decide alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from trtkit.engine.observer import EvictionCounters
from trtkit.engine.scheduler import Scheduler
from trtkit.engine.sequence import Sequence
from trtkit.kv.policy import Budget, EvictionPolicy
from trtkit.kv.registry import load_policy
from trtkit.spec.errors import UnsupportedError
from trtkit.spec.kv import KVPolicySpec
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Limits

PieceRule = Callable[[Budget, Limits], int]
"""Tokens of a prompt between two evictions."""


class EvictionRules:
    """An engine's policies, and what they mean for each of its sequences."""

    def __init__(self, spec: KVPolicySpec, model: ModelSpec, scheduler: Scheduler, piece: PieceRule) -> None:
        """Rules for an engine whose policy is `spec`; a request may bring its own.

        Raises:
            TrtkitError: the engine's policy is unknown or cannot be carried out here.
        """
        self.counters = EvictionCounters()
        self._model = model
        self._scheduler = scheduler
        self._piece = piece
        self._policies: dict[KVPolicySpec, EvictionPolicy | None] = {}
        self.policy(spec)

    def policy(self, spec: KVPolicySpec) -> EvictionPolicy | None:
        """The policy a spec names, loaded once.

        Raises:
            TrtkitError: it is unknown or cannot be carried out here.
        """
        if spec not in self._policies:
            limits = self._scheduler.limits
            policy = load_policy(spec, max_seq_len=limits.max_seq_len, default_interval=limits.tokens_per_block)
            window = self._model.sliding_window
            if policy is not None and window is not None and window < limits.max_seq_len:
                raise UnsupportedError(
                    f"KV policy {spec.label!r}: {self._model.name} has sliding-window layers ({window} tokens), which "
                    "drop tokens themselves; use --kv full, or a max_seq_len within the window"
                )
            self._policies[spec] = policy
        return self._policies[spec]

    def piece(self, budget: Budget) -> int:
        """Tokens of a prompt between two evictions."""
        return self._piece(budget, self._scheduler.limits)

    def admit(self, sequence: Sequence) -> EvictionPolicy | None:
        """See `LayerObserver.admit`. A request that can never outgrow its budget is left alone altogether.

        A share becomes tokens here: it is one of the request's own longest context.

        Returns:
            The policy by which the sequence will be evicted; None if it never will be.
        """
        sequence.kv_policy = sequence.kv_policy.resolved(sequence.prompt_len + sequence.max_new_tokens)
        policy = self.policy(sequence.kv_policy)
        if policy is None:
            return None
        budget = policy.budget
        grown = sequence.prompt_len + sequence.max_new_tokens - 1
        if sequence.prompt_len <= budget.tokens and grown < budget.tokens + budget.interval:
            return None
        if sequence.chunk_ends:
            bounds = (0, *sequence.chunk_ends, sequence.prompt_len)
            piece = max(end - start for start, end in itertools.pairwise(bounds))
        else:
            piece = self.piece(budget)
            sequence.prefill_quantum = piece
        sequence.evicts = True
        sequence.kv_cap_tokens = min(budget.tokens + max(piece, budget.interval), max(grown, sequence.prompt_len))
        return policy

    def record(self, sequence: Sequence, budget: Budget, evicted: list[int], live: int) -> None:
        """Note rounds after which `live` slots are left; `evicted` are the tokens each dropped. Frees tail blocks."""
        sequence.cache_len = live
        if sequence.num_tokens >= sequence.prompt_len and sequence.kv_cap_tokens is not None:
            # No piece of a prompt is coming any more, so admission may count with less.
            sequence.kv_cap_tokens = min(sequence.kv_cap_tokens, budget.tokens + budget.interval)
        self.counters.blocks_freed += self._scheduler.trim(sequence)
        self.counters.evictions += len(evicted)
        self.counters.tokens_evicted += sum(evicted)
        sequence.evictions += len(evicted)
        sequence.tokens_evicted += sum(evicted)


def beside_decodes(limits: Limits) -> int:
    """Tokens of one piece that find room in a step beside a full batch of decoding requests."""
    return max(1, limits.max_num_tokens - limits.max_batch_size + 1)


def due(num_tokens: int, prompt_len: int, live: int, budget: Budget) -> bool:
    """Whether an eviction follows the piece that ends at `num_tokens` with `live` slots."""
    if num_tokens <= prompt_len:
        return live > budget.tokens
    return live >= budget.tokens + budget.interval


def failure_line(error: Exception) -> str:
    """What a policy raised, in one line."""
    return f"KV policy failed: {type(error).__name__}: {' '.join(str(error).split())}"
