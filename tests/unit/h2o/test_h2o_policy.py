"""The torch form of H2O against its numpy oracle, and what the oracle itself must say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trtkit.kv.policy import Budget, CachedTokens
from trtkit.spec.errors import UsageError
from trtkit.spec.kv import parse_kv_policy
from trtkit_h2o import DEFAULT_SCORER, H2O
from trtkit_h2o.oracle import LayerOracle, select_positions
from trtkit_h2o.policy import SCORERS


def h2o(tokens, *, sinks=0, recent=0, scorer="sum"):
    return H2O(budget=Budget(tokens=tokens, sinks=sinks, recent=recent, interval=1), scorer=scorer)


def select(policy, mass, positions=None, num_tokens=None):
    mass = torch.tensor(mass, dtype=torch.float32)
    positions = torch.arange(len(mass)) if positions is None else torch.tensor(positions)
    tokens = CachedTokens(positions=positions, mass=mass, num_tokens=num_tokens or int(positions.max()) + 1)
    return positions[policy.select(tokens)].tolist()


@pytest.mark.parametrize("scorer", SCORERS)
def test_torch_selects_what_the_oracle_selects(scorer):
    generator = np.random.default_rng(0)
    for _ in range(200):
        total = int(generator.integers(2, 40))
        live = int(generator.integers(2, total + 1))
        budget = int(generator.integers(1, live))
        sinks = int(generator.integers(0, budget + 1))
        recent = int(generator.integers(0, budget - sinks + 1))
        policy = h2o(budget, sinks=sinks, recent=recent, scorer=scorer)
        positions = generator.permutation(generator.choice(total, live, replace=False))
        # A coarse grid of values makes ties; some mass is NaN.
        mass = generator.integers(0, 4, live).astype(float)
        mass[generator.random(live) < 0.1] = math.nan
        dense = np.zeros(total)
        dense[positions] = mass
        mask = np.zeros(total, dtype=bool)
        mask[positions] = True
        scores = dense / (total - np.arange(total)) if scorer == "mean" else dense
        expected = np.flatnonzero(select_positions(scores.astype(np.float32), mask, total, policy))
        assert sorted(select(policy, mass.tolist(), positions.tolist(), total)) == expected.tolist()


def test_the_mean_scorer_divides_by_the_queries_that_could_see_the_key():
    mass = [4.0, 3.9, 1.5, 1.0]
    assert select(h2o(2, scorer="sum"), mass) == [0, 1]
    assert sorted(select(h2o(2, scorer="mean"), mass)) == [1, 3]


def test_only_the_decay_scorer_forgets():
    assert h2o(1, scorer="decay").watch.decay == 0.98
    assert h2o(1, scorer="sum").watch.decay == h2o(1, scorer="mean").watch.decay == 1.0
    assert h2o(1).watch.queries == "all"


def test_a_spec_builds_the_policy_with_the_default_scorer():
    assert H2O.from_spec(parse_kv_policy("h2o:64")).scorer == DEFAULT_SCORER
    assert H2O.from_spec(parse_kv_policy("h2o:64,scorer=sum")).scorer == "sum"


def test_an_unknown_scorer_is_refused_with_the_ones_there_are():
    with pytest.raises(UsageError, match="unknown scorer 'max'; allowed are sum, mean, decay"):
        H2O.from_spec(parse_kv_policy("h2o:64,scorer=max"))


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, 1.5])
def test_a_decay_outside_zero_and_one_is_refused(decay):
    with pytest.raises(UsageError, match="must be between 0 and 1"):
        H2O(budget=Budget(tokens=4, sinks=0, recent=1, interval=1), scorer="decay", decay=decay)


def random_qkv(generator, count, heads=2, group=2, dim=4):
    return (
        generator.standard_normal((count, heads, group, dim)),
        generator.standard_normal((count, heads, dim)),
        generator.standard_normal((count, heads, dim)),
    )


def test_the_oracles_mass_is_conserved():
    generator = np.random.default_rng(1)
    oracle = LayerOracle(h2o(6, sinks=1, recent=2), kv_heads=2, head_dim=4)
    for step in range(12):
        oracle.feed(*random_qkv(generator, 1))
        oracle.evict()
        np.testing.assert_allclose(oracle.mass.sum(1), (step + 1) * 2)


def test_the_oracle_never_brings_an_evicted_position_back():
    generator = np.random.default_rng(2)
    oracle = LayerOracle(h2o(5, sinks=1, recent=2), kv_heads=2, head_dim=4)
    before = np.zeros((2, 0), dtype=bool)
    for _ in range(15):
        oracle.feed(*random_qkv(generator, 1))
        oracle.evict()
        assert not (oracle.live[:, : before.shape[1]] & ~before).any()
        assert (oracle.live.sum(1) == min(5, oracle.num_tokens)).all()
        before = oracle.live.copy()


@pytest.mark.parametrize("scorer", SCORERS)
def test_the_oracle_scores_a_prompt_as_it_scores_the_same_tokens_one_by_one(scorer):
    queries, keys, values = random_qkv(np.random.default_rng(3), 8)
    whole, stepped = (LayerOracle(h2o(4, scorer=scorer), kv_heads=2, head_dim=4) for _ in range(2))
    whole.feed(queries, keys, values)
    for t in range(8):
        stepped.feed(queries[t : t + 1], keys[t : t + 1], values[t : t + 1])
    np.testing.assert_allclose(whole.scores(), stepped.scores())


def test_the_oracle_keeps_a_single_query_from_scoring_one_key_alone():
    queries, keys, values = random_qkv(np.random.default_rng(4), 6)
    oracle = LayerOracle(h2o(6), kv_heads=2, head_dim=4)
    oracle.feed(queries[:5], keys[:5], values[:5])
    before = oracle.mass.copy()
    oracle.feed(queries[5:], keys[5:], values[5:])
    gained = oracle.mass[:, :5] - before
    assert (gained > 0).all()
