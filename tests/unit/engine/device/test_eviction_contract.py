"""What the device path promises besides its decisions: nobody waits, broken policies end alone, memory is what was said."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from support.eviction_streams import DeviceSide, ReferenceSide, Stream, make_sequence, stream_model

from trtkit.engine import eviction_rules
from trtkit.engine.device import eviction as eviction_module
from trtkit.engine.device import scores as scores_module
from trtkit.engine.device.eviction import RING_QUERIES, DeviceEviction, device_piece
from trtkit.engine.device.rings import NOWHERE, ring_bytes
from trtkit.engine.device.verdicts import Verdicts
from trtkit.kv.policy import Budget, Watch
from trtkit.kv.ranking import keep_best
from trtkit.spec.errors import UnsupportedError
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.plan import Limits

H2O = "h2o:24,sinks=2,recent=6,interval=4"
EVERY_QUERY = Watch(queries="all")
BUDGET = Budget(tokens=24, sinks=2, recent=6, interval=4)


@dataclass(frozen=True)
class Anybody:
    """A third party's policy: `answer` turns the right slots into what it says."""

    answer: object = None
    watch: Watch = EVERY_QUERY
    budget: Budget = BUDGET

    def select(self, tokens):
        keep = keep_best(tokens.mass, tokens.positions, tokens.num_tokens, self.budget)
        return keep if self.answer is None else self.answer(keep, tokens)


@pytest.fixture
def third_party(monkeypatch):
    """`h2o` loads as whatever policy was put here."""

    def install(policy):
        load = eviction_rules.load_policy
        monkeypatch.setattr(
            eviction_rules,
            "load_policy",
            lambda spec, **options: policy if spec.kind == "h2o" else load(spec, **options),
        )

    return install


def raises(keep, tokens):
    raise RuntimeError("out\n of ideas")


def with_slot(place, value):
    def answer(keep, tokens):
        keep = keep.clone()
        keep[-1, -1, place] = value
        return keep

    return answer


def too_far(keep, tokens):
    return with_slot(-1, tokens.mass.shape[-1])(keep, tokens)


BROKEN = {
    "raises": (raises, "RuntimeError: out of ideas"),
    "too few": (lambda keep, tokens: keep[..., 1:], "it kept"),
    "floats": (lambda keep, tokens: keep.float(), "torch.float32"),
    "past the end": (too_far, "strictly ascending inside"),
    "negative": (with_slot(0, -1), "strictly ascending inside"),
    "descending": (lambda keep, tokens: keep.flip(-1), "strictly ascending inside"),
    "doubled": (lambda keep, tokens: torch.cat((keep[..., :1], keep[..., :-1]), -1), "strictly ascending inside"),
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("prompt", [10, 60])
def test_broken_answer_fails_its_own_request_with_a_line_and_leaves_the_other_alone(third_party, fault, prompt):
    answer, line = BROKEN[fault]
    third_party(Anybody(answer=answer))
    model = stream_model()
    device, undisturbed = (DeviceSide(model, lambda *_: 8, blocks=64) for _ in range(2))
    good, alone = (make_sequence("good", 50, 20, "snapkv:24,recent=8,interval=4") for _ in range(2))
    bad = make_sequence("bad", prompt, 40, H2O)
    for side, sequence in ((device, bad), (device, good), (undisturbed, alone)):
        side.eviction.admit(sequence)
    streams = Stream.draw(model, 0), Stream.draw(model, 1)
    device.step((bad, streams[0], prompt), (good, streams[1], 50))
    undisturbed.step((alone, streams[1], 50))
    for _ in range(20):
        device.step((bad, streams[0], 1), (good, streams[1], 1))
        undisturbed.step((alone, streams[1], 1))
    assert list(device.eviction.failed) == [bad]
    assert device.eviction.failed[bad].startswith("KV policy failed: ")
    assert line in device.eviction.failed[bad]
    assert device.kept(good) == undisturbed.kept(alone)
    assert bad.cache_len <= 24 + 8, "counts hold although the answers are worth nothing"
    device.eviction.forget(bad)
    assert not device.eviction.failed


def test_broken_policy_is_not_asked_again(third_party):
    calls = []

    def answer(keep, tokens):
        calls.append(1)
        raise RuntimeError("no")

    third_party(Anybody(answer=answer))
    model = stream_model(layers=3)
    device = DeviceSide(model, lambda *_: 8)
    sequence = make_sequence("a", 60, 20, H2O)
    device.eviction.admit(sequence)
    device.step((sequence, Stream.draw(model, 0), 60))
    assert len(calls) == 1


def test_flag_of_a_former_sequence_does_not_reach_the_next_in_its_place(third_party):
    third_party(Anybody(answer=too_far))
    model = stream_model()
    device = DeviceSide(model, lambda *_: 8, max_batch_size=1)
    first, second = (make_sequence(name, 40, 20, kv) for name, kv in (("a", H2O), ("b", "random:24,interval=4")))
    for sequence, broken in ((first, True), (second, False)):
        device.eviction.admit(sequence)
        device.step((sequence, Stream.draw(model, 0), 40))
        assert (sequence in device.eviction.failed) is broken
        device.release(sequence)
        device.eviction.forget(sequence)


def test_verdict_that_arrives_after_its_sequence_left_is_dropped(monkeypatch):
    model = stream_model()
    device = DeviceSide(model, lambda *_: 8)
    sequence = make_sequence("a", 40, 20, H2O)
    device.eviction.admit(sequence)
    device.step((sequence, Stream.draw(model, 0), 40))
    monkeypatch.setattr(Verdicts, "read", lambda self: [(sequence, "late")])
    device.eviction.forget(sequence)
    device.eviction.poll()
    assert not device.eviction.failed


def test_flags_are_read_only_once_their_copy_has_arrived():
    class Event:
        here = False

        def query(self):
            return self.here

    sequence, flags, event = make_sequence("a", 4, 4, "full"), Verdicts(2, torch.device("cpu")), Event()
    flags.judge(1, sequence, torch.tensor([[[0, 3]]]), 3)
    flags.stage()
    staged = flags._staged.popleft()
    flags._staged.append(type(staged)(flags_N=staged.flags_N, arrived=event, asked=staged.asked))
    assert flags.read() == []
    event.here = True
    assert [who for who, _ in flags.read()] == [sequence]
    flags.stage()
    assert flags.read() == []
    pinned = len(flags._free)
    for _ in range(20):
        flags.judge(0, sequence, torch.tensor([[[0, 2]]]), 3)
        flags.stage()
        flags.read()
    assert len(flags._free) == pinned, "the copies' memory goes round"


@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("window", [5, 100])
def test_any_window_with_any_decay_is_what_the_reference_looks_through(third_party, decay, window):
    third_party(Anybody(watch=Watch(queries="last", window=window, decay=decay)))
    model = stream_model()
    stream = Stream.draw(model, 2)
    device, reference = DeviceSide(model, lambda *_: 8, ring=100), ReferenceSide(model, lambda *_: 8)
    ours, theirs = make_sequence("a", 50, 20, H2O), make_sequence("a", 50, 20, H2O)
    device.eviction.admit(ours)
    reference.eviction.admit(theirs)
    device.step((ours, stream, 50))
    reference.feed(theirs, stream, 50)
    for _ in range(20):
        device.step((ours, stream, 1))
        reference.feed(theirs, stream, 1)
    assert device.kept(ours) == reference.kept(theirs)


def opened(kv, **options):
    model = stream_model()
    side = DeviceSide(model, lambda *_: 8)
    return DeviceEviction(parse_kv_policy(kv), model, side.scheduler, **options)


def test_room_in_the_rings_follows_from_the_engines_policy():
    assert opened("full").ring_size == 0
    assert opened("window:24").ring_size == 0
    assert opened(H2O).ring_size == RING_QUERIES
    assert opened("snapkv:100,recent=40").ring_size == 40
    assert opened("full", ring_queries=7).ring_size == 7


@pytest.mark.parametrize(("engine", "asked"), [("full", H2O), (H2O, "snapkv:100,recent=40"), ("window:24", "h2o:30")])
def test_request_that_would_need_larger_rings_is_refused_with_what_to_do(engine, asked):
    sequence = make_sequence("a", 150, 20, asked)
    with pytest.raises(UnsupportedError, match=r"open the engine with --kv (h2o|snapkv)"):
        opened(engine).admit(sequence)
    positions_only = make_sequence("b", 150, 20, "random:30")
    opened(engine).admit(positions_only)
    assert positions_only.evicts


def test_rows_that_nobody_watches_have_no_place():
    model = stream_model()
    device = DeviceSide(model, lambda *_: 8)
    sequences = [make_sequence(str(n), 40, 40, kv) for n, kv in enumerate(["full", "random:24", H2O])]
    streams = [Stream.draw(model, n) for n in range(3)]
    for sequence in sequences:
        device.eviction.admit(sequence)
    device.step(*[(s, stream, 40) for s, stream in zip(sequences, streams, strict=True)])
    seen = []
    ring_places = device.eviction.ring_places
    device.eviction.ring_places = lambda rows: seen.extend(ring_places(rows)) or seen
    device.step(*[(s, stream, 1) for s, stream in zip(sequences, streams, strict=True)])
    assert seen[:2] == [NOWHERE, NOWHERE]
    assert seen[2] >= 0


def test_side_bytes_are_the_rings_and_the_ledgers():
    model = stream_model()
    device = DeviceSide(model, lambda *_: 8, max_batch_size=4, ring=5)
    sequence = make_sequence("a", 60, 40, H2O)
    device.eviction.admit(sequence)
    device.step((sequence, Stream.draw(model, 0), 60))
    rings = ring_bytes(model, 4, 5, 4)
    assert device.eviction.rings.num_bytes == rings
    ledger = model.num_layers * model.num_kv_heads * (24 + 8) * 8
    assert device.eviction.counters.side_bytes == rings + ledger


def test_piece_is_an_eighth_of_the_budget_and_fits_beside_a_full_batch():
    def piece(tokens, **limits):
        return device_piece(Budget(tokens=tokens, sinks=0, recent=0, interval=1), Limits(**limits))

    roomy = {"max_num_tokens": 4096, "max_batch_size": 32}
    assert [piece(tokens, **roomy) for tokens in (24, 2048, 4096)] == [256, 256, 512]
    assert piece(2048, max_num_tokens=64, max_batch_size=8) == 57


@pytest.mark.parametrize(
    "kv", ["full", "h2o:50%,interval=4", H2O, "snapkv:24,recent=8,interval=4", "window:24", "h2o:100%"]
)
def test_warming_up_leaves_nothing_behind(kv):
    device = DeviceSide(stream_model(), lambda *_: 8, kv=kv)
    device.eviction.rings.queries_LPHD.zero_()
    device.eviction.warm_up()
    eviction = device.eviction
    assert not eviction.failed
    assert not eviction._watched
    eviction.end_step([])
    assert not eviction._verdicts._staged
    assert (eviction.counters.evictions, eviction.counters.blocks_freed) == (0, 0)
    assert len(eviction.rings._free) == 8


def test_warming_up_covers_prompts_and_decoding_and_of_a_share_half_sizes_down_to_an_eighth(monkeypatch):
    asked = []
    monkeypatch.setattr(eviction_module, "compact_layers", lambda *args: asked.append(args[3]))
    DeviceSide(stream_model(), lambda *_: 8, kv="h2o:50%,interval=4").eviction.warm_up()
    assert asked == [168, 164, 88, 84, 48, 44, 28, 24]
    asked.clear()
    DeviceSide(stream_model(), lambda *_: 8, kv=H2O).eviction.warm_up()
    assert asked == [32, 28]


def test_warming_up_scores_rings_and_pieces_of_prompts_in_blocks_all_over_the_cache(monkeypatch):
    scored = []

    def note(queries, *args, **_):
        scored.append((queries.shape[0], queries.shape[1], len(set(args[3].tolist()))))

    monkeypatch.setattr(scores_module, "score_layers", note)
    device = DeviceSide(stream_model(), lambda *_: 8, kv=H2O)
    device.eviction.warm_up()
    layers, size, ring = device.eviction._model.num_layers, device.eviction._storage.shape[4], device.eviction.ring_size
    assert scored == [
        (depth, count, -(-live // size)) for live in (32, 28) for depth, count in ((layers, min(ring, live)), (1, 8))
    ]
