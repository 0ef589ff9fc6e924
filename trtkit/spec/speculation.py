"""`SpeculationSpec`: whether a decoding request guesses its next tokens and has them checked together.

N-gram speculation (prompt lookup) needs no second model: the guess is what followed the last tokens when they occurred
before, in the prompt or in the output. Only tokens that the model itself would have written are kept, so a wrong guess
costs time and never changes text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trtkit.spec.errors import UsageError

OFF = "off"
NGRAM = "ngram"
MOST_DRAFT_TOKENS = 63
"""With the token that is fed anyway they make 64 rows, the most that the small products of a decode step are made for."""

_MOST_NGRAM = 16
_SPELLING = "off, ngram:4 or ngram:4,match=3,adaptive=no"
_SWITCH = {"yes": True, "on": True, "no": False, "off": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeculationSpec:
    """Guessing up to `max_draft_tokens` tokens a step from earlier occurrences of the last `max_ngram` tokens, or fewer.

    The embedded engine looks for two at least, unless `max_ngram` is 1; TensorRT-LLM goes down to one.

    `adaptive` stops guessing for a request whose guesses are mostly wrong; without it every step guesses when it can,
    which is what a measurement of the cost of checking wants.
    """

    kind: str = NGRAM
    max_draft_tokens: int
    max_ngram: int = 3
    adaptive: bool = True

    def __post_init__(self) -> None:
        if self.kind != NGRAM:
            raise UsageError(f"unknown speculation {self.kind!r}: allowed are {_SPELLING}")
        if not 1 <= self.max_draft_tokens <= MOST_DRAFT_TOKENS:
            raise UsageError(
                f"speculation guesses {self.max_draft_tokens} tokens, allowed are 1 to {MOST_DRAFT_TOKENS}"
            )
        if not 1 <= self.max_ngram <= _MOST_NGRAM:
            raise UsageError(f"speculation matches {self.max_ngram} tokens, allowed are 1 to {_MOST_NGRAM}")

    @property
    def label(self) -> str:
        """The spelling `parse_speculation` reads back."""
        match = "" if self.max_ngram == 3 else f",match={self.max_ngram}"
        return f"{self.kind}:{self.max_draft_tokens}{match}{'' if self.adaptive else ',adaptive=no'}"


def decode_rows(max_batch_size: int, draft_tokens: int) -> int:
    """Rows of the largest decode step: a full batch with its guesses, at most 64 unless the batch itself is larger."""
    return max(max_batch_size, min(MOST_DRAFT_TOKENS + 1, max_batch_size * (1 + draft_tokens)))


def most_tokens_a_step(spec: SpeculationSpec | None) -> int:
    """Tokens that a decode step gives a request at most: one, and one for each guess."""
    return 1 if spec is None else 1 + spec.max_draft_tokens


def speculation_label(spec: SpeculationSpec | None) -> str:
    """The spelling of a plan's speculation: `off` where there is none."""
    return OFF if spec is None else spec.label


def parse_speculation(text: str) -> SpeculationSpec | None:
    """Read `off`, `ngram:4`, `ngram:4,match=2`, `ngram:4,adaptive=no`; None is off.

    Raises:
        UsageError: with what is wrong and what is allowed.
    """
    kind, _, rest = text.strip().lower().partition(":")
    if kind == OFF and not rest:
        return None
    if kind != NGRAM:
        raise UsageError(f"unknown speculation {text!r}: allowed are {_SPELLING}")
    first, *others = (part.strip() for part in rest.split(","))
    options: dict[str, Any] = {"max_draft_tokens": _number(text, "the number of guessed tokens", first)}
    for part in others:
        name, _, value = part.partition("=")
        if name == "match" and "max_ngram" not in options:
            options["max_ngram"] = _number(text, "match", value)
        elif name == "adaptive" and value in _SWITCH and "adaptive" not in options:
            options["adaptive"] = _SWITCH[value]
        else:
            raise UsageError(f"speculation {text!r}: cannot read {part!r}; allowed are {_SPELLING}")
    return SpeculationSpec(**options)


def _number(text: str, name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise UsageError(f"speculation {text!r}: {name} is {value!r}, expected a number, as in {_SPELLING}") from None
