"""What a runner takes for one step of generation, and what it gives back: at once on a CPU, later on a GPU.

A GPU works on a step while the host prepares the next one, so a step is launched first and collected later. Until then
the token it will write is `PENDING` in the sequence's output.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trtkit.engine.batch import RowInput
from trtkit.engine.sequence import Sequence
from trtkit.spec.engine import Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """How a row's next token is chosen; `uniform(seed, index)` is its random number."""

    how: Sampling
    seed: int
    index: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInput:
    """One step: `draws` has one entry per row, None where no token follows.

    `new_blocks` were allocated since the last step.
    """

    rows: list[RowInput]
    draws: list[Draw | None]
    new_blocks: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Awaited:
    """A token that is to come: `index` in the output of `sequence`."""

    sequence: Sequence
    index: int
