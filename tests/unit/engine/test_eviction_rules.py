from __future__ import annotations

import pytest

from trtkit.engine.block_pool import BlockPool
from trtkit.engine.eviction_rules import EvictionRules, beside_decodes, due, failure_line
from trtkit.engine.scheduler import Scheduler
from trtkit.engine.sequence import Sequence
from trtkit.kv.policy import Budget
from trtkit.spec.catalog import model_preset
from trtkit.spec.engine import Request
from trtkit.spec.errors import UsageError
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.plan import Limits

BUDGET = Budget(tokens=20, sinks=2, recent=4, interval=5)
LIMITS = Limits(max_batch_size=4, max_num_tokens=64, max_seq_len=128, tokens_per_block=4)


def rules(kv="full", piece=8):
    scheduler = Scheduler(LIMITS, BlockPool(64))
    return EvictionRules(parse_kv_policy(kv), model_preset("llama-3-70b"), scheduler, lambda *_: piece), scheduler


def sequence(prompt, output, kv):
    request = Request(request_id="a", prompt_ids=(1,) * prompt, max_tokens=output)
    return Sequence(request=request, arrival=0, max_new_tokens=output, kv_policy=parse_kv_policy(kv))


@pytest.mark.parametrize(
    ("num_tokens", "live", "expected"),
    [(30, 20, False), (30, 21, True), (40, 21, True), (41, 21, False), (41, 24, False), (41, 25, True)],
)
def test_prompts_are_cut_above_the_budget_and_decoding_at_budget_plus_interval(num_tokens, live, expected):
    assert due(num_tokens, 40, live, BUDGET) is expected


@pytest.mark.parametrize(("prompt", "output", "evicts"), [(20, 5, False), (20, 6, True), (21, 1, True), (3, 22, False), (3, 23, True)])  # fmt: skip
def test_only_requests_that_can_outgrow_their_budget_are_touched(prompt, output, evicts):
    one = sequence(prompt, output, "h2o:20,interval=5")
    policy = rules()[0].admit(one)
    assert (policy is not None) is one.evicts is evicts
    assert (one.prefill_quantum == 8) is evicts
    assert (one.kv_cap_tokens is not None) is evicts


def test_a_share_is_of_the_requests_own_longest_context():
    one = sequence(60, 20, "h2o:50%,interval=4")
    policy = rules()[0].admit(one)
    assert policy is not None
    assert policy.budget.tokens == 40
    assert one.kv_cap_tokens == 48


def test_rounds_are_counted_and_tail_blocks_freed_down_to_what_is_live():
    found, scheduler = rules()
    one = sequence(40, 20, "h2o:20,interval=5")
    found.admit(one)
    one.block_table = scheduler.pool.allocate(8, "a")
    one.num_tokens, one.cache_len = 36, 30
    found.record(one, BUDGET, [8, 8], 24)
    assert (one.cache_len, len(one.block_table), one.kv_cap_tokens) == (24, 6, 28)
    assert (one.evictions, one.tokens_evicted) == (2, 16)
    assert (found.counters.evictions, found.counters.tokens_evicted, found.counters.blocks_freed) == (2, 16, 2)
    one.num_tokens = 40
    found.record(one, BUDGET, [5], 20)
    assert (one.kv_cap_tokens, len(one.block_table)) == (25, 5)


def test_an_engine_of_an_unknown_policy_does_not_open():
    with pytest.raises(UsageError, match="unknown KV policy"):
        rules("nonesuch:20")


def test_a_piece_finds_room_beside_a_full_batch():
    assert beside_decodes(LIMITS) == 61
    assert beside_decodes(Limits(max_batch_size=64, max_num_tokens=64)) == 1


def test_a_failure_of_many_lines_is_told_in_one():
    assert failure_line(ValueError("a\n  b\nc")) == "KV policy failed: ValueError: a b c"
