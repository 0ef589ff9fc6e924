"""What every eviction policy must do, ours and anybody's: one row per installed policy, plus one installed here."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from support.dense_oracle import open_small, random_tensors, small_model

from trtkit.kv.policy import CachedTokens, EvictionPolicy
from trtkit.kv.registry import load_policy, policy_names
from trtkit.kv.selection import check_slots
from trtkit.spec.engine import FinishReason, Request
from trtkit.spec.errors import UsageError
from trtkit.spec.kv import parse_kv_policy

SPECS = [
    "h2o:24,scorer=sum",
    "h2o:24,scorer=mean",
    "h2o:24,scorer=decay",
    "h2o:24,sinks=0,recent=0",
    "window:24",
    "window:24,sinks=0",
    "snapkv:24,recent=8",
    "random:24",
    "h2o:1",
    "window:1",
    "snapkv:1",
    "random:1",
]


def load(text):
    policy = load_policy(parse_kv_policy(text), max_seq_len=256)
    assert policy is not None
    return policy


def tokens_for(policy, length=60, rows=(2, 3), seed=0, gap=40):
    """Live slots in no order: sinks and recents among them, as an engine would have kept them."""
    generator = torch.Generator().manual_seed(seed)
    total = length + gap
    budget = policy.budget
    middle = torch.arange(budget.sinks, total - length + budget.sinks)
    positions = torch.empty(*rows, length, dtype=torch.int32)
    for row in positions.view(-1, length):
        dropped = middle[torch.randperm(len(middle), generator=generator)[:gap]]
        live = [p for p in range(total) if p not in set(dropped.tolist())]
        row.copy_(torch.tensor(live)[torch.randperm(length, generator=generator)])
    return CachedTokens(positions=positions, mass=torch.rand(*rows, length, generator=generator), num_tokens=total)


def test_every_installed_policy_is_held_to_this_contract():
    assert {text.partition(":")[0] for text in SPECS} == set(policy_names()) - {"full"}


@pytest.fixture(params=SPECS)
def policy(request):
    return load(request.param)


def test_it_satisfies_the_protocol(policy):
    assert isinstance(policy, EvictionPolicy)
    assert policy.budget.tokens in (1, 24)


@pytest.mark.parametrize("length", [25, 26, 40, 60])
def test_it_keeps_exactly_the_budget_ascending_in_every_row(policy, length):
    kept = policy.select(tokens_for(policy, length))
    assert kept.shape == (2, 3, policy.budget.tokens)
    check_slots(kept, length)


def test_sinks_and_the_recent_window_always_stay(policy):
    for seed in range(10):
        tokens = tokens_for(policy, seed=seed)
        kept = tokens.positions.gather(-1, policy.select(tokens))
        for row in kept.view(-1, policy.budget.tokens).tolist():
            assert set(range(policy.budget.sinks)) <= set(row)
            assert set(range(tokens.num_tokens - policy.budget.recent, tokens.num_tokens)) <= set(row)


def test_it_answers_the_same_twice_and_changes_nothing_it_was_given(policy):
    tokens = tokens_for(policy)
    positions, mass = tokens.positions.clone(), tokens.mass.clone()
    assert torch.equal(policy.select(tokens), policy.select(tokens))
    assert torch.equal(tokens.positions, positions)
    assert torch.equal(tokens.mass, mass)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_masses_that_are_no_numbers_select_nothing_out_of_range(policy, value):
    tokens = tokens_for(policy)
    tokens.mass[..., ::3] = value
    check_slots(policy.select(tokens), 60)
    tokens.mass[:] = value
    check_slots(policy.select(tokens), 60)


def test_the_order_of_slots_does_not_change_what_is_kept(policy):
    tokens = tokens_for(policy)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(9))
    moved = CachedTokens(
        positions=tokens.positions[..., order], mass=tokens.mass[..., order], num_tokens=tokens.num_tokens
    )
    kept = tokens.positions.gather(-1, policy.select(tokens)).sort().values
    kept_moved = moved.positions.gather(-1, policy.select(moved)).sort().values
    assert torch.equal(kept, kept_moved)


def test_in_the_engine_it_holds_the_budget_and_ends_every_request(policy):
    model = small_model()
    kind = {"SinksAndWindow": "window", "ObservationWindow": "snapkv", "RandomKeep": "random"}
    name = kind.get(type(policy).__name__, "h2o")
    with open_small(model, random_tensors(model), f"{name}:{policy.budget.tokens},interval=4") as engine:
        request = Request(request_id="a", prompt_ids=tuple(range(3, 93)), max_tokens=20, ignore_eos=True)
        events = list(engine.generate([request]))
        engine.check()
        assert events[-1].finish is FinishReason.LENGTH
        stats = engine.kv_stats()
        assert stats.evictions > 0
        assert stats.blocks_used == 0


THIRD_PARTY = """
from dataclasses import dataclass
import torch
from trtkit.kv.policy import Budget, Watch, resolve_budget

@dataclass(frozen=True)
class {name}:
    budget: Budget
    watch: Watch = Watch()

    @classmethod
    def from_spec(cls, spec):
        return cls(resolve_budget(spec))

    def select(self, tokens):
        {select}
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a one-file distribution that offers the policy `mine`."""

    def install(select, package="somebodys_policy"):
        (tmp_path / f"{package}.py").write_text(THIRD_PARTY.format(name="Mine", select=select))
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[trtkit.kv_policies]\nmine = {package}:Mine\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, package, raising=False)

    yield install
    for name in ("somebodys_policy", "another_policy"):
        sys.modules.pop(name, None)


OLDEST = "return torch.argsort(tokens.positions, dim=-1)[..., :self.budget.tokens].sort(-1).values"


def generate(engine, *kinds):
    requests = [
        Request(
            request_id=str(i), prompt_ids=tuple(range(3, 73)), max_tokens=20, ignore_eos=True, kv=parse_kv_policy(kind)
        )
        for i, kind in enumerate(kinds)
    ]
    events = list(engine.generate(requests))
    engine.check()
    tokens = {r.request_id: [e.token_id for e in events if e.request_id == r.request_id] for r in requests}
    ends = {e.request_id: e for e in events if e.finish is not None}
    return tokens, ends


def test_a_third_partys_policy_runs_in_the_engine_once_installed(install):
    install(OLDEST)
    assert "mine" in policy_names()
    model = small_model()
    with open_small(model, random_tensors(model), "mine:24,interval=4") as engine:
        _, ends = generate(engine, "mine:24,interval=4")
        assert ends["0"].finish is FinishReason.LENGTH
        assert engine.kv_stats().evictions > 0


def test_two_installed_packages_with_one_name_are_refused(install):
    install(OLDEST)
    install(OLDEST, package="another_policy")
    with pytest.raises(UsageError, match="claimed twice"):
        load("mine:24")


@pytest.mark.parametrize(
    ("select", "reason"),
    [
        ("return torch.zeros(1, dtype=torch.int64)", r"kept \(1,\) slots instead of \(2, 2, 24\)"),
        ("return tokens.positions.argsort(-1, descending=True)[..., :24].flip(-1) * 0", "strictly ascending"),
        ("return tokens.positions.argsort(-1)[..., :24].sort(-1).values + 999", "strictly ascending"),
        ("raise KeyError('lost')", "KeyError"),
    ],
    ids=["wrong shape", "doubled", "out of range", "raises"],
)
def test_a_policy_that_breaks_in_the_middle_ends_its_own_request_only(install, select, reason):
    model = small_model()
    tensors = random_tensors(model)
    with open_small(model, tensors, "h2o:24") as engine:
        expected, _ = generate(engine, "h2o:24", "full")
    install(select)
    with open_small(model, tensors, "h2o:24") as engine:
        tokens, ends = generate(engine, "h2o:24", "full", "mine:24")
        assert engine.kv_stats().blocks_used == 0
    assert ends["2"].finish is FinishReason.ERROR
    assert re.search(reason, ends["2"].error or ""), ends["2"].error
    assert {"0": tokens["0"], "1": tokens["1"]} == expected
