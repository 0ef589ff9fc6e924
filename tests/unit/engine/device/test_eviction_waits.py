"""Eviction never reads the device back: run on tensors that hold no data, any attempt to do so has nothing to read.

Kernels are opaque here. A dispatch mode also refuses operators whose result size depends on data, and tensors that
come from the host, which a GPU would have to be sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from support.eviction_streams import DIM, TabledRow, make_sequence, stream_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trtkit.engine.block_pool import BlockPool
from trtkit.engine.device import eviction, scores
from trtkit.engine.device.eviction import DeviceEviction
from trtkit.engine.device.verdicts import Verdicts
from trtkit.engine.scheduler import Scheduler
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.plan import Limits

FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "is_nonzero", "equal.default")


class NoWaiting(TorchDispatchMode):
    """Counts operators; refuses those that would make the host wait, or the device fetch."""

    def __init__(self):
        super().__init__()
        self.launches = 0

    def __enter__(self):
        # Tensors made of Python numbers never come through the dispatcher on their way to a device.
        self._made = {name: getattr(torch, name) for name in ("tensor", "as_tensor", "from_numpy")}
        for name in self._made:
            setattr(torch, name, _refused)
        return super().__enter__()

    def __exit__(self, *exc_info):
        for name, made in self._made.items():
            setattr(torch, name, made)
        return super().__exit__(*exc_info)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(word in name for word in FORBIDDEN), f"{name} waits for the device"
        for leaf in tree_leaves((args, kwargs or {})):
            assert not isinstance(leaf, torch.Tensor) or leaf.is_meta or leaf.dim() == 0, f"{name} takes host memory"
        self.launches += not any(word in name for word in (".view", "slice", "select.int", "expand", "unsqueeze"))
        return func(*args, **(kwargs or {}))


def _refused(*args, **kwargs):
    raise AssertionError("host memory waits for the device")


@dataclass
class Opaque:
    """Stands for kernels; counts their launches."""

    launches: int = 0

    def __call__(self, *args, **kwargs):
        self.launches += 1


@pytest.fixture
def kernels(monkeypatch):
    opaque = Opaque()
    monkeypatch.setattr(scores, "score_layers", opaque)
    monkeypatch.setattr(eviction, "compact_layers", opaque)
    monkeypatch.setattr(Verdicts, "stage", lambda self: None)
    monkeypatch.setattr(Verdicts, "judge", lambda self, slot, sequence, keep, live: opaque())
    return opaque


class MetaEngine:
    """Host side of a device engine: blocks and counts move, tensors hold nothing."""

    def __init__(self, kv, *, layers=2, piece=8):
        self.model = stream_model(layers=layers)
        limits = Limits(max_batch_size=4, max_num_tokens=256, max_seq_len=320, tokens_per_block=4)
        self.scheduler = Scheduler(limits, BlockPool(256))
        self.eviction = DeviceEviction(
            parse_kv_policy(kv), self.model, self.scheduler, piece=lambda *_: piece, ring_queries=32
        )
        storage = torch.empty(layers, 257, 2, 2, 4, DIM, device="meta")
        self.eviction.attach(storage, 4)

    def step(self, *feeds):
        rows = []
        for sequence, count in feeds:
            needed = -(-sequence.capped(sequence.cache_len + count) // 4) - len(sequence.block_table)
            sequence.block_table += self.scheduler.pool.allocate(max(0, needed), sequence.request_id)
            sequence.output_ids[:] = [0] * max(0, sequence.num_tokens + count - sequence.prompt_len)
            rows.append(
                TabledRow(
                    sequence=sequence,
                    start=0,
                    count=count,
                    position=sequence.num_tokens,
                    cached=sequence.cache_len,
                    ends_piece=True,
                    observed=True,
                    table=torch.empty(80, dtype=torch.int32, device="meta"),
                )
            )
        self.eviction.ring_places([row for row in rows if row.count == 1])
        cuts = [(row, self.eviction.segments(row)) for row in rows if row.count > 1]
        for layer in range(self.model.num_layers):
            for row, segments in cuts:
                for segment in segments:
                    q = torch.empty(segment.count, self.model.num_heads, DIM, device="meta")
                    lse = torch.empty(segment.count, self.model.num_heads, device="meta")
                    self.eviction.after_segment(layer, row, segment, q, lse)
        for row in rows:
            row.sequence.advance(row.count)
        self.eviction.end_step(rows)
        self.eviction.poll()


@pytest.mark.parametrize(
    "kv",
    [
        "h2o:24,interval=4,scorer=sum",
        "h2o:24,interval=4,scorer=mean",
        "h2o:24,interval=4,scorer=decay",
        "snapkv:24,recent=8,interval=4",
        "snapkv:24,recent=8,interval=8",
        "window:24,interval=4",
        "random:24,interval=4",
    ],
)
def test_prompts_and_decoding_with_eviction_read_nothing_back_and_send_nothing(kernels, kv):
    engine = MetaEngine(kv)
    sequence = make_sequence("a", 70, 40, kv)
    engine.eviction.admit(sequence)
    with NoWaiting():
        engine.step((sequence, 50))
        engine.step((sequence, 20))
        for _ in range(39):
            engine.step((sequence, 1))
    assert sequence.evictions >= 10
    assert kernels.launches > sequence.evictions


def test_a_policy_that_waits_would_be_seen(kernels):
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        torch.tensor([1, 2], device="meta")
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        torch.zeros(3, device="meta").sum().item()


def test_launches_of_a_decode_round_do_not_grow_with_the_layers(kernels):
    counts = []
    for layers in (2, 6):
        engine = MetaEngine("h2o:24,interval=4,scorer=mean", layers=layers)
        sequence = make_sequence("a", 20, 40, "h2o:24,interval=4,scorer=mean")
        engine.eviction.admit(sequence)
        engine.step((sequence, 20))
        for _ in range(7):
            engine.step((sequence, 1))
        kernels.launches = 0
        with NoWaiting() as mode:
            engine.step((sequence, 1))
        assert sequence.evictions == 1
        counts.append((mode.launches, kernels.launches))
    assert counts[0] == counts[1]
    assert sum(counts[0]) < 30, counts
