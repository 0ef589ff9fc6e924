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
        on_gpu = self._flags_N.is_cuda
        flags = torch.empty(self._flags_N.shape, dtype=torch.int32, pin_memory=on_gpu)
        flags.copy_(self._flags_N, non_blocking=True)
        arrived = None
        if on_gpu:
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
        return wrong
