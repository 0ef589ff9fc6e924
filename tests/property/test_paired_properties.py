"""What must hold of a paired comparison whatever the scores are."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trtkit.quality.paired import Verdict, compare_paired, holm

binary = st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=2, max_size=120)
real = st.lists(st.tuples(*[st.floats(-50, 50, allow_nan=False)] * 2), min_size=2, max_size=60)
OPPOSITE = {
    Verdict.BETTER: Verdict.WORSE,
    Verdict.WORSE: Verdict.BETTER,
    Verdict.SAME: Verdict.SAME,
    Verdict.UNDECIDED: Verdict.UNDECIDED,
}


def columns(pairs: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [a for a, _ in pairs], [b for _, b in pairs]


@settings(max_examples=150)
@given(st.one_of(binary, real))
def test_swapping_the_engines_turns_everything_around(pairs: list[tuple[float, float]]) -> None:
    a, b = columns(pairs)
    there, back = compare_paired(a, b, margin=0.05), compare_paired(b, a, margin=0.05)
    assert there.difference == pytest.approx(-back.difference)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=1e-9)
    assert there.p_value == pytest.approx(back.p_value)
    assert (there.wins, there.losses) == (back.losses, back.wins)
    assert there.verdict is OPPOSITE[back.verdict]


@settings(max_examples=150)
@given(st.one_of(binary, real))
def test_an_engine_is_never_better_or_worse_than_itself(pairs: list[tuple[float, float]]) -> None:
    a, _ = columns(pairs)
    result = compare_paired(a, a, margin=0.05)
    assert (result.difference, result.p_value) == (0.0, 1.0)
    assert result.verdict in (Verdict.SAME, Verdict.UNDECIDED)


@settings(max_examples=150)
@given(binary)
def test_the_interval_holds_the_difference_and_the_p_value_is_scipys(pairs: list[tuple[float, float]]) -> None:
    a, b = columns(pairs)
    result = compare_paired(a, b, margin=0.05)
    assert -1 <= result.low <= result.difference <= result.high <= 1
    discordant = result.wins + result.losses
    assert result.p_value == pytest.approx(stats.binomtest(result.wins, discordant).pvalue if discordant else 1.0)
    assert (result.needed is not None) is (result.verdict is Verdict.UNDECIDED)


@settings(max_examples=100)
@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=20))
def test_holm_never_lowers_a_p_value_nor_changes_their_order(p_values: dict[str, float]) -> None:
    adjusted = holm(p_values)
    assert all(p_values[key] <= adjusted[key] <= 1 for key in p_values)
    ordered = sorted(p_values, key=p_values.__getitem__)
    assert [adjusted[key] for key in ordered] == sorted(adjusted.values())
