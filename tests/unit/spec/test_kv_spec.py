"""KV policies as people write them, and what is refused."""

from __future__ import annotations

import pytest

from trtkit.spec.errors import UsageError
from trtkit.spec.kv import KVPolicySpec, parse_kv_policy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("full", KVPolicySpec()),
        ("", KVPolicySpec()),
        (" Full ", KVPolicySpec()),
        ("full:", KVPolicySpec()),
        ("h2o:50%", KVPolicySpec(kind="h2o", budget_fraction=0.5)),
        ("h2o:12.5%", KVPolicySpec(kind="h2o", budget_fraction=0.125)),
        ("h2o:29%", KVPolicySpec(kind="h2o", budget_fraction=0.29)),
        ("h2o:100%", KVPolicySpec(kind="h2o", budget_fraction=1.0)),
        ("h2o:2048", KVPolicySpec(kind="h2o", budget=2048)),
        ("H2O:budget=2048", KVPolicySpec(kind="h2o", budget=2048)),
        ("h2o:budget=25%", KVPolicySpec(kind="h2o", budget_fraction=0.25)),
        (
            "h2o:budget=2048,recent=512,sinks=4,scorer=mean,interval=64",
            KVPolicySpec(kind="h2o", budget=2048, recent=512, sinks=4, scorer="mean", interval=64),
        ),
        (" h2o : 2048 , sink = 4 , beta=32 ", KVPolicySpec(kind="h2o", budget=2048, sinks=4, interval=32)),
        ("h2o:64,recent=0,sinks=0", KVPolicySpec(kind="h2o", budget=64, recent=0, sinks=0)),
        ("mine:10", KVPolicySpec(kind="mine", budget=10)),
    ],
)
def test_policies_are_read_as_people_write_them(text: str, expected: KVPolicySpec) -> None:
    assert parse_kv_policy(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h2o", "needs one budget"),
        ("h2o:", "needs one budget"),
        ("h2o:50%,budget=20", "needs one budget"),
        ("h2o:0", "0 tokens, must be at least 1"),
        ("h2o:-5", "-5 tokens, must be at least 1"),
        ("h2o:0%", "above 0%"),
        ("h2o:101%", "at most 100%"),
        ("h2o:nan%", "budget is 'nan%', expected int"),
        ("h2o:half", "budget is 'half', expected int"),
        ("h2o:2048.5", "budget is '2048.5', expected int"),
        ("h2o:64,recent=x", "recent is 'x', expected int"),
        ("h2o:64,window=3", "unknown option 'window'; allowed are budget, recent, sinks, interval, scorer"),
        ("h2o:64,budget=32", "budget is given twice"),
        ("h2o:64,recent=8,recent=8", "recent is given twice"),
        ("h2o:64,sink=1,sinks=1", "sinks is given twice"),
        ("h2o:64,recent=-1", "must not be negative"),
        ("h2o:64,interval=0", "interval is 0, must be at least 1"),
        ("h2o:64,recent=60,sinks=5", r"below sinks \+ recent = 65; raise the budget to at least 65"),
        ("full:50%", "'full' keeps everything and takes no budget_fraction"),
        ("full:recent=3", "takes no recent"),
    ],
)
def test_a_wrong_policy_is_one_line(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_kv_policy(text)
    assert "\n" not in str(caught.value)


def test_protecting_exactly_the_budget_is_allowed() -> None:
    assert parse_kv_policy("h2o:64,recent=60,sinks=4").budget == 64


@pytest.mark.parametrize(
    ("share", "context", "budget"), [(0.5, 1000, 500), (0.5, 3, 1), (0.29, 100, 29), (1.0, 777, 777), (0.001, 100, 1)]
)
def test_a_share_resolves_to_whole_tokens(share: float, context: int, budget: int) -> None:
    resolved = KVPolicySpec(kind="h2o", budget_fraction=share, scorer="sum").resolved(context)
    assert (resolved.budget, resolved.budget_fraction, resolved.scorer) == (budget, None, "sum")


def test_a_share_is_never_resolved_below_what_it_protects() -> None:
    policy = KVPolicySpec(kind="h2o", budget_fraction=0.5, recent=60, sinks=4)
    assert [policy.resolved(tokens).budget for tokens in (100, 128, 130)] == [64, 64, 65]


def test_a_budget_in_tokens_and_full_resolve_to_themselves() -> None:
    for policy in (KVPolicySpec(), KVPolicySpec(kind="h2o", budget=7)):
        assert policy.resolved(100) is policy


@pytest.mark.parametrize("text", ["full", "h2o:50%", "h2o:12.5%", "h2o:100%", "h2o:budget=64,recent=8,sinks=4"])
def test_the_label_is_the_short_spelling(text: str) -> None:
    assert parse_kv_policy(text).label == text
