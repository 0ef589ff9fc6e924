"""`Verdicts`: are a policy's answers slots that lose, double or invent nothing? Judged on the device, read when it is done.

An answer that is wrong sets its sequence's flag. Flags are copied to the host behind the step that set them, and looked
at once that copy has arrived, so nobody waits.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from trtkit.engine.sequence import Sequence
from trtkit.kernels.slots import flag_bad_slots

_COPIES = 4
"""Copies of the flags on their way at once; a step or two are in flight."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Staged:
    """Flags on their way to the host, and whose they are with the line to tell."""

    flags_N: Tensor
    arrived: torch.cuda.Event | None
    asked: dict[int, tuple[Sequence, str]]

    @property
    def is_here(self) -> bool:
        return self.arrived is None or bool(self.arrived.query())  # type: ignore[no-untyped-call]


class Verdicts:
    """One flag for each of `slots` sequences."""

    def __init__(self, slots: int, device: torch.device) -> None:
        """No flag is set."""
        self._flags_N = torch.zeros(slots, dtype=torch.int32, device=device)
        self._asked: dict[int, tuple[Sequence, str]] = {}
        self._staged: deque[_Staged] = deque()
        # Pinning memory may make the host wait, so it is done before the first step.
        self._free = [self._pinned() for _ in range(_COPIES)]

    def _pinned(self) -> Tensor:
        return torch.empty(self._flags_N.shape, dtype=torch.int32, pin_memory=self._flags_N.is_cuda)

    def clear(self, slot: int) -> None:
        """A new sequence takes a slot."""
        self._flags_N[slot : slot + 1].zero_()
        self._asked.pop(slot, None)

    def judge(self, slot: int, sequence: Sequence, keep_LHK: Tensor, live: int) -> None:
        """Hold an answer against `live` slots."""
        flag_bad_slots(keep_LHK, live, self._flags_N[slot : slot + 1])
        line = f"KV policy failed: kept slots must be strictly ascending inside [0, {live})"
        self._asked.setdefault(slot, (sequence, line))

    def stage(self) -> None:
        """Send the flags of this step's answers to the host."""
        if not self._asked:
            return
        flags = self._free.pop() if self._free else self._pinned()
        flags.copy_(self._flags_N, non_blocking=True)
        arrived = None
        if self._flags_N.is_cuda:
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._staged.append(_Staged(flags_N=flags, arrived=arrived, asked=self._asked))
        self._asked = {}

    def read(self) -> list[tuple[Sequence, str]]:
        """Sequences whose answers were wrong, as far as that has arrived; waits for nothing."""
        wrong = []
        while self._staged and self._staged[0].is_here:
            staged = self._staged.popleft()
            wrong += [entry for slot, entry in staged.asked.items() if staged.flags_N[slot]]
            self._free.append(staged.flags_N)
        return wrong
