from __future__ import annotations

import pytest
import torch

from trtkit.kv.baselines import ObservationWindow, RandomKeep, SinksAndWindow
from trtkit.kv.policy import CachedTokens
from trtkit.spec.errors import UsageError
from trtkit.spec.kv import parse_kv_policy


def tokens(count=40, rows=3):
    mass = torch.rand(rows, count, generator=torch.Generator().manual_seed(0))
    return CachedTokens(positions=torch.arange(count).expand(rows, count), mass=mass, num_tokens=count)


def test_the_window_is_sinks_and_the_newest():
    policy = SinksAndWindow.from_spec(parse_kv_policy("window:12"))
    assert policy.watch.queries == "none"
    assert policy.select(tokens())[0].tolist() == [*range(policy.budget.sinks), *range(40 - policy.budget.recent, 40)]
    assert policy.budget.heavy == 0


def test_a_window_budget_that_contradicts_its_parts_is_refused():
    with pytest.raises(UsageError, match=r"4 \+ 8 is not 20; leave recent out"):
        SinksAndWindow.from_spec(parse_kv_policy("window:20,recent=8,sinks=4"))


def test_a_window_that_spells_out_its_parts_is_taken():
    budget = SinksAndWindow.from_spec(parse_kv_policy("window:20,recent=16,sinks=4")).budget
    assert (budget.sinks, budget.recent) == (4, 16)


def test_snapkv_observes_through_its_protected_window():
    policy = ObservationWindow.from_spec(parse_kv_policy("snapkv:100,recent=8"))
    assert (policy.watch.queries, policy.watch.window) == ("last", 8)


def test_snapkv_without_a_window_is_refused():
    with pytest.raises(UsageError, match="recent window, which must be at least 1"):
        ObservationWindow.from_spec(parse_kv_policy("snapkv:100,recent=0"))


def test_random_keeps_the_same_tokens_every_time_and_others_per_head():
    policy = RandomKeep.from_spec(parse_kv_policy("random:12,recent=2,sinks=1"))
    kept = policy.select(tokens())
    assert torch.equal(kept, policy.select(tokens()))
    assert kept[0].tolist() != kept[1].tolist()
    assert not torch.equal(kept, RandomKeep(budget=policy.budget, seed=1).select(tokens()))


def test_random_spreads_over_the_whole_context():
    policy = RandomKeep.from_spec(parse_kv_policy("random:1000,recent=0,sinks=0"))
    kept = policy.select(tokens(count=4000, rows=1))[0]
    halves = torch.histc(kept.float(), bins=4, min=0, max=4000)
    assert ((halves > 200) & (halves < 300)).all(), halves


@pytest.mark.parametrize("kind", ["window", "snapkv", "random"])
def test_a_scorer_where_there_is_none_is_refused(kind):
    factory = {"window": SinksAndWindow, "snapkv": ObservationWindow, "random": RandomKeep}[kind]
    with pytest.raises(UsageError, match="has no scorer, but scorer=sum was given"):
        factory.from_spec(parse_kv_policy(f"{kind}:50,scorer=sum"))


def test_random_keeps_the_same_whether_asked_about_all_layers_or_one_after_the_other():
    policy = RandomKeep.from_spec(parse_kv_policy("random:12,recent=2,sinks=2"))
    positions, mass = torch.arange(40).expand(3, 2, 40), torch.zeros(3, 2, 40)
    whole = policy.select(CachedTokens(positions=positions, mass=mass, num_tokens=40))
    for layer in range(3):
        one = CachedTokens(
            positions=positions[layer : layer + 1], mass=mass[layer : layer + 1], num_tokens=40, first_row=2 * layer
        )
        assert torch.equal(policy.select(one)[0], whole[layer])
    assert not torch.equal(whole[0], whole[1])
