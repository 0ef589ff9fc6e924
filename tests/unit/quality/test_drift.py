"""Drift from a reference: agreement and a KL bound that never overstates."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from support.fake_scorer import BigramEngine

from trtkit.quality.drift import agreement, force, kl_lower_bound, mean_kl
from trtkit.quality.scoring import ContinuationScorer
from trtkit.spec.kv import KVPolicySpec

PAIRS = [((5, 6, 7), (8, 9)), ((1, 2, 3, 4), (5,))]


def forced(engine: BigramEngine):
    context = ContinuationScorer(scorer=engine, info=engine.info)
    return force(context, PAIRS), context


def test_an_engine_does_not_drift_from_itself() -> None:
    a, _ = forced(BigramEngine())
    b, _ = forced(BigramEngine())
    assert [agreement(x, y) for x, y in zip(a, b, strict=True)] == [1, 1]
    assert [mean_kl(x, y) for x, y in zip(a, b, strict=True)] == pytest.approx([0, 0], abs=1e-12)


def test_a_damaged_engine_drifts() -> None:
    a, _ = forced(BigramEngine())
    b, _ = forced(BigramEngine(scale=1.02))
    kl = [mean_kl(x, y) for x, y in zip(a, b, strict=True)]
    assert min(kl) > 1e-5
    other, _ = forced(BigramEngine(seed=1))
    assert min(mean_kl(x, y) for x, y in zip(a, other, strict=True)) > 100 * max(kl)


def test_the_prompt_is_evicted_before_its_last_token() -> None:
    engine = BigramEngine(kv=KVPolicySpec(kind="window", budget=2))
    _, context = forced(engine)
    assert [r.chunk_ends for r in engine.scored] == [(2,), (3,)]
    assert (context.counts.contexts, context.counts.acted, context.counts.evictions) == (2, 1, 1)


def tops(p: np.ndarray, k: int) -> tuple[tuple[int, float], ...]:
    return tuple((int(i), float(math.log(p[i]))) for i in np.argsort(-p)[:k])


distributions = st.lists(st.floats(0.01, 10), min_size=8, max_size=8).map(lambda v: np.array(v) / sum(v))


@settings(max_examples=200)
@given(distributions, distributions, st.integers(1, 8))
def test_the_bound_is_never_above_the_true_divergence(p: np.ndarray, q: np.ndarray, k: int) -> None:
    bound = kl_lower_bound(tops(p, k), tops(q, k))
    assert 0 <= bound <= entropy(p, q) + 1e-6
    if k == 8:
        assert bound == pytest.approx(entropy(p, q), abs=1e-6)
