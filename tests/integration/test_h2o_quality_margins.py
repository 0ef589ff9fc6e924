"""The margins H2O must win by on recall, trained here from a seed: half a minute on one core."""

from __future__ import annotations

import numpy as np
import pytest

from bench.h2o_quality import POLICIES, REGIMES, desynchronised, spelled
from bench.h2o_tasks import (
    DISTANCE_STAGES,
    RECALL_STAGES,
    accuracy,
    distance_examples,
    open_toy,
    recall_examples,
    train,
)
from trtkit.kv.registry import load_policy
from trtkit.spec.kv import parse_kv_policy

SEQUENCES = 12


@pytest.fixture(scope="module")
def recall_toy():
    return train(RECALL_STAGES, seed=3, limit_s=3600, goal=0.99)


def recalled(toy, policy, *, budget=48, regime="after questions", zipf=1.5, interval=1):
    kv = "full" if policy == "full" else spelled(policy, budget, interval)
    examples = recall_examples(np.random.default_rng(4), SEQUENCES, zipf=zipf)
    with open_toy(toy, kv, sequences=SEQUENCES) as engine:
        found, _ = accuracy(engine, examples, pieces=REGIMES[regime])
        assert policy == "full" or engine.kv_stats().evictions > 0, "nothing was evicted, so nothing was measured"
    return found


@pytest.mark.slow
def test_h2o_beats_window_and_random_by_wide_margins_at_an_eighth_of_the_context(recall_toy):
    h2o = recalled(recall_toy, "H2O mean")
    assert recalled(recall_toy, "full") > 0.97
    assert h2o - recalled(recall_toy, "sinks + window") >= 0.5
    assert h2o - recalled(recall_toy, "random") >= 0.4


@pytest.mark.slow
def test_scorers_that_correct_for_age_lose_nothing_against_the_sum(recall_toy):
    for regime in REGIMES:
        plain = recalled(recall_toy, "H2O sum", regime=regime)
        assert recalled(recall_toy, "H2O mean", regime=regime) >= plain - 0.02
        assert recalled(recall_toy, "H2O decay", regime=regime) >= plain - 0.02


@pytest.mark.slow
def test_evicting_every_32_steps_costs_at_most_five_points(recall_toy):
    assert recalled(recall_toy, "H2O mean", interval=32) >= recalled(recall_toy, "H2O mean") - 0.05


@pytest.mark.slow
def test_random_is_worth_about_its_share_of_the_pairs(recall_toy):
    assert recalled(recall_toy, "random", zipf=0.0) < 0.35


@pytest.mark.slow
def test_recall_needs_positions_less_than_the_distance_task_does(recall_toy):
    """Why recall alone proves little: a classic position fault wrecks the distance task, and recall hardly shows it."""
    toy = train(DISTANCE_STAGES, seed=3, limit_s=3600, goal=0.98)
    examples = distance_examples(np.random.default_rng(5), SEQUENCES)
    kv = spelled("H2O mean", 48, 1)
    with open_toy(toy, kv, sequences=SEQUENCES) as engine:
        sound, _ = accuracy(engine, examples)
    with desynchronised(), open_toy(toy, kv, sequences=SEQUENCES) as engine:
        broken, _ = accuracy(engine, examples)
    assert sound > 0.95
    assert broken < 0.3


def test_every_row_of_the_quality_table_is_a_policy_of_the_budget_it_names():
    for policy in POLICIES:
        for budget in (24, 48, 96):
            loaded = load_policy(parse_kv_policy(spelled(policy, budget, 1)), max_seq_len=384)
            assert loaded is not None
            assert (loaded.budget.tokens, loaded.budget.interval) == (budget, 1)
