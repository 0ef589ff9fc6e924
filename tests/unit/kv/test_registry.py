from __future__ import annotations

import importlib.metadata
import sys

import pytest

from trtkit.kv.registry import load_policy, policy_names
from trtkit.spec.errors import UsageError
from trtkit.spec.kv import parse_kv_policy


def load(text, max_seq_len=4096, **options):
    return load_policy(parse_kv_policy(text), max_seq_len=max_seq_len, **options)


@pytest.fixture
def entry_points(monkeypatch):
    """Replace the installed policies by (name, value) pairs."""

    def install(*pairs):
        points = [importlib.metadata.EntryPoint(name=n, value=v, group="trtkit.kv_policies") for n, v in pairs]
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)

    return install


def test_the_shipped_policies_are_installed():
    assert policy_names() == ("full", "h2o", "random", "snapkv", "window")


def test_full_is_no_policy():
    assert load("full") is None


def test_h2o_comes_through_the_same_door_as_anybodys_policy():
    assert type(load("h2o:2048")).__module__ == "trtkit_h2o.policy"


def test_a_share_that_nobody_resolved_is_one_of_the_longest_sequence():
    assert load("h2o:50%").budget.tokens == 2048


def test_a_hundred_percent_is_a_budget_that_never_evicts():
    assert load("h2o:100%").budget.tokens == 4096


def test_a_budget_above_the_longest_sequence_is_refused():
    with pytest.raises(UsageError, match=r"budget 5000 is above max_seq_len 4096.*--kv full"):
        load("h2o:5000")


def test_an_open_interval_is_the_engines_block_size():
    assert load("h2o:2048", default_interval=16).budget.interval == 16
    assert load("h2o:2048,interval=5", default_interval=16).budget.interval == 5


def test_an_unknown_policy_is_refused_with_the_installed_ones():
    with pytest.raises(UsageError, match="unknown KV policy 'h20': installed are full, h2o, random, snapkv, window"):
        load("h20:50%")


def test_a_name_that_two_packages_claim_is_refused(entry_points):
    entry_points(("mine", "a:A"), ("mine", "b:B"))
    with pytest.raises(UsageError, match=r"'mine' is claimed twice \(a:A, b:B\); uninstall one"):
        load("mine:50%")


def test_the_same_package_seen_twice_is_no_conflict(entry_points):
    entry_points(("mine", "trtkit_h2o:H2O"), ("mine", "trtkit_h2o:H2O"))
    assert load("mine:50%").budget.tokens == 2048


@pytest.mark.parametrize("value", ["no_such_package_here:X", "trtkit_h2o:NoSuchClass"])
def test_a_package_that_cannot_be_imported_is_one_line(entry_points, value):
    entry_points(("mine", value))
    with pytest.raises(UsageError, match=r"'mine' cannot be loaded from .*reinstall its package"):
        load("mine:50%")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("fractions:Fraction", "needs from_spec"),
        ("_stub:Odd", "is no eviction"),
        ("_stub:Raises", "cannot be built: KeyError"),
    ],
)
def test_an_object_that_is_no_policy_is_one_line(entry_points, monkeypatch, value, reason):
    class Odd:
        from_spec = staticmethod(lambda _spec: 3)

    class Raises:
        from_spec = staticmethod(lambda _spec: {}["budget"])

    monkeypatch.setitem(sys.modules, "_stub", type(sys)("_stub"))
    sys.modules["_stub"].Odd, sys.modules["_stub"].Raises = Odd, Raises
    entry_points(("mine", value))
    with pytest.raises(UsageError, match=reason):
        load("mine:50%")
