"""What a runner takes for one step of generation, and what it gives back: at once on a CPU, later on a GPU.

A GPU works on a step while the host prepares the next one, so a step is launched first and collected later. Until then
the token it will write is `PENDING` in the sequence's output.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from trtkit.engine.batch import RowInput
from trtkit.engine.sequence import Sequence
from trtkit.spec.engine import Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """How a row's next token is chosen; `uniform(seed, index)` is its random number."""

    how: Sampling
    seed: int
    index: int

    def later(self, count: int) -> Draw:
        """The draw of the same request `count` tokens on."""
        return replace(self, index=self.index + count) if count else self


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInput:
    """One step: `draws` has one entry per row, None where no token follows.

    A row with drafts draws one token more for each of them, its indices counting on; after a wrong draft nobody looks at
    them, but for NaN. `new_blocks` were allocated since the last step.
    """

    rows: list[RowInput]
    draws: list[Draw | None]
    new_blocks: list[int] = field(default_factory=list)


def one_by_one(step: StepInput) -> StepInput:
    """The same step with a row for each token of a row with drafts: a decode step's kernels take one token a row.

    All rows' keys are written before any of them attends, and each sees as many slots as its own place tells.
    """
    rows: list[RowInput] = []
    draws: list[Draw | None] = []
    for row, draw in zip(step.rows, step.draws, strict=True):
        if row.drafts:
            assert draw is not None, "a row with drafts draws"
            assert len(row.token_ids) == 1 + row.drafts, "drafts follow one known token"
            rows += [replace(row, token_ids=(token,), drafts=0, ahead=n) for n, token in enumerate(row.token_ids)]
            draws += [draw.later(n) for n in range(1 + row.drafts)]
        else:
            rows.append(row)
            draws.append(draw)
    return replace(step, rows=rows, draws=draws)


@dataclass(frozen=True, kw_only=True, slots=True)
class Awaited:
    """A token that is to come: `index` in the output of `sequence`; and, after each of `drafts`, another one if it fits."""

    sequence: Sequence
    index: int
    drafts: tuple[int, ...] = ()
