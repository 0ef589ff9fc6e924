"""Sampling: filters, seeds, and what a draw depends on."""

from __future__ import annotations

import collections

import pytest
import torch

from trtkit.engine.sampler import NOT_A_NUMBER, fresh_seed, sample, uniform
from trtkit.spec.engine import Sampling

LOGITS = torch.tensor([[0.0, 3.0, 2.0, 1.0]])


def _counts(how: Sampling, draws: int = 300) -> dict[int, int]:
    rows = LOGITS.expand(draws, -1)
    return collections.Counter(sample(rows, [how] * draws, [(7, i) for i in range(draws)]))


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert sample(torch.tensor([[1.0, 5.0, 5.0]]), [Sampling()], [(0, 0)]) == [1]


def test_frequencies_follow_the_softmax() -> None:
    counts = _counts(Sampling(temperature=1.0), 2000)
    for token, probability in enumerate(LOGITS[0].softmax(0).tolist()):
        assert counts[token] / 2000 == pytest.approx(probability, abs=0.04)


def test_a_low_temperature_is_almost_greedy() -> None:
    assert set(_counts(Sampling(temperature=0.01))) == {1}


def test_top_k_leaves_k_tokens() -> None:
    assert set(_counts(Sampling(temperature=5.0, top_k=2))) == {1, 2}
    assert set(_counts(Sampling(temperature=5.0, top_k=99))) == {0, 1, 2, 3}


def test_top_p_leaves_the_shortest_head_that_reaches_it() -> None:
    # The probabilities, sorted, are 0.644, 0.237, 0.087, 0.032.
    assert set(_counts(Sampling(temperature=1.0, top_p=0.5))) == {1}
    assert set(_counts(Sampling(temperature=1.0, top_p=0.7))) == {1, 2}


def test_a_draw_depends_on_seed_and_index_alone() -> None:
    how = Sampling(temperature=1.0)
    alone = sample(LOGITS, [how], [(3, 5)])
    among = sample(torch.cat([torch.randn(2, 4), LOGITS]), [how] * 3, [(1, 1), (2, 2), (3, 5)])
    assert among[2:] == alone
    assert len({uniform(3, i) for i in range(50)}) == 50
    assert uniform(3, 5) != uniform(5, 3)


def test_nothing_is_drawn_after_a_wrong_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    how, indices = Sampling(temperature=1.0), [0, 1, 2, 3, 0, 1]
    draws = [(7, index) for index in indices]
    rows = LOGITS.expand(6, -1)
    every = sample(rows, [how] * 6, draws)
    asked: list[int] = []
    monkeypatch.setattr(
        "trtkit.engine.sampler.uniform", lambda seed, index: asked.append(index) or uniform(seed, index)
    )
    guesses = [None, every[0], every[1] + 1, every[2], None, every[4]]
    found = sample(rows, [how] * 6, draws, guesses)
    assert asked == [0, 1, 0, 1], "the third token was fed a wrong guess, and the fourth came after it"
    assert [found[row] for row in (0, 1, 4, 5)] == [every[row] for row in (0, 1, 4, 5)]


def test_a_spoilt_row_after_a_wrong_guess_is_still_told() -> None:
    rows = torch.cat([LOGITS, LOGITS.new_full((1, 4), float("nan"))])
    how = [Sampling(temperature=1.0)] * 2
    (first,) = sample(LOGITS, how[:1], [(7, 0)])
    assert sample(rows, how, [(7, 0), (7, 1)], [None, first + 1]) == [first, NOT_A_NUMBER]


def test_fresh_seeds_differ() -> None:
    assert fresh_seed() != fresh_seed()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_reported_and_spare_the_neighbour(bad: float, temperature: float) -> None:
    rows = torch.tensor([[1.0, bad], [1.0, 0.0]])
    tokens = sample(rows, [Sampling(temperature=temperature, top_k=1)] * 2, [(0, 0), (0, 0)])
    assert tokens == [NOT_A_NUMBER, 0]


@pytest.mark.parametrize("top_k", [0, 3])
def test_of_equal_logits_the_lower_id_comes_first(top_k: int):
    logits = torch.zeros(1, 1000)
    how = Sampling(temperature=1.0, top_k=top_k)
    counted = top_k or 1000
    for seed in range(8):
        expected = int(uniform(seed, 0) * counted)
        assert sample(logits, [how], [(seed, 0)]) == [expected]
