from __future__ import annotations

import pytest

from trtkit.kv.policy import Budget, Watch, resolve_budget
from trtkit.spec.errors import UsageError
from trtkit.spec.kv import KVPolicySpec


def spec(**options):
    return KVPolicySpec(kind="h2o", **options)


def test_open_counts_are_four_sinks_and_half_of_the_rest_recent():
    assert resolve_budget(spec(budget=2048)) == Budget(tokens=2048, sinks=4, recent=1022, interval=32)


def test_given_counts_are_taken_as_they_are():
    budget = resolve_budget(spec(budget=100, sinks=0, recent=0, interval=7))
    assert budget == Budget(tokens=100, sinks=0, recent=0, interval=7)
    assert budget.heavy == 100


@pytest.mark.parametrize("tokens", range(1, 70))
def test_any_budget_resolves_without_contradiction(tokens):
    budget = resolve_budget(spec(budget=tokens))
    assert budget.tokens == tokens
    assert budget.sinks + budget.recent <= tokens
    assert budget.recent >= 1, "the newest token is always kept by default"


@pytest.mark.parametrize("tokens", range(1, 40))
def test_default_sinks_make_room_for_the_recent_window_asked_for(tokens):
    assert resolve_budget(spec(budget=tokens, recent=tokens)).heavy == 0


def test_a_budget_below_its_protected_tokens_is_refused():
    with pytest.raises(UsageError, match=r"budget 10 is below sinks \+ recent = 12; raise the budget to at least 12"):
        Budget(tokens=10, sinks=4, recent=8, interval=1)


def test_sinks_that_exceed_the_budget_with_nothing_else_given_are_refused():
    with pytest.raises(UsageError, match="below sinks"):
        resolve_budget(spec(budget=4, sinks=5))


@pytest.mark.parametrize("counts", [(0, 0, 0, 1), (4, -1, 0, 1), (4, 0, -1, 1), (4, 0, 0, 0)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(UsageError, match="positive"):
        Budget(**dict(zip(("tokens", "sinks", "recent", "interval"), counts, strict=True)))


def test_a_share_must_be_resolved_before_a_policy_sees_it():
    with pytest.raises(UsageError, match="resolve the share to tokens"):
        resolve_budget(spec(budget_fraction=0.5))


@pytest.mark.parametrize(
    "options", [{"queries": "some"}, {"queries": "last"}, {"queries": "all", "window": 3}, {"decay": 0.0}]
)
def test_a_watch_that_means_nothing_is_refused(options):
    with pytest.raises(ValueError, match=r"allowed are|must be in"):
        Watch(**options)
