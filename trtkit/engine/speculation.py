"""N-gram speculation: guess a request's next tokens from what it has seen, and have a step check the guesses.

A step feeds the newest token and the guesses after it, and draws at each of them. A draw is a function of logits, seed
and index, so a guess that equals what was drawn before it was the right input, and what was drawn at it is what plain
decoding would have written next. The first wrong guess ends it: its slot and those behind it are live no longer.

Guesses take what a step leaves over. They preempt nobody, delay nobody's admission, and give their blocks back when
the step has landed, so a schedule is the one without them.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from trtkit.engine.scheduler import Feed, Scheduler, Step
from trtkit.engine.sequence import Sequence, blocks_for
from trtkit.spec.speculation import SpeculationSpec

_WEIGHT = 0.25
"""Of the newest step, in the running mean of accepted tokens."""
_POOR = 0.25
"""Accepted tokens per checked step below which guessing pauses (assumed: a wrong guess costs a fraction of a step)."""
_PAUSES = (8, 128)
"""Output tokens that the first pause lasts, and the longest; each is twice the one before, half after a right guess."""
_SHORTEST = 2
"""Tokens that must have occurred before, unless fewer are asked for: what follows one says too little about the next
(3 to 6% of such guesses were right on the shipped model, and each wrong one brings a pause nearer)."""


class NgramIndex:
    """A growing text, and where each run of two to `longest` tokens was last followed by something; of one if that is 1."""

    def __init__(self, longest: int) -> None:
        """An empty text."""
        self.tokens: list[int] = []
        lengths = range(longest, min(_SHORTEST, longest) - 1, -1)
        self._places: dict[int, dict[tuple[int, ...], int]] = {length: {} for length in lengths}

    def extend(self, tokens: Seq[int]) -> None:
        """Add tokens. Costs one entry per run length and token, whatever the text's length."""
        known = len(self.tokens)
        self.tokens += tokens
        for length, places in self._places.items():
            first = max(0, known - length)
            runs = zip(*(self.tokens[first + offset :] for offset in range(length)), strict=False)
            places.update(zip(runs, range(first + length, len(self.tokens)), strict=False))

    def continuation(self, most: int) -> list[int]:
        """What followed the text's end before: after its longest run that is known, where that was last; up to `most`.

        Where that place is near the end, the text is taken to repeat itself.
        """
        for length, places in self._places.items():
            place = places.get(tuple(self.tokens[-length:]))
            if place is not None:
                period = len(self.tokens) - place
                return [self.tokens[place + number % period] for number in range(most)]
        return []


class Proposer(Protocol):
    """Who guesses."""

    def propose(self, sequence: Sequence, most: int) -> Seq[int]:
        """At most `most` tokens that may follow those of `sequence`, all of which are known."""

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended; unknown ones are ignored."""


class NgramProposer:
    """Guesses from the prompt and the output so far."""

    def __init__(self, max_ngram: int) -> None:
        """Match runs of at most `max_ngram` tokens."""
        self._longest = max_ngram
        self._indices: dict[Sequence, NgramIndex] = {}

    def propose(self, sequence: Sequence, most: int) -> Seq[int]:
        """See `Proposer`."""
        index = self._indices.get(sequence)
        if index is None:
            index = self._indices[sequence] = NgramIndex(self._longest)
            index.extend(sequence.request.prompt_ids)
        index.extend(sequence.output_ids[len(index.tokens) - sequence.prompt_len :])
        return index.continuation(most)

    def forget(self, sequence: Sequence) -> None:
        """See `Proposer`."""
        self._indices.pop(sequence, None)


@dataclass(kw_only=True, slots=True)
class _Trust:
    """How a sequence's guesses have done: none before its output has `resumes_at` tokens."""

    mean: float = 1.0
    pause: int = _PAUSES[0]
    resumes_at: int = 0

    def learn(self, accepted: int, output_tokens: int) -> None:
        self.mean += _WEIGHT * (accepted - self.mean)
        if self.mean < _POOR:
            # The next guess is a trial: with nothing accepted the next, longer pause follows.
            self.mean = _POOR
            self.resumes_at = output_tokens + self.pause
            self.pause = min(2 * self.pause, _PAUSES[1])
        elif accepted:
            self.pause = max(self.pause // 2, _PAUSES[0])


class Speculator:
    """Adds guesses to steps and settles them. `drafted` and `accepted` count tokens; an accepted one saved a step."""

    def __init__(
        self,
        spec: SpeculationSpec,
        scheduler: Scheduler,
        most_rows: int | None = None,
        proposer: Proposer | None = None,
    ) -> None:
        """Guesses for the sequences of `scheduler`, in steps of at most `most_rows` rows, prompts counted as one."""
        self._spec = spec
        self._scheduler = scheduler
        self._most_rows = most_rows
        self._proposer = proposer or NgramProposer(spec.max_ngram)
        self._trust: dict[Sequence, _Trust] = {}
        self._muted: set[Sequence] = set()
        self.drafted = self.accepted = 0

    def guess(self, step: Step) -> list[tuple[int, ...]]:
        """Draft tokens for each feed of a step; blocks for them are added to the sequences and to the step."""
        limits = self._scheduler.limits
        left = limits.max_num_tokens - step.num_tokens
        if self._most_rows is not None:
            left = min(left, self._most_rows - len(step.feeds))
        willing = [self._is_willing(feed) for feed in step.feeds]
        waiting = sum(willing)
        drafts: list[tuple[int, ...]] = []
        for feed, wants in zip(step.feeds, willing, strict=True):
            guessed: tuple[int, ...] = ()
            if wants:
                guessed = self._guess_for(feed.sequence, left // waiting, step)
                waiting -= 1
                left -= len(guessed)
            drafts.append(guessed)
        return drafts

    def settle(self, sequence: Sequence, drafted: int, accepted: int, *, spoilt: bool = False) -> None:
        """Note how many of a sequence's guesses were right. After a `spoilt` step it gets no more of them."""
        if spoilt:
            self._muted.add(sequence)
        self.drafted += drafted
        self.accepted += accepted
        if sequence in self._trust:
            self._trust[sequence].learn(accepted, len(sequence.output_ids))

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        self._proposer.forget(sequence)
        self._trust.pop(sequence, None)
        self._muted.discard(sequence)

    def _is_willing(self, feed: Feed) -> bool:
        """The feed is one token, a token follows, and its sequence's guesses are worth a try."""
        if not feed.samples or feed.count != 1 or feed.sequence in self._muted:
            return False
        if not self._spec.adaptive:
            return True
        trust = self._trust.setdefault(feed.sequence, _Trust())
        return len(feed.sequence.output_ids) >= trust.resumes_at

    def _guess_for(self, sequence: Sequence, most: int, step: Step) -> tuple[int, ...]:
        """As many guesses as the rest of the output, `most` and the free blocks allow."""
        pool, size = self._scheduler.pool, self._scheduler.limits.tokens_per_block
        fed = sequence.cache_len + 1
        room = (len(sequence.block_table) + pool.num_free) * size - fed
        rest = sequence.max_new_tokens - len(sequence.output_ids) - 1
        most = min(most, self._spec.max_draft_tokens, rest, room)
        guessed = tuple(self._proposer.propose(sequence, most)) if most > 0 else ()
        needed = blocks_for(fed + len(guessed), size) - len(sequence.block_table)
        if needed > 0:
            blocks = pool.allocate(needed, sequence.request_id)
            sequence.block_table += blocks
            step.new_blocks += blocks
        return guessed
