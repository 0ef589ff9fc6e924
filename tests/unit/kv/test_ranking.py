from __future__ import annotations

import math

import pytest
import torch

from trtkit.kv.policy import Budget
from trtkit.kv.ranking import keep_best


def keep(scores, *, tokens, sinks=0, recent=0, positions=None, num_tokens=None):
    """Kept positions of one row."""
    positions = torch.arange(len(scores)) if positions is None else torch.tensor(positions)
    num_tokens = int(positions.max()) + 1 if num_tokens is None else num_tokens
    budget = Budget(tokens=tokens, sinks=sinks, recent=recent, interval=1)
    slots = keep_best(torch.tensor([scores], dtype=torch.float32), positions[None], num_tokens, budget)
    assert slots.tolist()[0] == sorted(set(slots.tolist()[0])), "slots must be ascending and distinct"
    return sorted(positions[slots[0]].tolist())


def test_exactly_the_heaviest_of_the_unprotected_tokens_survive():
    assert keep([0, 9, 1, 8, 2, 7, 0, 0], tokens=5, sinks=1, recent=2) == [0, 1, 3, 6, 7]


def test_the_token_that_just_left_the_recent_window_competes_at_once():
    assert keep([5, 1, 2, 99, 0, 0], tokens=3, recent=2) == [3, 4, 5]


def test_the_newest_token_is_protected_even_without_any_score():
    assert keep([9, 8, 7, 6, 0], tokens=2, recent=1) == [0, 4]


def test_a_sink_that_scores_nothing_stays():
    assert keep([0, 9, 8, 7], tokens=2, sinks=1) == [0, 1]


def test_equal_scores_keep_the_newer_token():
    assert keep([1, 1, 1, 1, 1], tokens=2) == [3, 4]


def test_equal_scores_keep_the_newer_token_whatever_the_slot_order():
    assert keep([1, 1, 1, 1], tokens=2, positions=[7, 2, 9, 4]) == [7, 9]


def test_protection_goes_by_position_and_not_by_slot():
    assert keep([5, 0, 6, 0], tokens=3, sinks=1, recent=1, positions=[4, 9, 3, 0]) == [0, 3, 9]


def test_a_window_without_heavy_hitters_is_the_window():
    assert keep([9, 9, 9, 9, 9, 9], tokens=4, sinks=1, recent=3) == [0, 3, 4, 5]


def test_a_budget_of_one_keeps_the_heaviest():
    assert keep([1, 3, 2], tokens=1) == [1]


def test_nan_is_evicted_first_and_displaces_nothing():
    assert keep([math.nan, 1, -5, math.nan], tokens=2) == [1, 2]


def test_a_row_of_nan_keeps_the_newest_in_range():
    assert keep([math.nan] * 5, tokens=2) == [3, 4]


def test_infinite_scores_never_push_out_a_protected_token():
    assert keep([0, math.inf, math.inf, math.inf, 0], tokens=3, sinks=1, recent=1) == [0, 3, 4]


def test_minus_infinity_ranks_above_nan_and_below_numbers():
    assert keep([-math.inf, math.nan, -1], tokens=2) == [0, 2]


@pytest.mark.parametrize("rows", [(1,), (3,), (2, 4)])
def test_rows_decide_alone(rows):
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(*rows, 20, generator=generator)
    positions = torch.arange(20).expand(*rows, 20)
    budget = Budget(tokens=7, sinks=2, recent=3, interval=1)
    together = keep_best(scores, positions, 20, budget).reshape(-1, 7)
    for row, alone in zip(scores.reshape(-1, 20), together, strict=True):
        assert keep_best(row, torch.arange(20), 20, budget).tolist() == alone.tolist()
