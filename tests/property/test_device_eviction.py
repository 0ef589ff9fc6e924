"""Random budgets, windows, intervals, pieces, rings and cuts: the device path keeps what today's engine keeps.

Also: whatever the cut, a prompt's segments tile it, end where pieces end, and never hold more than budget + piece.
"""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.eviction_streams import (
    DeviceSide,
    ReferenceSide,
    Stream,
    TabledRow,
    make_sequence,
    random_cut,
    stream_model,
)

from trtkit.engine.device.segments import cut
from trtkit.kv.policy import Budget

MODEL = stream_model()
STREAMS = [Stream.draw(MODEL, seed) for seed in range(3)]
QUICK = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)  # fmt: skip


@st.composite
def policies(draw):
    kind = draw(st.sampled_from(["h2o", "h2o", "h2o", "snapkv", "random", "window"]))
    budget = draw(st.integers(1, 48))
    options = [f"budget={budget}", f"interval={draw(st.integers(1, 20))}"]
    sinks = draw(st.integers(0, min(4, budget - 1)))
    if kind != "window":
        least = 1 if kind == "snapkv" else 0
        if budget - sinks >= max(least, 1):
            options.append(f"recent={draw(st.integers(least, min(30, budget - sinks)))}")
    options.append(f"sinks={sinks}")
    if kind == "h2o":
        options.append(f"scorer={draw(st.sampled_from(['sum', 'mean', 'decay']))}")
    return f"{kind}:{','.join(options)}"


@QUICK
@given(
    kv=policies(),
    lengths=st.tuples(st.integers(1, 90), st.integers(2, 30)),
    piece=st.integers(1, 24),
    ring=st.integers(30, 33),
    ends=st.sets(st.integers(1, 89), max_size=4),
    cut_seed=st.integers(0, 1 << 16),
)
def test_any_cut_of_any_prompt_under_any_policy_keeps_the_same(kv, lengths, piece, ring, ends, cut_seed):
    prompt, output = lengths
    rng = np.random.default_rng(cut_seed)
    chunk_ends = tuple(sorted(end for end in ends if end < prompt))
    reference = ReferenceSide(MODEL, lambda *_: piece)
    device = DeviceSide(MODEL, lambda *_: piece, ring=ring)
    theirs = make_sequence("a", prompt, output, kv, chunk_ends)
    ours = make_sequence("a", prompt, output, kv, chunk_ends)
    reference.eviction.admit(theirs)
    device.eviction.admit(ours)
    stream = STREAMS[cut_seed % len(STREAMS)]
    reference.feed(theirs, stream, prompt)
    for count in random_cut(prompt, rng, int(rng.integers(1, 40))):
        device.step((ours, stream, count))
    for _ in range(output - 1):
        assert device.kept(ours) == reference.kept(theirs)
        reference.feed(theirs, stream, 1)
        device.step((ours, stream, 1))
    assert device.kept(ours) == reference.kept(theirs)
    assert (ours.evictions, ours.cache_len) == (theirs.evictions, theirs.cache_len)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    prompt=st.integers(1, 300),
    budget=st.integers(1, 60),
    quantum=st.integers(1, 50),
    ends=st.sets(st.integers(1, 299), max_size=5),
    seed=st.integers(0, 1 << 16),
)
def test_segments_tile_the_prompt_and_end_where_the_pieces_do(prompt, budget, quantum, ends, seed):
    rule = Budget(tokens=budget, sinks=0, recent=0, interval=4)
    sequence = make_sequence("a", prompt, 4, f"h2o:{budget}", tuple(sorted(end for end in ends if end < prompt)))
    sequence.prefill_quantum = quantum
    pieces = {*sequence.chunk_ends, prompt, *range(quantum, prompt, quantum)}
    longest = max(b - a for a, b in itertools.pairwise(sorted({0, *pieces})))
    evicted_after, cached = [], 0
    for count in random_cut(prompt, np.random.default_rng(seed), 120):
        row = TabledRow(sequence, 0, count, sequence.num_tokens, cached, True, True, None)
        segments = cut(row, rule)
        assert [s.start for s in segments] == list(itertools.accumulate([s.count for s in segments][:-1], initial=0))
        assert sum(s.count for s in segments) == count
        for segment in segments:
            assert segment.cached_before == cached
            assert segment.live <= budget + longest
            cached = segment.left
            if segment.evict_to is not None:
                evicted_after.append(row.position + segment.start + segment.count)
        sequence.num_tokens += count
    live, expected, before = 0, [], 0
    for end in sorted(pieces):
        live += end - before
        before = end
        if live > budget:
            expected.append(end)
            live = budget
    assert evicted_after == expected
    assert cached == live
