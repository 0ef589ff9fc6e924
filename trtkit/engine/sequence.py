"""`Sequence`: one request on its way through the engine. No tensors here.

Two counts are kept apart, because eviction makes them differ. `num_tokens` is logical: how many tokens were
computed, so the next query's position. `cache_len` is physical: how many slots of the cache are live.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from trtkit.spec.engine import Request
from trtkit.spec.kv import KVPolicySpec

PENDING = -2
"""Stands in a sequence's output for a token that a launched step will write."""


class SequenceState(Enum):
    """Where a sequence is: WAITING (holds no block), RUNNING, FINISHED (holds no block)."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


def blocks_for(tokens: int, tokens_per_block: int) -> int:
    """Blocks that `tokens` slots need."""
    return -(-tokens // tokens_per_block)


@dataclass(kw_only=True, slots=True, eq=False)
class Sequence:
    """State of one request; `arrival` orders all requests of a run, lower is served first.

    Four fields belong to eviction. `prefill_quantum`: the prompt is fed in whole pieces that end at multiples of
    it, so a result does not depend on load. `kv_cap_tokens`: the most slots that are ever live at once. `evicts`:
    after a preemption the generated tokens are fed again one at a time, as they were the first time.
    `joins_pieces`: a step may feed several pieces of the prompt, because eviction falls between them inside the step.
    `chunk_ends` are positions where a piece must end whatever the quantum (scoring).

    With block reuse the first `published` blocks can be found by their tokens, and others may read them;
    `reused_tokens` were found so when it was admitted last, and not computed again.
    """

    request: Request
    arrival: int
    max_new_tokens: int
    kv_policy: KVPolicySpec = field(default_factory=KVPolicySpec)
    prefill_quantum: int | None = None
    kv_cap_tokens: int | None = None
    evicts: bool = False
    joins_pieces: bool = False
    chunk_ends: tuple[int, ...] = ()
    state: SequenceState = SequenceState.WAITING
    output_ids: list[int] = field(default_factory=list)
    num_tokens: int = 0
    cache_len: int = 0
    block_table: list[int] = field(default_factory=list)
    published: int = 0
    reused_tokens: int = 0
    preemptions: int = 0
    evictions: int = 0
    tokens_evicted: int = 0

    @property
    def request_id(self) -> str:
        """The caller's name of it."""
        return self.request.request_id

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def known_len(self) -> int:
        """Tokens there are: prompt and output so far."""
        return self.prompt_len + len(self.output_ids)

    @property
    def num_emitted(self) -> int:
        """Output tokens whose value is known here."""
        return sum(token != PENDING for token in self.output_ids[-2:]) + max(0, len(self.output_ids) - 2)

    @property
    def value_len(self) -> int:
        """Tokens whose value is known here: prompt and output without what is in flight."""
        return self.prompt_len + self.num_emitted

    @property
    def pending(self) -> int:
        """Known tokens that the cache has not seen; 1 while decoding."""
        return self.known_len - self.num_tokens

    @property
    def peak_slots(self) -> int:
        """Most slots ever live at once: the last output token is never fed."""
        return self.capped(self.prompt_len + self.max_new_tokens - 1)

    def capped(self, slots: int) -> int:
        """`slots`, or what eviction bounds them to."""
        return slots if self.kv_cap_tokens is None else min(slots, self.kv_cap_tokens)

    def piece_end(self) -> int:
        """Position where the piece being fed ends: an eviction may follow there and nowhere else."""
        if self.num_tokens >= self.prompt_len:
            return self.num_tokens + 1 if self.evicts else self.known_len
        ends = [end for end in self.chunk_ends if end > self.num_tokens]
        if self.prefill_quantum is not None:
            ends.append((self.num_tokens // self.prefill_quantum + 1) * self.prefill_quantum)
        if self.evicts or ends:
            ends.append(self.prompt_len)
        return min(ends, default=self.known_len)

    def joined_end(self, most: int) -> int:
        """Position where the last whole piece of the prompt ends that `most` tokens reach; where it is, if none does."""
        assert self.prefill_quantum is not None, "only pieces of a fixed size are joined"
        reached = self.num_tokens + most
        if reached >= self.prompt_len:
            return self.prompt_len
        return max(self.num_tokens, reached // self.prefill_quantum * self.prefill_quantum)

    def token_slice(self, count: int) -> list[int]:
        """The next `count` tokens to feed."""
        start, prompt = self.num_tokens, self.request.prompt_ids
        if start >= self.prompt_len:
            begin = start - self.prompt_len
            return self.output_ids[begin : begin + count]
        head = list(prompt[start : start + count])
        return head + self.output_ids[: count - len(head)]

    def ids(self, start: int, stop: int) -> tuple[int, ...]:
        """The tokens at positions `start` to `stop`."""
        prompt = self.request.prompt_ids
        if stop <= len(prompt):
            return tuple(prompt[start:stop])
        output = self.output_ids[max(0, start - len(prompt)) : stop - len(prompt)]
        return (*prompt[start:], *output)

    def advance(self, count: int) -> None:
        """Note that `count` tokens were fed: each took one slot."""
        self.num_tokens += count
        self.cache_len += count

    def take_back(self, count: int) -> None:
        """The newest `count` tokens that were fed were wrong guesses."""
        self.num_tokens -= count
        self.cache_len -= count

    def reset(self) -> None:
        """Forget what was computed (preemption); the output stays."""
        assert not self.block_table, "blocks must be freed first"
        self.num_tokens = self.cache_len = self.published = self.reused_tokens = 0
        self.evictions = self.tokens_evicted = 0
        self.state = SequenceState.WAITING
        self.preemptions += 1
