from __future__ import annotations

import pytest
import torch
from support.eviction_streams import stream_model

from trtkit.engine.device.rings import DeviceRings, ring_bytes
from trtkit.spec.catalog import model_preset

CPU = torch.device("cpu")


def test_sequences_own_places_that_do_not_meet():
    rings = DeviceRings(stream_model(), 3, 4, torch.float32, CPU)
    slots = [rings.take() for _ in range(3)]
    places = [place for slot in slots for place in range(*rings.places(slot, 0, 4).indices(12))]
    assert sorted(places) == list(range(12))
    rings.give(slots[1])
    assert rings.take() == slots[1]


def test_more_sequences_than_the_batch_holds_are_a_fault():
    rings = DeviceRings(stream_model(), 1, 4, torch.float32, CPU)
    rings.take()
    with pytest.raises(AssertionError, match="more sequences"):
        rings.take()
    with pytest.raises(AssertionError, match="ring of 4"):
        rings.places(0, 2, 3)


def test_rings_that_nobody_asked_for_still_have_an_address():
    rings = DeviceRings(stream_model(), 3, 0, torch.float16, CPU)
    assert rings.queries_LPHD.data_ptr() != 0
    assert rings.num_bytes == ring_bytes(stream_model(), 3, 0, 2)


def test_bytes_are_counted_before_anything_is_allocated():
    model = model_preset("llama-3-70b")
    assert ring_bytes(model, 16, 16, 2) == 16 * 16 * 80 * 64 * (128 * 2 + 4)
    rings = DeviceRings(stream_model(), 5, 7, torch.bfloat16, CPU)
    assert rings.num_bytes == ring_bytes(stream_model(), 5, 7, 2)
