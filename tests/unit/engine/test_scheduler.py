"""Who runs next: admission, budgets, preemption."""

from __future__ import annotations

from typing import Any

import pytest

from trtkit.engine.block_pool import BlockPool
from trtkit.engine.scheduler import Scheduler, Step
from trtkit.engine.sequence import PENDING, Sequence, SequenceState
from trtkit.spec.engine import Request
from trtkit.spec.errors import CapacityError, UsageError
from trtkit.spec.plan import Limits


def _scheduler(blocks: int = 16, **limits: Any) -> Scheduler:
    values = {"max_batch_size": 4, "max_num_tokens": 16, "max_seq_len": 64, "tokens_per_block": 4, **limits}
    return Scheduler(Limits(**values), BlockPool(blocks))


def _add(
    scheduler: Scheduler, arrival: int, prompt: int, new: int = 8, *, request_ids: int = 5, **fields: Any
) -> Sequence:
    """Queue a prompt of one id again and again."""
    request = Request(request_id=f"r{arrival}", prompt_ids=(request_ids,) * prompt, max_tokens=new)
    sequence = Sequence(request=request, arrival=arrival, max_new_tokens=new, **fields)
    scheduler.add(sequence)
    return sequence


def _reuser(blocks: int = 16, **limits: Any) -> Scheduler:
    return _scheduler(blocks, enable_block_reuse=True, **limits)


def _run(scheduler: Scheduler) -> Step:
    """Schedule a step and pretend that the model ran it."""
    step = scheduler.schedule()
    scheduler.launched()
    for feed in step.feeds:
        feed.sequence.advance(feed.count)
        if feed.samples:
            feed.sequence.output_ids.append(7)
    scheduler.check()
    return step


def _ran(scheduler: Scheduler, arrival: int, prompt: int, **fields: Any) -> Sequence:
    """Queue a sequence and run a step."""
    sequence = _add(scheduler, arrival, prompt, **fields)
    _run(scheduler)
    return sequence


def _counts(step: Step) -> dict[str, int]:
    return {feed.sequence.request_id: feed.count for feed in step.feeds}


def test_an_idle_scheduler_gives_an_empty_step() -> None:
    assert _scheduler().schedule().feeds == []


def test_prompts_share_a_step_within_its_token_limit() -> None:
    scheduler = _scheduler()
    _add(scheduler, 0, 10)
    _add(scheduler, 1, 10)
    assert _counts(_run(scheduler)) == {"r0": 10, "r1": 6}
    assert _counts(_run(scheduler)) == {"r0": 1, "r1": 4}


def test_only_a_feed_that_reaches_the_last_known_token_samples() -> None:
    scheduler = _scheduler(max_num_tokens=6)
    _add(scheduler, 0, 10)
    assert [feed.samples for feed in _run(scheduler).feeds] == [False]
    assert [feed.samples for feed in _run(scheduler).feeds] == [True]


def test_the_batch_size_bounds_who_runs() -> None:
    scheduler = _scheduler(max_batch_size=2)
    for arrival in range(3):
        _add(scheduler, arrival, 2)
    _run(scheduler)
    assert [s.request_id for s in scheduler.running] == ["r0", "r1"]
    assert not scheduler.can_take_more


def test_a_quantum_is_fed_whole_or_not_at_all() -> None:
    scheduler = _scheduler(max_num_tokens=10)
    _add(scheduler, 0, 4, prefill_quantum=8, evicts=True)
    _add(scheduler, 1, 20, prefill_quantum=8, evicts=True)
    assert _counts(_run(scheduler)) == {"r0": 4}
    assert _counts(_run(scheduler)) == {"r0": 1, "r1": 8}
    last = [_run(scheduler) for _ in range(2)][-1]
    assert _counts(last) == {"r0": 1, "r1": 4}


def test_without_chunked_prefill_a_prompt_waits_until_it_fits_whole() -> None:
    scheduler = _scheduler(max_num_tokens=10, enable_chunked_prefill=False)
    _add(scheduler, 0, 6)
    _add(scheduler, 1, 6)
    assert _counts(_run(scheduler)) == {"r0": 6}
    assert _counts(_run(scheduler)) == {"r0": 1, "r1": 6}


def test_a_prompt_over_the_token_limit_is_refused_without_chunked_prefill() -> None:
    with pytest.raises(UsageError, match="chunked prefill"):
        _add(_scheduler(enable_chunked_prefill=False), 0, 17)


def test_a_request_that_can_never_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(CapacityError, match=r"needs 5 KV blocks \(20 tokens\), the pool has 4"):
        _add(_scheduler(blocks=4), 0, 13, new=8)


def test_the_cap_of_an_evicting_request_lets_it_in() -> None:
    scheduler = _scheduler(blocks=4)
    _add(scheduler, 0, 40, new=8, kv_cap_tokens=16, prefill_quantum=4, evicts=True)
    assert scheduler.has_work


def test_the_latest_arrival_gives_way_when_blocks_run_out() -> None:
    scheduler = _scheduler(blocks=5)
    first, second = _add(scheduler, 0, 4, new=12), _add(scheduler, 1, 4, new=12)
    preempted: list[str] = []
    while second.state is not SequenceState.WAITING or not preempted:
        preempted += [s.request_id for s in _run(scheduler).preempted]
    assert preempted == ["r1"]
    assert second.output_ids
    assert (second.num_tokens, second.block_table, second.preemptions) == (0, [], 1)
    assert first.state is SequenceState.RUNNING


def test_a_preempted_request_comes_back_before_later_ones() -> None:
    scheduler = _scheduler(blocks=5)
    first = _add(scheduler, 0, 4, new=12)
    _add(scheduler, 1, 4, new=12)
    while not _run(scheduler).preempted:
        pass
    _add(scheduler, 2, 4, new=2)
    scheduler.finish(first)
    step = _run(scheduler)
    assert step.feeds[0].sequence.request_id == "r1"
    assert step.feeds[0].count == step.feeds[0].sequence.known_len - 1, "prompt and output are fed together"


def test_trim_frees_only_whole_tail_blocks() -> None:
    scheduler = _scheduler()
    sequence = _add(scheduler, 0, 16)
    _run(scheduler)
    sequence.cache_len = 9
    assert scheduler.trim(sequence) == 1
    assert len(sequence.block_table) == 3
    scheduler.check()


def test_finish_takes_out_a_waiting_sequence_too() -> None:
    scheduler = _scheduler()
    sequence = _add(scheduler, 0, 4)
    scheduler.finish(sequence)
    assert not scheduler.has_work
    assert sequence.state is SequenceState.FINISHED


def test_a_newcomer_is_not_admitted_onto_blocks_that_running_prompts_still_need() -> None:
    scheduler = _scheduler(blocks=8, max_num_tokens=8)
    _add(scheduler, 0, 24, new=1)
    _add(scheduler, 1, 8, new=1)
    _run(scheduler)
    _run(scheduler)
    assert [s.request_id for s in scheduler.running] == ["r0"]


def test_a_prompt_starts_on_the_blocks_that_hold_its_beginning() -> None:
    scheduler = _reuser()
    scheduler.finish(_ran(scheduler, 0, 10))
    second = _add(scheduler, 1, 12)
    step = _run(scheduler)
    assert _counts(step) == {"r1": 4}, "two blocks of the first prompt were full"
    assert len(step.new_blocks) == 1, "what was found must not be cleared"
    assert (second.num_tokens, second.cache_len, second.reused_tokens) == (12, 12, 8)
    assert scheduler.prompt_tokens_reused == 8


def test_one_token_of_a_known_prompt_is_computed_all_the_same() -> None:
    scheduler = _reuser()
    scheduler.finish(_ran(scheduler, 0, 8))
    _add(scheduler, 1, 8)
    step = _run(scheduler)
    assert _counts(step) == {"r1": 4}
    assert [feed.samples for feed in step.feeds] == [True]


def test_prompts_of_one_step_share_what_that_step_computes() -> None:
    scheduler = _reuser()
    first, second = _add(scheduler, 0, 10), _add(scheduler, 1, 10)
    assert _counts(_run(scheduler)) == {"r0": 10, "r1": 2}
    assert first.block_table[:2] == second.block_table[:2]
    assert scheduler.pool.num_used == 4


def test_without_block_reuse_nothing_is_shared() -> None:
    scheduler = _scheduler()
    scheduler.finish(_ran(scheduler, 0, 10))
    _add(scheduler, 1, 10)
    assert _counts(_run(scheduler)) == {"r1": 10}
    assert (scheduler.prompt_tokens_reused, scheduler.pool.num_idle) == (0, 0)


def test_blocks_that_somebody_owns_cost_a_newcomer_nothing() -> None:
    scheduler = _reuser(blocks=8, max_num_tokens=64)
    _ran(scheduler, 0, 20, new=1)
    _add(scheduler, 1, 21, new=1)
    assert _counts(_run(scheduler)) == {"r0": 1, "r1": 1}, "it needs one block of its own beside what r0 may need"
    plain = _scheduler(blocks=8, max_num_tokens=64)
    _ran(plain, 0, 20, new=1)
    _add(plain, 1, 21, new=1)
    assert _counts(_run(plain)) == {"r0": 1}


def test_blocks_that_nobody_owns_are_still_memory_that_a_newcomer_takes() -> None:
    scheduler = _reuser(blocks=8, max_num_tokens=64)
    scheduler.finish(_ran(scheduler, 0, 16, new=1))
    _ran(scheduler, 1, 9, new=1, request_ids=9)
    assert scheduler.pool.num_free == 5
    third = _add(scheduler, 2, 24, new=1)
    assert _counts(_run(scheduler)) == {"r1": 1}, "it needs six blocks; that four of them hold its prompt saves none"
    assert third.state is SequenceState.WAITING


def test_a_preempted_request_takes_up_its_own_blocks_again() -> None:
    scheduler = _reuser(blocks=6)
    first, second = _add(scheduler, 0, 4, new=16), _add(scheduler, 1, 4, new=12, request_ids=9)
    while not _run(scheduler).preempted:
        pass
    assert (second.num_tokens, second.published, second.block_table) == (0, 0, [])
    reused = scheduler.prompt_tokens_reused
    scheduler.finish(first)
    step = _run(scheduler)
    assert step.feeds[0].sequence is second
    assert second.reused_tokens == 8
    assert step.feeds[0].count == second.known_len - 1 - 8
    assert scheduler.prompt_tokens_reused == reused, "only what a prompt saved at first is counted"


def test_a_preempted_request_waits_for_its_token_in_flight() -> None:
    scheduler = _reuser()
    _ran(scheduler, 0, 4)
    preempted = _add(scheduler, 1, 4, request_ids=9)
    preempted.output_ids.append(PENDING)
    assert _counts(_run(scheduler)) == {"r0": 1}
    preempted.output_ids[0] = 7
    assert _counts(_run(scheduler)) == {"r0": 1, "r1": 5}


def test_what_was_fed_in_place_of_the_last_token_is_not_taken_for_it() -> None:
    scheduler = _reuser()
    sequence = _ran(scheduler, 0, 7)
    sequence.advance(1)  # a guess; the token drawn there was another one, and the last
    scheduler.finish(sequence)
    assert scheduler.pool.num_idle == 1


def test_blocks_that_others_may_read_cannot_be_trimmed() -> None:
    scheduler = _reuser()
    sequence = _ran(scheduler, 0, 8)
    sequence.cache_len = 4
    with pytest.raises(AssertionError, match="blocks that others may read stay"):
        scheduler.trim(sequence)


def test_a_request_without_chunked_prefill_feeds_what_is_left_at_once() -> None:
    scheduler = _reuser(max_num_tokens=12, enable_chunked_prefill=False)
    scheduler.finish(_ran(scheduler, 0, 9))
    _add(scheduler, 1, 12)
    assert _counts(_run(scheduler)) == {"r1": 4}


def test_a_step_that_was_never_launched_is_forgotten() -> None:
    scheduler = _reuser()
    sequence = _add(scheduler, 0, 10)
    scheduler.schedule()
    scheduler.finish(sequence)
    scheduler.abandon()
    _add(scheduler, 1, 10)
    assert _counts(_run(scheduler)) == {"r1": 10}


def test_an_evicting_request_neither_finds_nor_leaves_blocks() -> None:
    scheduler = _reuser()
    evicting = {"prefill_quantum": 8, "evicts": True, "kv_cap_tokens": 16}
    scheduler.finish(_ran(scheduler, 0, 8, **evicting))
    assert scheduler.pool.num_idle == 0
    scheduler.finish(_ran(scheduler, 1, 8))
    _add(scheduler, 2, 8, **evicting)
    assert _counts(_run(scheduler)) == {"r2": 8}
