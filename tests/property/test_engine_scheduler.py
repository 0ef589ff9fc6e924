"""Whatever arrives in whatever order: blocks are conserved, nobody deadlocks, everybody finishes or is refused.

The model is played by a loop that feeds what the scheduler says and shrinks evicting sequences to a budget.
"""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from trtkit.engine.block_pool import BlockPool
from trtkit.engine.scheduler import Feed, Scheduler
from trtkit.engine.sequence import Sequence, SequenceState
from trtkit.spec.engine import Request
from trtkit.spec.errors import TrtkitError
from trtkit.spec.plan import Limits


@dataclass(frozen=True)
class Plan:
    prompt: int
    new: int
    arrives: int
    budget: int | None
    quantum: int
    joins: bool
    cancel_at: int | None


plans = st.builds(
    Plan,
    prompt=st.integers(1, 40),
    new=st.integers(1, 20),
    arrives=st.integers(0, 30),
    budget=st.none() | st.integers(1, 12),
    quantum=st.integers(1, 9),
    joins=st.booleans(),
    cancel_at=st.none() | st.integers(0, 40),
)
engines = st.tuples(
    st.integers(1, 24),  # blocks
    st.integers(1, 5),  # max_batch_size
    st.integers(1, 24),  # max_num_tokens
    st.integers(1, 5),  # tokens_per_block
    st.booleans(),  # chunked prefill
    st.booleans(),  # block reuse: all prompts are the same token again and again, so they share all they can
)


def _sequence(index: int, plan: Plan) -> Sequence:
    request = Request(request_id=str(index), prompt_ids=(3,) * plan.prompt, max_tokens=plan.new)
    sequence = Sequence(request=request, arrival=index, max_new_tokens=plan.new)
    if plan.budget is not None:
        sequence.evicts = True
        sequence.prefill_quantum = plan.quantum
        sequence.kv_cap_tokens = plan.budget + plan.quantum
        sequence.joins_pieces = plan.joins
    return sequence


class World:
    """Requests that arrive, are cancelled, run and end, around one scheduler."""

    def __init__(self, work: list[Plan], limits: Limits, blocks: int) -> None:
        self.work, self.limits = work, limits
        self.scheduler = Scheduler(limits, BlockPool(blocks))
        self.later = sorted(enumerate(work), key=lambda item: item[1].arrives)
        self.live: dict[int, Sequence] = {}
        self.done: set[int] = set()
        self.refused: set[int] = set()
        self.cancelled: set[int] = set()

    def arrive(self, now: int) -> None:
        while self.later and self.later[0][1].arrives <= now:
            index, plan = self.later.pop(0)
            sequence = _sequence(index, plan)
            try:
                self.scheduler.add(sequence)
            except TrtkitError:
                self.refused.add(index)
            else:
                self.live[index] = sequence

    def cancel(self, now: int) -> None:
        for index in [i for i in self.live if self.work[i].cancel_at == now]:
            self.scheduler.finish(self.live.pop(index))
            self.cancelled.add(index)

    def step(self) -> None:
        step = self.scheduler.schedule()
        self.scheduler.launched()
        assert step.num_tokens <= self.limits.max_num_tokens
        assert len(self.scheduler.running) <= self.limits.max_batch_size
        assert len({feed.sequence.request_id for feed in step.feeds}) == len(step.feeds)
        for feed in step.feeds:
            self.feed(feed)
        self.scheduler.check()

    def feed(self, feed: Feed) -> None:
        sequence = feed.sequence
        plan = self.work[sequence.arrival]
        assert sequence.state is SequenceState.RUNNING
        start = sequence.num_tokens
        live = sequence.cache_len + feed.count
        slots = len(sequence.block_table) * self.limits.tokens_per_block
        assert slots >= (sequence.capped(live) if sequence.joins_pieces else live)
        assert not (sequence.evicts and sequence.published)
        sequence.advance(feed.count)
        if plan.budget is not None:
            self.evict(sequence, plan, start, ends_piece=feed.ends_piece)
        if feed.samples:
            sequence.output_ids.append(1)
            if len(sequence.output_ids) == plan.new:
                self.scheduler.finish(sequence)
                self.done.add(sequence.arrival)
                del self.live[sequence.arrival]

    def evict(self, sequence: Sequence, plan: Plan, start: int, *, ends_piece: bool) -> None:
        assert ends_piece, "an evicting prompt is fed in whole pieces only"
        boundary = start - start % plan.quantum + plan.quantum
        end = sequence.num_tokens
        if plan.joins:
            assert start >= plan.prompt or end == plan.prompt or end % plan.quantum == 0
            assert len(sequence.block_table) * self.limits.tokens_per_block >= min(
                sequence.cache_len, plan.budget + plan.quantum
            ), "eviction between pieces bounds what is live, but not below its cap"
        else:
            assert start >= plan.prompt or end == min(plan.prompt, boundary)
        if plan.budget is not None and sequence.cache_len > plan.budget:
            sequence.cache_len = plan.budget
            self.scheduler.trim(sequence)


@settings(max_examples=300, deadline=None)
@given(st.lists(plans, max_size=12), engines)
def test_every_request_finishes_or_is_refused_and_no_block_is_lost(
    work: list[Plan], engine: tuple[int, int, int, int, bool, bool]
) -> None:
    blocks, batch, tokens, size, chunked, reuse = engine
    limits = Limits(
        max_batch_size=batch,
        max_num_tokens=tokens,
        max_seq_len=64,
        tokens_per_block=size,
        enable_chunked_prefill=chunked,
        enable_block_reuse=reuse,
    )
    world = World(work, limits, blocks)
    now = 0
    while world.later or world.live:
        world.arrive(now)
        world.cancel(now)
        world.step()
        now += 1
        assert now < 5000, "no end in sight"
    assert world.done | world.refused | world.cancelled == set(range(len(work)))
    assert world.scheduler.pool.num_used == 0
    for index in world.refused:
        plan = work[index]
        whole = min(plan.prompt, plan.quantum if plan.budget is not None else plan.prompt)
        assert -(-_sequence(index, plan).peak_slots // size) > blocks or whole > tokens, "refused without a reason"
