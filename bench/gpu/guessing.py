"""An engine whose guesses are always made and (but for chance) always wrong: what checking them costs, and nothing else.

Random weights write text without meaning, so how many n-gram guesses come true says nothing about a real model's text.
What a step that checks K guesses costs is true all the same: the rows, the reads and the products are those of real guesses.
With the step's ratio to a plain one, r, speculation pays from r - 1 accepted tokens a step on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trtkit.backends import open_here
from trtkit.spec.bundle import open_bundle
from trtkit.spec.engine import Engine
from trtkit.spec.errors import UsageError

_STRIDE = 7919
"""Guesses walk through the vocabulary in steps of a prime, so that no run of them resembles a loop in the output."""


class Wrong:
    """Guesses as many tokens as may be guessed, without looking at the text."""

    def __init__(self, vocab_size: int) -> None:
        """Of a vocabulary of that size."""
        self._vocab_size, self._next = vocab_size, 0

    def propose(self, sequence: object, most: int) -> Sequence[int]:
        """`most` tokens, other ones each time."""
        first, self._next = self._next, self._next + most
        return [3 + number * _STRIDE % (self._vocab_size - 3) for number in range(first, first + most)]

    def forget(self, sequence: object) -> None:
        """Nothing is kept."""


def open_guessing(path: str | Path, /, **overrides: object) -> Engine:
    """Opener for a child process: the bundle's engine with `Wrong` in place of n-grams.

    Raises:
        UsageError: the bundle's plan does not speculate.
    """
    vocab_size = open_bundle(Path(path)).manifest.plan.model.vocab_size
    engine = open_here(path, proposer=Wrong(vocab_size), **overrides)
    if engine.info.speculation is None:
        engine.close()
        raise UsageError(f"{path}: its plan does not speculate, so there is nothing to guess; use the default opener")
    return engine
