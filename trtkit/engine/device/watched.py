"""What the device path knows about each evicting sequence: host integers beside its ledger and its ring's slot."""

from __future__ import annotations

from dataclasses import dataclass

from trtkit.engine.device.ledger import DeviceLedger
from trtkit.engine.device.segments import Segment
from trtkit.engine.sequence import Sequence
from trtkit.kv.policy import EvictionPolicy


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """A segment of the step in progress. `evicted_at` is the position at which the round before it fell, if any.

    `stores`: its last queries go into the ring, for a decision that looks through a window.
    """

    segment: Segment
    evicted_at: int | None
    stores: bool


@dataclass(kw_only=True, slots=True, eq=False)
class Watched:
    """One evicting sequence. `pending` ring queries and `unlisted` tokens, the newest, are not in the ledger yet.

    `plan` are the step's segments by their start, None where the step feeds it as a decode row; `prompt_cap` is its
    `kv_cap_tokens` while the prompt is fed.
    """

    sequence: Sequence
    policy: EvictionPolicy
    ledger: DeviceLedger
    slot: int
    prompt_cap: int | None
    pending: int = 0
    unlisted: int = 0
    evicted_at: int | None = None
    plan: dict[int, Planned] | None = None

    @property
    def window(self) -> int:
        """Queries that its policy looks through; 0 unless it watches the last ones."""
        return self.policy.watch.window

    def lay_out(self, segments: tuple[Segment, ...], position: int) -> None:
        """Plan the segments of a row that begins at `position`."""
        self.plan = {}
        evicted_at = self.evicted_at
        for index, segment in enumerate(segments):
            later = segments[index + 1 :]
            # What a longer later segment overwrites whole need not be stored.
            stores = self.window > 0 and not (later and later[0].count >= self.window)
            self.plan[segment.start] = Planned(segment=segment, evicted_at=evicted_at, stores=stores)
            if segment.evict_to is not None:
                evicted_at = position + segment.start + segment.count
        self.evicted_at = evicted_at
