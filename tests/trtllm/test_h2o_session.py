"""The ring, the session and the hooks by themselves."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from fakes.trtllm_kv import v12 as fake
from fakes.trtllm_kv.executor import LlmRequest, build_v12
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dense_oracle import open_small, random_tensors, small_model

from trtkit.engine import eviction
from trtkit.spec.engine import Request
from trtkit.spec.errors import EngineError, UnsupportedError, UsageError
from trtkit_h2o.trtllm.policies import RequestPolicies
from trtkit_h2o.trtllm.ring import StepRing
from trtkit_h2o.trtllm.session import EvictionSession
from trtkit_h2o.trtllm.tracked import Geometry

CPU = torch.device("cpu")
MODEL = small_model(num_layers=1)
TENSORS = random_tensors(MODEL)


def ring_of(size=4, slots=2, layers=2):
    return StepRing(layers, slots, size, CPU)


def queries(*values):
    """One query per value: 1 head of 2 elements."""
    return torch.tensor([[[float(v), -float(v)]] for v in values])


def test_a_ring_gives_back_the_last_queries_in_order():
    ring = ring_of()
    slot = ring.take()
    for position in range(10):
        ring.aim([(slot, position)])
        for layer in (0, 1):
            ring.write_aimed(layer, queries(100 * layer + position))
    assert ring.read(slot, 6, 4)[..., 0, 0].tolist() == [[6, 7, 8, 9], [106, 107, 108, 109]]


def test_rows_write_where_the_last_aim_said_at_an_address_that_never_moves():
    """A captured graph would replay the write alone: `aim` must change what it does, not where it looks."""
    ring = ring_of()
    first, second = ring.take(), ring.take()
    address = ring._aimed_B.data_ptr()
    ring.aim([(first, 0), (second, 5)])
    ring.write_aimed(0, queries(1, 2))
    ring.aim([(second, 6), None])
    assert ring._aimed_B.data_ptr() == address
    ring.write_aimed(0, queries(3, 4))
    assert ring.read(first, 0, 1)[0, :, 0, 0].tolist() == [1]
    assert ring.read(second, 5, 2)[0, :, 0, 0].tolist() == [2, 3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_replays_writes_to_where_the_last_aim_said():
    ring = StepRing(1, 2, 4, torch.device("cuda"))
    slot = ring.take()
    step = queries(0).cuda()
    ring.write_aimed(0, step)  # storage comes with the first write, outside the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ring.write_aimed(0, step)
    for position in range(6):
        ring.aim([(slot, position)])
        step.copy_(queries(position))
        graph.replay()
    assert ring.read(slot, 2, 4)[0, :, 0, 0].tolist() == [2, 3, 4, 5]


def test_a_long_prompt_leaves_its_last_queries_only():
    ring = ring_of(size=3)
    slot = ring.take()
    ring.write(slot, 1, 0, queries(*range(8)))
    assert ring.read(slot, 5, 3)[1, :, 0, 0].tolist() == [5, 6, 7]


def test_rings_that_were_given_back_are_taken_again():
    ring = ring_of(slots=1)
    slot = ring.take()
    with pytest.raises(AssertionError, match="more sequences than the batch allows"):
        ring.take()
    ring.give(slot)
    assert ring.take() == slot


def session_of(label="h2o:8,sinks=1,recent=2,interval=2", **options):
    policies = RequestPolicies(label, max_seq_len=64, tokens_per_block=4, **options)
    return EvictionSession(policies, Geometry(layers=1, kv_heads=1, max_sequences=2, device=CPU))


class NoPool:
    """Never asked for a key."""

    def view(self, layer):
        raise AssertionError(layer)

    def blocks(self, request_id):
        return [0]


def prompt_in(session, request_id, count, first=0):
    """One piece of a prompt through the session's one layer; what is owed after it."""
    session.feed(request_id, first, count, NoPool())
    session.prefill(request_id, 0, torch.randn(count, 2, 4), torch.randn(count, 1, 4), NoPool())
    return session.settle(request_id, None)


def test_beginning_again_forgets_what_was_before():
    session = session_of()
    assert session.begin(0, 20, None) == 0
    assert prompt_in(session, 0, 20) == 12
    session.begin(0, 30, None)
    assert session.evicted(0) == 0
    session.begin(1, 30, None)  # both rings are in use, none was lost
    assert session.side_bytes == 2 * (8 + 2 + 2) * 8


def test_requests_nobody_announced_are_ignored():
    session = session_of()
    session.feed(9, 0, 3, NoPool())
    assert session.prefill(9, 0, torch.randn(3, 2, 4), torch.randn(3, 1, 4), NoPool()) is None
    assert session.settle(9, None) == 0
    session.prompt_stays(9)
    session.forget(9)
    assert session.request_ids == ()


def test_what_a_prompt_owes_is_settled_once_and_counted():
    session = session_of()
    session.begin(0, 21, None)
    assert [prompt_in(session, 0, 21), session.settle(0, NoPool())] == [13, 0]
    counted = session.counters
    assert (counted.evictions, counted.tokens_evicted, counted.blocks_freed) == (1, 13, 6 - 2)


def test_a_prompt_that_comes_in_pieces_keeps_room_for_its_budget_and_one_piece():
    policies = RequestPolicies("h2o:8,sinks=1,recent=2,interval=2", max_seq_len=64, tokens_per_block=4)
    session = EvictionSession(policies, Geometry(layers=1, kv_heads=1, max_sequences=2, device=CPU, max_chunk=10))
    assert session.begin(0, 40, None) == 40 - (8 + 10)
    assert session.begin(1, 17, None) == 0


def test_a_piece_that_does_not_follow_on_is_refused():
    session = session_of()
    session.begin(0, 20, None)
    with pytest.raises(
        UnsupportedError, match=r"expected token 0 of a prompt to be next, it is 8; .*enable_block_reuse"
    ):
        session.feed(0, 8, 12, NoPool())


def test_queries_of_a_piece_nobody_announced_are_refused():
    session = session_of()
    session.begin(0, 20, None)
    with pytest.raises(EngineError, match="no step announced"):
        session.prefill(0, 0, torch.randn(20, 2, 4), torch.randn(20, 1, 4), NoPool())


def test_a_decode_step_must_be_the_next_one():
    session = session_of()
    session.begin(0, 20, None)
    with pytest.raises(UnsupportedError, match="expected token 0 of a request to be next, it is 20"):
        session.aim([(0, 20)])
    prompt_in(session, 0, 20)
    with pytest.raises(UnsupportedError, match="expected token 20 of a request to be next, it is 21"):
        session.aim([(0, 21)])


@pytest.mark.parametrize(
    ("label", "options", "error", "line"),
    [
        ("full", {}, UsageError, "keeps everything"),
        ("nothing:8", {}, UsageError, "unknown KV policy"),
        ("h2o:100", {}, UsageError, "above max_seq_len 64"),
        ("snapkv:8,recent=4", {"pin_prompt": True}, UnsupportedError, "never scored"),
    ],
)
def test_policies_are_refused_before_any_request(label, options, error, line):
    with pytest.raises(error, match=line):
        RequestPolicies(label, max_seq_len=64, tokens_per_block=4, **options)


def test_a_pinned_share_is_one_of_the_generated_tokens():
    policies = RequestPolicies("h2o:50%,sinks=1,recent=2", max_seq_len=64, tokens_per_block=4, pin_prompt=True)
    budget = policies.of(20, 30).budget
    assert (budget.tokens, budget.sinks, budget.recent, budget.interval) == (20 + 15, 20 + 1, 2, 4)
    assert policies.of(20, None).budget.tokens == 20 + 22


@pytest.fixture
def adapter(monkeypatch):
    fake.put_in(monkeypatch, fake.modules())
    yield importlib.import_module("trtkit_h2o.trtllm.v12")
    sys.modules.pop("trtkit_h2o.trtllm.v12")


def test_hooks_read_fused_and_separate_projections_alike(adapter):
    generator = torch.Generator().manual_seed(0)
    fused = torch.randn(20 + 2, (4 + 2 * 2) * 8, generator=generator)  # a prompt of 20 and two generation rows
    chosen, noted = [], []
    for q, k in ((fused, None), (fused[:, :32], fused[:, 32:48])):
        session = EvictionSession(
            RequestPolicies("h2o:8,sinks=1,recent=2", max_seq_len=64, tokens_per_block=4),
            Geometry(layers=1, kv_heads=2, max_sequences=3, device=CPU),
        )
        session.begin(7, 20, None)
        session.feed(7, 0, 20, NoPool())
        session.observe = lambda layer, rows: noted.append((layer, rows))
        metadata = SimpleNamespace(
            kv_cache_manager=SimpleNamespace(h2o=session, h2o_pool=NoPool(), layer_offsets={5: 0}),
            kv_cache_params=SimpleNamespace(num_cached_tokens_per_seq=[0, 5, 6]),
            num_contexts=1,
            num_generations=2,
            num_ctx_tokens=20,
            request_ids=[7, 8, 9],
            context_lens=torch.tensor([20]),
        )
        attention = adapter.H2OTrtllmAttention(5, 4, 8, num_kv_heads=2)
        chosen.append(attention.sparse_kv_predict(q, k, metadata))
        assert attention.sparse_attn_predict(q, k, metadata) == (None, None)
    assert torch.equal(chosen[0][0], chosen[1][0])
    assert chosen[0][1].tolist() == [0, 8]
    assert [layer for layer, _ in noted] == [0, 0]
    assert torch.equal(noted[0][1], fused[20:, :32].view(2, 4, 8))
    assert torch.equal(noted[0][1], noted[1][1])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_budget_and_any_mix_of_requests_give_the_embedded_engines_tokens(data):
    budget = data.draw(st.integers(6, 30))
    sinks = data.draw(st.integers(0, 3))
    recent = data.draw(st.integers(0, budget - sinks))
    interval = data.draw(st.integers(1, 9))
    block = data.draw(st.sampled_from([2, 4, 8]))
    scorer = data.draw(st.sampled_from(["sum", "mean", "decay"]))
    overlap = data.draw(st.booleans())
    kv = f"h2o:{budget},sinks={sinks},recent={recent},interval={interval},scorer={scorer}"
    jobs = data.draw(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 40)), min_size=1, max_size=4))
    prompts = [
        torch.randint(3, 96, (length,), generator=torch.Generator().manual_seed(i)).tolist()
        for i, (length, _) in enumerate(jobs)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eviction, "_MIN_PIECE", 1000)
        fake.put_in(patch, fake.modules())
        v12 = importlib.import_module("trtkit_h2o.trtllm.v12")
        engine = build_v12(
            MODEL,
            TENSORS,
            v12.H2OSparseAttentionConfig(kv_policy=kv),
            tokens_per_block=block,
            max_batch_size=3,
            overlap=overlap,
        )
        outputs = engine.run(
            *[LlmRequest(i, list(p), n) for i, (p, (_, n)) in enumerate(zip(prompts, jobs, strict=True))]
        )
        sys.modules.pop("trtkit_h2o.trtllm.v12")
        embedded = open_small(MODEL, TENSORS, kv, tokens_per_block=block)
        expected = {i: [] for i in range(len(jobs))}
        requests = [
            Request(request_id=str(i), prompt_ids=tuple(p), max_tokens=n, ignore_eos=True)
            for i, (p, (_, n)) in enumerate(zip(prompts, jobs, strict=True))
        ]
        for event in embedded.generate(requests):
            expected[int(event.request_id)].append(event.token_id)
    assert outputs == expected
    assert len(engine.manager.impl.free) == 256
