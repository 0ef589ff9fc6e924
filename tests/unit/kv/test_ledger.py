from __future__ import annotations

import pytest
import torch

from trtkit.kv.ledger import AttentionLedger
from trtkit.kv.moves import plan_moves


def test_new_slots_start_with_no_mass_of_a_former_occupant():
    ledger = AttentionLedger(1, 2, 8)
    ledger.append(0, 4)
    ledger.add(0, torch.ones(2, 4), 1)
    ledger.compact(plan_moves(torch.tensor([[0, 1], [2, 3]]), 4))
    ledger.append(4, 2)
    assert ledger.mass[0, :, 2:].tolist() == [[0, 0], [0, 0]]


def test_mass_and_positions_move_with_their_tokens():
    ledger = AttentionLedger(2, 2, 8)
    ledger.append(0, 6)
    ledger.add(slice(None), torch.arange(24, dtype=torch.float32).reshape(2, 2, 6), 1)
    ledger.compact(plan_moves(torch.tensor([[0, 2, 5], [1, 3, 4], [3, 4, 5], [0, 1, 2]]), 6))
    seen = {
        tuple(sorted(zip(p, m, strict=True)))
        for p, m in zip(ledger.positions.flatten(0, 1).tolist(), ledger.mass.flatten(0, 1).tolist(), strict=True)
    }
    assert seen == {
        ((0, 0.0), (2, 2.0), (5, 5.0)),
        ((1, 7.0), (3, 9.0), (4, 10.0)),
        ((3, 15.0), (4, 16.0), (5, 17.0)),
        ((0, 18.0), (1, 19.0), (2, 20.0)),
    }


def test_positions_go_on_counting_after_an_eviction():
    ledger = AttentionLedger(1, 1, 8)
    ledger.append(0, 4)
    ledger.compact(plan_moves(torch.tensor([[1, 3]]), 4))
    ledger.append(4, 1)
    assert sorted(ledger.positions[0, 0].tolist()) == [1, 3, 4]


@pytest.mark.parametrize("batches", [[6], [1] * 6, [2, 4], [5, 1]])
def test_decayed_mass_does_not_depend_on_how_queries_are_batched(batches):
    mass = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    expected = sum(0.9 ** (5 - i) * mass[i] for i in range(6))
    ledger = AttentionLedger(1, 1, 3, decay=0.9)
    ledger.append(0, 3)
    first = 0
    for count in batches:
        weights = ledger.query_weights(count)
        ledger.add(0, (weights[:, None] * mass[first : first + count]).sum(0)[None], count)
        first += count
    torch.testing.assert_close(ledger.mass[0, 0], expected)


def test_layers_are_scored_alone():
    ledger = AttentionLedger(2, 1, 4)
    ledger.append(0, 2)
    ledger.add(1, torch.ones(1, 2), 1)
    assert ledger.mass.tolist() == [[[0, 0]], [[1, 1]]]


def test_more_tokens_than_expected_find_room_and_lose_nothing():
    ledger = AttentionLedger(1, 1, 2)
    ledger.append(0, 2)
    ledger.add(0, torch.tensor([[3.0, 4.0]]), 1)
    ledger.append(2, 3)
    assert ledger.mass[0, 0].tolist() == [3, 4, 0, 0, 0]
    assert ledger.positions[0, 0].tolist() == [0, 1, 2, 3, 4]


def test_bytes_are_those_of_the_tensors():
    assert AttentionLedger(2, 3, 5).num_bytes == 2 * 3 * 5 * 8
