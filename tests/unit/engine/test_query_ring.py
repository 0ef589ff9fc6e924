from __future__ import annotations

import torch

from trtkit.engine.query_ring import QueryRing


def queries(*names):
    """One query [1 head, 2 dims] per name."""
    return torch.tensor(names, dtype=torch.float32)[:, None, None].expand(-1, 1, 2)


def write(ring, slot, first, *names):
    for layer in range(2):
        index = torch.tensor(ring.index(slot, first, len(names)))
        ring.write(layer, index, queries(*[100 * layer + n for n in names]))


def test_the_last_queries_come_back_in_order_past_the_rings_end():
    ring = QueryRing(2, 4)
    slot = ring.take()
    write(ring, slot, 0, 0, 1, 2)
    write(ring, slot, 3, 3, 4, 5)
    assert ring.read(slot, 2, 4)[:, :, 0, 0].tolist() == [[2, 3, 4, 5], [102, 103, 104, 105]]


def test_growing_for_more_sequences_keeps_what_is_stored():
    ring = QueryRing(2, 4)
    first = ring.take()
    write(ring, first, 0, 7, 8)
    others = [ring.take() for _ in range(5)]
    write(ring, others[-1], 0, 9)
    assert ring.read(first, 0, 2)[0, :, 0, 0].tolist() == [7, 8]
    assert ring.read(others[-1], 0, 1)[0, :, 0, 0].tolist() == [9]


def test_a_ring_given_back_is_the_next_one_taken():
    ring = QueryRing(1, 4)
    slot = ring.take()
    assert ring.take() != slot
    ring.give(slot)
    assert ring.take() == slot


def test_bytes_are_those_of_the_store():
    ring = QueryRing(2, 4)
    assert ring.num_bytes == 0
    write(ring, ring.take(), 0, 1)
    assert ring.num_bytes == 2 * 4 * 1 * 2 * 4
