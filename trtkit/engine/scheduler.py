"""`Scheduler`: who runs in the next step, with how many tokens. No tensors here.

Served in order of arrival, prefill and decode alike, within `max_num_tokens` tokens and `max_batch_size` requests.
When blocks run out, the latest arrival gives its blocks back and is computed again later. The earliest can
always take what it needs, and what it needs fits the pool (checked at `add`), so no state is a deadlock.

With block reuse a sequence starts on the blocks that hold the beginning of its prompt already, which others may own,
too. Blocks of a prompt can be found from the moment the step that fills them is made: that step writes them before it
reads.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from trtkit.engine.block_pool import BlockPool
from trtkit.engine.prefix_cache import PrefixCache
from trtkit.engine.sequence import Sequence, SequenceState, blocks_for
from trtkit.spec.errors import CapacityError, UsageError
from trtkit.spec.plan import Limits


@dataclass(frozen=True, kw_only=True, slots=True)
class Feed:
    """`count` tokens of one sequence in one step. `ends_piece`: eviction may follow; `samples`: a token follows."""

    sequence: Sequence
    count: int
    ends_piece: bool
    samples: bool


@dataclass(kw_only=True, slots=True)
class Step:
    """One step's work: feeds, the blocks allocated for it, and who lost theirs."""

    feeds: list[Feed] = field(default_factory=list)
    new_blocks: list[int] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens fed."""
        return sum(feed.count for feed in self.feeds)


class Scheduler:
    """Queues, admission, blocks and preemption."""

    def __init__(self, limits: Limits, pool: BlockPool) -> None:
        """An idle scheduler over `pool`."""
        self.limits = limits
        self.pool = pool
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.prefixes = PrefixCache(pool, limits.tokens_per_block) if limits.enable_block_reuse else None
        self.preemptions = 0
        self.prompt_tokens_reused = 0
        self.peak_running = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            CapacityError: it could never fit the pool.
            UsageError: its prompt cannot be fed under the step's token limit.
        """
        needed = self._blocks(sequence.peak_slots)
        if needed > self.pool.num_blocks:
            raise CapacityError(
                f"needs {needed} KV blocks ({sequence.peak_slots} tokens), the pool has {self.pool.num_blocks}; "
                "ask for fewer tokens or give the engine more KV memory"
            )
        whole = sequence.prefill_quantum
        if whole is None and not self.limits.enable_chunked_prefill:
            whole = sequence.prompt_len
        if whole is not None and min(whole, sequence.prompt_len) > self.limits.max_num_tokens:
            raise UsageError(
                f"must feed {whole} tokens at once, max_num_tokens is {self.limits.max_num_tokens}; "
                "enable chunked prefill or raise max_num_tokens"
            )
        insort(self.waiting, sequence, key=lambda s: s.arrival)

    @property
    def can_take_more(self) -> bool:
        """There is room in the batch for a request that is not queued yet."""
        return len(self.waiting) + len(self.running) < self.limits.max_batch_size

    @property
    def has_work(self) -> bool:
        """Somebody is queued or running."""
        return bool(self.waiting or self.running)

    @property
    def reads_prompt(self) -> bool:
        """The next step will feed somebody several tokens."""
        if any(sequence.pending > 1 for sequence in self.running):
            return True
        return bool(self.waiting) and self._admissible(self.waiting[0])

    def schedule(self) -> Step:
        """Decide the next step. Empty only when there is no work."""
        step = Step()
        budget = self.limits.max_num_tokens
        for sequence in list(self.running):
            if sequence.state is SequenceState.RUNNING:
                budget -= self._feed(sequence, budget, step)
        while budget > 0 and self.waiting and not step.preempted and self._admissible_now(self.waiting[0]):
            sequence = self.waiting.pop(0)
            self._admit(sequence)
            taken = self._feed(sequence, budget, step)
            budget -= taken
            if not taken:
                break
        self.peak_running = max(self.peak_running, len(self.running))
        assert step.feeds or not self.has_work, "the scheduler made no progress"
        return step

    def launched(self) -> None:
        """The step made last was launched: what it writes can be read from now on."""
        if self.prefixes is not None:
            self.prefixes.written()

    def abandon(self) -> None:
        """Nobody is left. If the step made last was never launched, forget what it was to write."""
        if self.prefixes is not None:
            self.prefixes.abandon()

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks."""
        if sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
        elif sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
        self._release(sequence)
        sequence.state = SequenceState.FINISHED

    def trim(self, sequence: Sequence) -> int:
        """Free the tail blocks that `cache_len` no longer needs (after a compaction); returns how many."""
        keep = self._blocks(sequence.cache_len)
        assert keep >= sequence.published, f"{sequence.request_id}: blocks that others may read stay"
        tail = sequence.block_table[keep:]
        del sequence.block_table[keep:]
        self.pool.free(tail, sequence.request_id)
        return len(tail)

    def check(self) -> None:
        """Prove the books: blocks conserved, tables long enough, states right."""
        self.pool.check((s.request_id, s.block_table) for s in self._all())
        if self.prefixes is not None:
            self.prefixes.check(self._all())
        for sequence in self.running:
            assert sequence.state is SequenceState.RUNNING, f"{sequence.request_id} runs in state {sequence.state}"
            assert len(sequence.block_table) >= self._blocks(sequence.cache_len), f"{sequence.request_id} lacks blocks"
        for sequence in self.waiting:
            assert sequence.state is SequenceState.WAITING, f"{sequence.request_id} waits in state {sequence.state}"
            assert not sequence.block_table, f"{sequence.request_id} waits and holds blocks"

    def _all(self) -> Iterator[Sequence]:
        yield from self.running
        yield from self.waiting

    def _blocks(self, tokens: int) -> int:
        return blocks_for(tokens, self.limits.tokens_per_block)

    def _feed(self, sequence: Sequence, budget: int, step: Step) -> int:
        """Add `sequence` to `step` with as much as the budget and the pool allow; returns the tokens taken."""
        count = self._count(sequence, budget)
        if count == 0:
            return 0
        live = sequence.cache_len + count
        needed = self._blocks(sequence.capped(live) if sequence.joins_pieces else live) - len(sequence.block_table)
        while needed > self.pool.num_free and self.running[-1].arrival > sequence.arrival:
            self._preempt(self.running[-1], step)
        if needed > self.pool.num_free:
            return 0
        if needed > 0:
            blocks = self.pool.allocate(needed, sequence.request_id)
            sequence.block_table += blocks
            step.new_blocks += blocks
        end = sequence.num_tokens + count
        if self.prefixes is not None:
            # Guesses may follow a single token and spoil its slot, so what it fills is found once that has gone well.
            self.prefixes.publish(sequence, end if count > 1 else sequence.num_tokens)
        step.feeds.append(
            Feed(
                sequence=sequence,
                count=count,
                ends_piece=end == sequence.piece_end() or (sequence.joins_pieces and end <= sequence.prompt_len),
                samples=end == sequence.known_len,
            )
        )
        return count

    def _count(self, sequence: Sequence, budget: int) -> int:
        """Tokens of this step: to the end of the piece, whole where the piece must not be split; or of several pieces."""
        if sequence.joins_pieces and sequence.num_tokens < sequence.prompt_len:
            return sequence.joined_end(budget) - sequence.num_tokens
        count = min(sequence.piece_end() - sequence.num_tokens, sequence.pending)
        in_prompt = sequence.num_tokens < sequence.prompt_len
        whole = sequence.prefill_quantum is not None or not self.limits.enable_chunked_prefill
        if in_prompt and whole and budget < count <= self.limits.max_num_tokens:
            return 0
        return min(count, budget)

    def _admissible(self, sequence: Sequence) -> bool:
        """There is room for its tokens so far beside what is promised to others.

        Blocks it would start on that somebody owns already cost nothing; others are free memory until then.
        """
        if len(self.running) >= self.limits.max_batch_size:
            return False
        if not self.running:
            return True
        needed = self._blocks(sequence.capped(sequence.known_len))
        room = self._room()
        return needed <= room or needed - self._owned_prefix(sequence) <= room

    def _room(self) -> int:
        """Free blocks beyond what running prompts still need, with a spare for each runner that may grow.

        The spare keeps a new arrival from being preempted by the very next decode steps. A runner that eviction
        keeps at its cap grows no more and needs none.
        """
        owed = sum(max(0, self._blocks(s.capped(s.known_len)) - len(s.block_table)) for s in self.running)
        spare = sum(s.capped(s.known_len) < s.peak_slots for s in self.running)
        return self.pool.num_free - owed - spare

    def _owned_prefix(self, sequence: Sequence) -> int:
        """Blocks it would start on that somebody owns."""
        if self.prefixes is None:
            return 0
        return sum(map(self.pool.owned, self.prefixes.find(sequence)))

    def _admissible_now(self, sequence: Sequence) -> bool:
        """Admissible after what this step has allocated and published.

        A preempted sequence whose last token is in flight waits until that is known: the device has forgotten it.
        """
        return sequence.value_len == sequence.known_len and self._admissible(sequence)

    def _admit(self, sequence: Sequence) -> None:
        """Let a sequence run, on the blocks that hold the beginning of its tokens already."""
        sequence.state = SequenceState.RUNNING
        insort(self.running, sequence, key=lambda s: s.arrival)
        if self.prefixes is None:
            return
        blocks = self.prefixes.find(sequence)
        self.pool.share(blocks, sequence.request_id)
        sequence.block_table += blocks
        sequence.published = len(blocks)
        sequence.reused_tokens = len(blocks) * self.limits.tokens_per_block
        sequence.advance(sequence.reused_tokens)
        if not sequence.preemptions:
            self.prompt_tokens_reused += sequence.reused_tokens

    def _preempt(self, sequence: Sequence, step: Step) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.reset()
        insort(self.waiting, sequence, key=lambda s: s.arrival)
        step.preempted.append(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        if self.prefixes is not None:
            # The last token was never fed; where it was guessed, another one may have been.
            self.prefixes.publish(sequence, min(sequence.num_tokens, sequence.known_len - 1))
        self.pool.free(reversed(sequence.block_table), sequence.request_id)
        sequence.block_table.clear()
