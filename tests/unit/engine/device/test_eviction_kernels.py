"""Eviction's decisions with the Triton kernels themselves, in Triton's interpreter, against today's engine.

The interpreter is chosen when triton is imported, so this file works only where nobody imported it before.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("triton was imported without its interpreter before this file", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"

from support.eviction_streams import DeviceSide, ReferenceSide, Stream, make_sequence, stream_model

from trtkit.engine.device import eviction
from trtkit.kernels import paged, ranking, slots


@pytest.fixture
def launched(monkeypatch):
    """Every family's kernels run; which modules asked."""
    seen = set()
    for module in (paged, ranking, slots):
        monkeypatch.setattr(module, "use_triton", lambda *_, name=module.__name__: seen.add(name) or True)
    return seen


@pytest.mark.parametrize(
    "kv",
    [
        "h2o:16,sinks=2,recent=4,interval=4",
        "h2o:16,sinks=2,recent=4,interval=4,scorer=decay",
        "snapkv:16,recent=8,interval=4",
        "snapkv:16,recent=5,interval=5",
        "random:16,interval=4",
    ],
)
def test_kernels_take_the_views_that_eviction_gives_them_and_decide_alike(launched, kv):
    model = stream_model(layers=2, kv_heads=2, group=2)
    stream = Stream.draw(model, 0, tokens=80)
    reference, device = ReferenceSide(model, lambda *_: 8), DeviceSide(model, lambda *_: 8, ring=16)
    theirs, ours = make_sequence("a", 30, 12, kv), make_sequence("a", 30, 12, kv)
    reference.eviction.admit(theirs)
    device.eviction.admit(ours)
    reference.feed(theirs, stream, 30)
    device.step((ours, stream, 21))
    device.step((ours, stream, 9))
    for _ in range(11):
        assert device.kept(ours) == reference.kept(theirs)
        reference.feed(theirs, stream, 1)
        device.step((ours, stream, 1))
    assert device.kept(ours) == reference.kept(theirs)
    assert ours.evictions > 3
    assert not device.eviction.failed
    asked = {name.rsplit(".")[-1] for name in launched}
    assert asked == {"paged", "ranking", "slots"}


def test_an_answer_of_any_layout_and_type_reaches_the_kernels_as_they_want_it(launched, monkeypatch):
    model = stream_model()
    device = DeviceSide(model, lambda *_: 8)
    sequence = make_sequence("a", 30, 12, "random:16,interval=4")
    device.eviction.admit(sequence)
    policy = device.eviction._rules.policy(sequence.kv_policy)

    class Strided:
        budget, watch = policy.budget, policy.watch

        def select(self, tokens):
            keep = policy.select(tokens).to(torch.int16)
            return keep.transpose(-1, -2).contiguous().transpose(-1, -2)

    monkeypatch.setitem(device.eviction._rules._policies, sequence.kv_policy, Strided())
    device.step((sequence, Stream.draw(model, 0), 30))
    assert not device.eviction.failed
    assert sequence.evictions == 2


def test_what_stands_in_for_a_broken_answer_reaches_the_kernels_too(launched, monkeypatch):
    model = stream_model()
    device = DeviceSide(model, lambda *_: 8)
    sequence = make_sequence("a", 30, 12, "h2o:16,interval=4")
    device.eviction.admit(sequence)
    monkeypatch.setattr(eviction, "_slots_of", lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    device.step((sequence, Stream.draw(model, 0), 30))
    assert list(device.eviction.failed) == [sequence]
    assert sequence.cache_len == 16
