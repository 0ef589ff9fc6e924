"""Any scores, any slots, any counts: what a selection and its compaction must always be."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trtkit.kv.moves import plan_moves
from trtkit.kv.policy import Budget
from trtkit.kv.ranking import keep_best
from trtkit.kv.selection import check_slots
from trtkit_h2o.oracle import select_positions
from trtkit_h2o.policy import H2O

SCORES = st.one_of(
    st.sampled_from([0.0, 1.0, 2.0, math.nan, math.inf, -math.inf]), st.floats(0, 100, width=32, allow_nan=False)
)


@st.composite
def caches(draw):
    """Budget, live positions in any order, and their scores; more live tokens than the budget keeps."""
    tokens = draw(st.integers(1, 20))
    sinks = draw(st.integers(0, tokens))
    recent = draw(st.integers(0, tokens - sinks))
    live = draw(st.integers(tokens + 1, tokens + 20))
    total = live + draw(st.integers(0, 20))
    positions = draw(st.permutations(range(total)))[:live]
    scores = draw(st.lists(SCORES, min_size=live, max_size=live))
    return Budget(tokens=tokens, sinks=sinks, recent=recent, interval=1), positions, scores, total


@settings(max_examples=150, deadline=None, derandomize=True)
@given(caches())
def test_any_selection_is_ascending_complete_and_what_the_oracle_keeps(cache):
    budget, positions, scores, total = cache
    slots = keep_best(torch.tensor([scores]), torch.tensor([positions]), total, budget)
    check_slots(slots, len(positions))
    kept = {positions[slot] for slot in slots[0].tolist()}
    assert len(kept) == budget.tokens
    dense, live = np.zeros(total), np.zeros(total, dtype=bool)
    dense[list(positions)], live[list(positions)] = scores, True
    expected = select_positions(dense, live, total, H2O(budget=budget, scorer="sum"))
    assert kept == set(np.flatnonzero(expected).tolist())


@settings(max_examples=150, deadline=None, derandomize=True)
@given(caches())
def test_any_compaction_leaves_exactly_what_was_kept_in_front(cache):
    budget, positions, scores, total = cache
    slots = keep_best(torch.tensor([scores]), torch.tensor([positions]), total, budget)
    moves = plan_moves(slots, len(positions))
    row = torch.tensor([positions])
    row[moves.rows, moves.targets] = row[moves.rows, moves.sources]
    assert sorted(row[0, : moves.kept].tolist()) == sorted(positions[slot] for slot in slots[0].tolist())
    assert len(moves.rows) <= len(positions) - budget.tokens
