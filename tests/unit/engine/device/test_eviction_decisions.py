"""The device path keeps what today's engine keeps, token for token, however the prompt was cut into steps."""

from __future__ import annotations

import numpy as np
import pytest
from support.eviction_streams import DeviceSide, ReferenceSide, Stream, make_sequence, random_cut, stream_model

from trtkit.engine.device import scores

POLICIES = [
    "h2o:24,sinks=2,recent=6,interval=4,scorer=sum",
    "h2o:24,sinks=2,recent=6,interval=4,scorer=mean",
    "h2o:24,sinks=2,recent=6,interval=4,scorer=decay",
    "h2o:25,sinks=0,recent=1,interval=1",
    "h2o:40,sinks=4,recent=16,interval=37,scorer=decay",
    "h2o:1,sinks=0,recent=1,interval=1",
    "window:24,interval=4",
    "random:24,interval=5",
    "snapkv:24,recent=8,interval=12",
    "snapkv:24,recent=8,interval=8",
    "snapkv:24,recent=8,interval=3",
    "snapkv:40,recent=32,interval=4",
    "h2o:50%,interval=4",
]


def piece_of(tokens):
    return lambda budget, limits: tokens


def both(kv, *, prompt, output, piece=8, model=None, ring=32, seed=0, cuts=None, chunk_ends=()):
    """Feed one request to both; after the prompt and after each decode step the same positions are live."""
    model = model or stream_model()
    stream = Stream.draw(model, seed)
    reference, device = ReferenceSide(model, piece_of(piece)), DeviceSide(model, piece_of(piece), ring=ring)
    theirs = make_sequence("a", prompt, output, kv, chunk_ends)
    ours = make_sequence("a", prompt, output, kv, chunk_ends)
    reference.eviction.admit(theirs)
    device.eviction.admit(ours)
    reference.feed(theirs, stream, prompt)
    for count in cuts or [prompt]:
        device.step((ours, stream, count))
    for step in range(output):
        assert device.kept(ours) == reference.kept(theirs), f"after {step} decode steps"
        assert (ours.evictions, ours.tokens_evicted) == (theirs.evictions, theirs.tokens_evicted)
        assert ours.cache_len == theirs.cache_len
        reference.feed(theirs, stream, 1)
        device.step((ours, stream, 1))
    assert device.kept(ours) == reference.kept(theirs)
    assert not device.eviction.failed
    return ours, device


@pytest.mark.parametrize("kv", POLICIES)
def test_whole_prompt_in_one_step_and_decoding_keep_what_the_reference_keeps(kv):
    sequence, _ = both(kv, prompt=75, output=45)
    assert sequence.evictions > 4


@pytest.mark.parametrize("kv", POLICIES)
def test_prompt_cut_anyhow_into_steps_keeps_the_same(kv):
    cuts = random_cut(61, np.random.default_rng(3), 19)
    assert 1 in cuts or min(cuts) < 8
    both(kv, prompt=61, output=20, cuts=cuts)


@pytest.mark.parametrize("kv", POLICIES[:3] + POLICIES[8:11])
@pytest.mark.parametrize(("kv_heads", "group", "layers"), [(1, 4, 1), (4, 1, 3)])
def test_other_groups_and_depths_keep_the_same(kv, kv_heads, group, layers):
    both(kv, prompt=50, output=20, model=stream_model(layers=layers, kv_heads=kv_heads, group=group))


@pytest.mark.parametrize("ring", [1, 3, 16])
@pytest.mark.parametrize("kv", POLICIES[:3])
def test_how_many_queries_wait_changes_nothing(kv, ring):
    both(kv, prompt=40, output=30, ring=ring)


@pytest.mark.parametrize("kv", [POLICIES[0], POLICIES[6], POLICIES[9]])
def test_single_tokens_between_longer_pieces_are_scored_in_order(kv):
    both(kv, prompt=47, output=9, cuts=[20, 1, 1, 13, 1, 11])


@pytest.mark.parametrize("kv", POLICIES[:3] + POLICIES[6:11])
def test_pieces_that_the_caller_chose_end_where_it_said(kv):
    sequence, _ = both(kv, prompt=70, output=1, chunk_ends=(3, 30, 31, 55, 60))
    assert sequence.prefill_quantum is None
    assert sequence.evictions == 5


@pytest.mark.parametrize("kv", POLICIES[:3])
def test_long_segments_are_scored_in_parts_without_the_keys_of_their_future(kv, monkeypatch):
    monkeypatch.setattr(scores, "PART_QUERIES", 5)
    asked = []
    score_layers = scores.score_layers
    monkeypatch.setattr(
        scores,
        "score_layers",
        lambda *a, **o: asked.append((a[0].shape[1], a[5], int(a[7][-1]))) or score_layers(*a, **o),
    )
    both(kv, prompt=70, output=12)
    assert max(count for count, _, _ in asked) == 5
    first_segment = [(count, live) for count, live, last in asked[:6] if last < 32]
    assert first_segment == [(5, 5), (5, 10), (5, 15), (5, 20), (5, 25), (5, 30)]


def test_prompt_below_the_budget_is_one_segment_and_evicts_once_it_has_grown():
    sequence, _ = both(POLICIES[1], prompt=5, output=40)
    assert sequence.evictions == (5 + 40 - 24) // 4


def test_cache_never_holds_more_than_the_budget_and_a_piece():
    model = stream_model()
    device = DeviceSide(model, piece_of(8))
    sequence = make_sequence("a", 200, 10, "h2o:24,sinks=2,recent=6,interval=4")
    device.eviction.admit(sequence)
    device.step((sequence, Stream.draw(model, 1), 200))
    assert device.scheduler.pool.peak == (24 + 8) // 4
    assert device.scheduler.pool.num_used == 24 // 4


def test_neighbours_of_other_policies_change_nothing():
    model = stream_model()
    alone, together = {}, DeviceSide(model, piece_of(8))
    kinds = ["full", POLICIES[1], POLICIES[8], POLICIES[6], POLICIES[2]]
    streams = [Stream.draw(model, seed) for seed in range(5)]
    sequences = [make_sequence(str(n), 40 + n, 20, kv) for n, kv in enumerate(kinds)]
    for index, kv in enumerate(kinds):
        side, sequence = DeviceSide(model, piece_of(8)), make_sequence("x", 40 + index, 20, kv)
        side.eviction.admit(sequence)
        side.step((sequence, streams[index], 40 + index))
        for _ in range(20):
            side.step((sequence, streams[index], 1))
        alone[index] = side.kept(sequence)
    for sequence in sequences:
        together.eviction.admit(sequence)
    together.step(*[(s, streams[n], 40 + n) for n, s in enumerate(sequences[:3])])
    late = [(s, streams[n + 3], 43 + n) for n, s in enumerate(sequences[3:])]
    together.step(*[(s, streams[n], 1) for n, s in enumerate(sequences[:3])], *late)
    for step in range(20):
        rows = [(s, streams[n], 1) for n, s in enumerate(sequences) if n >= 3 or step < 19]
        together.step(*rows)
    assert {n: together.kept(s) for n, s in enumerate(sequences)} == alone


@pytest.mark.parametrize("kv", [POLICIES[1], POLICIES[10], POLICIES[7]])
def test_replay_after_preemption_decides_the_same_again(kv):
    model = stream_model()
    stream = Stream.draw(model, 4)
    device = DeviceSide(model, piece_of(8))
    sequence = make_sequence("a", 60, 30, kv)
    device.eviction.admit(sequence)
    cap = sequence.kv_cap_tokens

    def run(steps):
        device.step((sequence, stream, 60))
        for _ in range(steps):
            device.step((sequence, stream, 1))

    run(17)
    first = device.kept(sequence)
    device.release(sequence)
    device.eviction.forget(sequence)
    sequence.reset()
    assert sequence.kv_cap_tokens == cap
    run(17)
    assert device.kept(sequence) == first
    assert device.eviction.rings.take() != device.eviction.rings.take()


def test_continuations_being_scored_leave_no_trace():
    model = stream_model()
    stream, other = Stream.draw(model, 5), Stream.draw(model, 6)
    kept = []
    for disturbed in (False, True):
        device = DeviceSide(model, piece_of(8))
        sequence = make_sequence("a", 50, 20, POLICIES[1])
        device.eviction.admit(sequence)
        device.step((sequence, stream, 50))
        for step in range(20):
            device.step((sequence, stream, 1))
            if disturbed and step % 3 == 0:
                for count in (1, 5):
                    device.step((sequence, other, count), observed=False)
                    sequence.num_tokens -= count
                    sequence.cache_len -= count
                device.scheduler.trim(sequence)
        kept.append(device.kept(sequence))
    assert kept[0] == kept[1]
