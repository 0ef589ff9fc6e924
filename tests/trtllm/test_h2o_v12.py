"""H2O through TensorRT-LLM 1.2's hooks, on a fake that keeps real pools: the same tokens as the embedded engine."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from fakes.trtllm_kv import v12 as fake
from fakes.trtllm_kv.executor import Executor, LlmRequest, LlmRequestState, Ranks, build_v12
from fakes.trtllm_kv.operator import AttentionOperator
from support.dense_oracle import (
    DenseOracle,
    greedy_with_eviction,
    h2o_policy,
    open_small,
    random_tensors,
    small_model,
)

from trtkit.engine import eviction
from trtkit.spec.engine import Request
from trtkit.spec.errors import EngineError, MissingDependencyError, UnsupportedError, UsageError
from trtkit.spec.kv import parse_kv_policy

MODEL = small_model()
TENSORS = random_tensors(MODEL)
H2O = "h2o:24,sinks=2,recent=6,interval=4"


@pytest.fixture
def adapter(monkeypatch):
    """The adapter, installed into a fresh fake of TensorRT-LLM 1.2."""
    fake.put_in(monkeypatch, fake.modules())
    from trtkit_h2o.trtllm.install import install

    assert install() == "v12"
    yield importlib.import_module("trtkit_h2o.trtllm.v12")
    sys.modules.pop("trtkit_h2o.trtllm.v12")


@pytest.fixture(autouse=True)
def whole_prompts(monkeypatch):
    """TensorRT-LLM feeds a prompt whole under H2O, so the embedded engine does here; beyond 32 tokens it would not."""
    monkeypatch.setattr(eviction, "_MIN_PIECE", 1000)


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(3, MODEL.vocab_size, length).tolist()


def embedded(kv, *jobs, **options):
    """The embedded engine's tokens for (prompt, count) jobs."""
    engine = open_small(MODEL, TENSORS, kv, **options)
    requests = [
        Request(request_id=str(i), prompt_ids=tuple(prompt), max_tokens=count, ignore_eos=True)
        for i, (prompt, count) in enumerate(jobs)
    ]
    tokens = {i: [] for i in range(len(jobs))}
    for event in engine.generate(requests):
        tokens[int(event.request_id)].append(event.token_id)
    return tokens


def runtime(adapter, kv, **options) -> Executor:
    return build_v12(MODEL, TENSORS, adapter.H2OSparseAttentionConfig(kv_policy=kv), **options)


def jobs_to_requests(jobs):
    return [LlmRequest(i, list(prompt), count) for i, (prompt, count) in enumerate(jobs)]


def test_without_a_policy_the_fake_runtime_says_what_the_embedded_engine_says(adapter):
    jobs = [(prompt_of(40), 30), (prompt_of(17, seed=1), 12)]
    assert build_v12(MODEL, TENSORS, None).run(*jobs_to_requests(jobs)) == embedded("full", *jobs)


@pytest.mark.parametrize("scorer", ["sum", "mean", "decay"])
@pytest.mark.parametrize("length", [10, 24, 25, 60])
def test_tokens_equal_the_embedded_engines(adapter, scorer, length):
    job = (prompt_of(length), 60)
    kv = f"{H2O},scorer={scorer}"
    assert runtime(adapter, kv).run(*jobs_to_requests([job])) == embedded(kv, job)
    assert embedded(kv, job) != embedded("full", job), "nothing was evicted, so nothing was tested"


@pytest.mark.parametrize("kv", ["window:20,interval=4", "snapkv:24,recent=8,sinks=2,interval=4", "h2o:24,interval=48"])
def test_other_policies_and_long_intervals_equal_the_embedded_engines_too(adapter, kv):
    job = (prompt_of(50), 110)
    assert runtime(adapter, kv).run(*jobs_to_requests([job])) == embedded(kv, job)


def test_a_share_is_one_of_each_requests_own_context(adapter):
    kv = "h2o:50%,sinks=2,recent=6,interval=4"
    jobs = [(prompt_of(40), 40), (prompt_of(20, seed=1), 30)]
    assert runtime(adapter, kv).run(*jobs_to_requests(jobs)) == embedded(kv, *jobs)
    assert embedded(kv, *jobs) != embedded("full", *jobs)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_mixed_batch_gives_each_request_what_it_gets_alone(adapter, overlap):
    jobs = [(prompt_of(n, seed=n), c) for n, c in [(60, 50), (9, 70), (33, 1), (20, 3), (45, 40), (30, 25)]]
    engine = runtime(adapter, H2O, max_batch_size=3, overlap=overlap)
    assert engine.run(*jobs_to_requests(jobs)) == embedded(H2O, *jobs)
    assert engine.peak_running == 3


@pytest.mark.parametrize("kv", [H2O, "snapkv:24,recent=8,sinks=2,interval=4", "window:20,interval=4"])
def test_the_overlap_scheduler_changes_no_token_though_steps_are_prepared_before_results_are_known(adapter, kv):
    """A round falls due by counts, which are known when a step is enqueued; stream order does the rest."""
    jobs = [(prompt_of(40), 60), (prompt_of(15, seed=1), 50)]
    engine = runtime(adapter, kv, overlap=True)
    assert engine.run(*jobs_to_requests(jobs)) == embedded(kv, *jobs)
    assert engine.manager.h2o.counters.evictions > 10


def test_a_request_that_ends_while_its_next_step_is_under_way_leaves_the_others_alone(adapter):
    """Under overlap a stop token is heard of one step late."""
    jobs = [(prompt_of(40, seed=n), 60) for n in range(3)]
    whole = embedded(H2O, *jobs)
    requests = jobs_to_requests(jobs)
    requests[1].stop_ids = (whole[1][29],)
    engine = runtime(adapter, H2O, overlap=True, max_batch_size=2)
    outputs = engine.run(*requests)
    assert outputs == {**whole, 1: whole[1][: whole[1].index(whole[1][29]) + 1]}
    assert len(engine.manager.impl.free) == 256


def chunked_oracle(prompt, ends, count):
    """The dense masked model, cut where the runtime's chunks ended."""
    oracle = DenseOracle(MODEL, TENSORS, h2o_policy(parse_kv_policy(H2O), interval=4))
    for start, end in itertools.pairwise([0, *ends[:-1]]):
        oracle.step(prompt[start:end])
        oracle.evict()
    before = ends[-2] if len(ends) > 1 else 0
    return greedy_with_eviction(Continued(oracle, before), prompt, count, piece=len(prompt))[0]


class Continued:
    """An oracle that has seen the first tokens of a prompt already."""

    def __init__(self, oracle, seen):
        assert oracle.num_tokens == seen
        self._oracle = oracle

    def __getattr__(self, name):
        return getattr(self._oracle, name)


@pytest.mark.parametrize("overlap", [False, True])
def test_prompts_in_chunks_are_cut_after_each_and_equal_the_masked_dense_model(adapter, overlap):
    jobs = [(prompt_of(n, seed=n), c) for n, c in [(150, 30), (70, 20), (23, 30), (100, 10)]]
    requests = jobs_to_requests(jobs)
    engine = runtime(adapter, H2O, max_num_tokens=16, chunked=True, max_batch_size=3, overlap=overlap)
    outputs = engine.run(*requests)
    assert [len(r.chunk_ends) > 2 for r in requests] == [True, True, False, True]
    assert outputs == {
        i: chunked_oracle(prompt, request.chunk_ends, count)
        for i, ((prompt, count), request) in enumerate(zip(jobs, requests, strict=True))
    }


@pytest.mark.parametrize(
    "kv",
    [
        f"{H2O},scorer=sum",
        f"{H2O},scorer=decay",
        "snapkv:24,recent=8,sinks=2,interval=4",
        "snapkv:24,recent=16,sinks=2,interval=4",  # looks through queries of the chunk before, too
        "window:20,interval=4",
    ],
)
def test_chunks_as_long_as_the_embedded_engines_pieces_give_its_tokens(adapter, monkeypatch, kv):
    monkeypatch.setattr(eviction, "_MIN_PIECE", 12)
    job = (prompt_of(130), 60)
    engine = runtime(adapter, kv, max_num_tokens=12, chunked=True)
    assert engine.run(*jobs_to_requests([job])) == embedded(kv, job)
    assert embedded(kv, job) != embedded("full", job)


def test_a_chunked_prompt_never_holds_more_than_its_budget_and_one_step(adapter):
    budget, step, block = 24, 16, 4
    engine = runtime(adapter, H2O, max_num_tokens=step, chunked=True, blocks=64)
    engine.run(LlmRequest(0, prompt_of(200), 20))
    assert engine.peak_blocks == (budget + step) // block, "the whole prompt is 50 blocks"
    whole = runtime(adapter, H2O, blocks=64)
    whole.run(LlmRequest(0, prompt_of(200), 20))
    assert whole.peak_blocks == 50


def test_what_was_evicted_is_counted_as_the_embedded_engine_counts_it(adapter):
    jobs = [(prompt_of(60), 50), (prompt_of(9, seed=1), 70)]
    engine = runtime(adapter, H2O)
    engine.run(*jobs_to_requests(jobs))
    reference = open_small(MODEL, TENSORS, H2O)
    for _ in reference.generate(
        Request(request_id=str(i), prompt_ids=tuple(p), max_tokens=n, ignore_eos=True) for i, (p, n) in enumerate(jobs)
    ):
        pass
    stats, counted = reference.kv_stats(), engine.manager.h2o.counters
    assert stats.evictions > 20
    assert (counted.evictions, counted.tokens_evicted) == (stats.evictions, stats.tokens_evicted)
    assert counted.blocks_freed == stats.blocks_freed


def test_with_guaranteed_blocks_nobody_is_paused_and_tokens_stay(adapter):
    jobs = [(prompt_of(36, seed=n), 60) for n in range(4)]
    engine = runtime(adapter, H2O, blocks=30, capacity="GUARANTEED_NO_EVICT")
    assert engine.run(*jobs_to_requests(jobs)) == embedded(H2O, *jobs)
    assert engine.pauses == 0
    assert engine.peak_running == 1, "blocks that eviction frees stay reserved"


def test_a_long_prompt_is_cut_once_and_equals_the_masked_dense_model(adapter):
    prompt = prompt_of(150)
    oracle = DenseOracle(MODEL, TENSORS, h2o_policy(parse_kv_policy(H2O), interval=4))
    expected, _ = greedy_with_eviction(oracle, prompt, 40, piece=len(prompt))
    assert runtime(adapter, H2O).run(LlmRequest(0, list(prompt), 40)) == {0: expected}


def test_eviction_gives_blocks_back_and_decoding_stays_within_budget_and_interval(adapter):
    engine = runtime(adapter, H2O, blocks=20)
    engine.run(LlmRequest(0, prompt_of(60), 80))
    assert engine.held[0] == 24, "the prompt is cut to the budget in the step that fed it"
    assert {24, 25, 26, 27} == set(engine.held[:-1])
    assert len(engine.manager.impl.free) == 20


def test_freed_blocks_admit_more_requests_than_fit_without_eviction(adapter):
    jobs = [(prompt_of(40, seed=n), 60) for n in range(4)]
    thrifty, full = runtime(adapter, H2O, blocks=40), build_v12(MODEL, TENSORS, None, blocks=40)
    assert thrifty.run(*jobs_to_requests(jobs)) == embedded(H2O, *jobs)
    full.run(*jobs_to_requests(jobs))
    assert thrifty.pauses == 0
    assert full.pauses > 0


def test_a_paused_request_starts_its_bookkeeping_anew(adapter):
    engine = runtime(adapter, "h2o:40,sinks=2,recent=6,interval=4", blocks=20)
    requests = jobs_to_requests([(prompt_of(36), 60), (prompt_of(36, seed=1), 60)])
    outputs = engine.run(*requests)
    assert engine.pauses > 0
    assert [len(tokens) for tokens in outputs.values()] == [60, 60]
    assert engine.manager.h2o.side_bytes == engine.manager.h2o._ring.num_bytes, "ledgers outlive their requests"


def test_a_request_that_never_outgrows_its_budget_costs_nothing(adapter):
    engine = runtime(adapter, H2O)
    engine.manager.h2o.begin(7, 20, 8)
    assert not engine.manager.h2o.tracks(7), "20 + 8 - 1 is below 24 + 4"
    engine.manager.h2o.begin(7, 20, 9)
    assert engine.manager.h2o.tracks(7)
    engine.manager.h2o.begin(8, 20, None)
    assert engine.manager.h2o.tracks(8), "an unknown limit may be any"


def test_a_rank_with_half_the_heads_keeps_as_many_tokens(adapter):
    """Ranks decide alone; equal counts are all that one block table over all ranks' layers needs."""
    from trtkit_h2o.trtllm.policies import RequestPolicies
    from trtkit_h2o.trtllm.session import EvictionSession
    from trtkit_h2o.trtllm.tracked import Geometry

    policies = RequestPolicies(H2O, max_seq_len=256, tokens_per_block=4)
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(50, 4, 8, generator=generator), torch.randn(50, 2, 8, generator=generator)

    def kept(query_heads, kv_heads):
        geometry = Geometry(
            layers=1, kv_heads=kv_heads.stop - kv_heads.start, max_sequences=1, device=torch.device("cpu")
        )
        session = EvictionSession(policies, geometry)
        session.begin(0, 50, None)
        session.feed(0, 0, 50, None)
        slots = session.prefill(0, 0, queries[:, query_heads], keys[:, kv_heads], None)
        assert session.settle(0, None) == 26
        return slots

    whole = kept(slice(0, 4), slice(0, 2))
    halves = [kept(slice(0, 2), slice(0, 1)), kept(slice(2, 4), slice(1, 2))]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(halves[0], halves[1]), "heads that agree show nothing"


def test_two_ranks_agree_on_tokens_and_lengths_without_telling_each_other_what_they_keep(adapter):
    jobs = [(prompt_of(45), 30), (prompt_of(20, seed=1), 25)]
    ranks = Ranks(2)
    engines = [runtime(adapter, H2O, rank=rank, ranks=ranks) for rank in range(2)]
    outputs = ranks.run(engines, lambda: jobs_to_requests(jobs))
    assert outputs == [embedded(H2O, *jobs)] * 2
    assert engines[0].held == engines[1].held


def test_the_pool_is_read_with_heads_outside_tokens_whatever_its_label(monkeypatch):
    fake.put_in(monkeypatch, fake.modules(manager=fake.OldKVCacheManager))
    monkeypatch.delitem(sys.modules, "trtkit_h2o.trtllm.v12", raising=False)
    old = importlib.import_module("trtkit_h2o.trtllm.v12")
    job = (prompt_of(40), 50)
    assert runtime(old, H2O).run(*jobs_to_requests([job])) == embedded(H2O, job)
    sys.modules.pop("trtkit_h2o.trtllm.v12")


def test_a_pool_that_is_shown_as_a_copy_is_refused(monkeypatch):
    """Compaction would change the copy and leave the cache as it is."""

    class Copying(fake.KVCacheManager):
        def get_buffers(self, layer_idx, kv_layout="NHD"):
            return super().get_buffers(layer_idx, kv_layout).clone()

    fake.put_in(monkeypatch, fake.modules(manager=Copying))
    adapter = importlib.import_module("trtkit_h2o.trtllm.v12")
    with pytest.raises(UnsupportedError, match="get_buffers shows a copy"):
        runtime(adapter, H2O)
    sys.modules.pop("trtkit_h2o.trtllm.v12")


def test_layers_with_block_tables_of_their_own_are_refused(monkeypatch):
    class PerLayer(fake.KVCacheManager):
        def get_batch_cache_indices(self, request_ids, layer_idx=None, window_size=None):
            return [[layer_idx or 0, *blocks] for blocks in super().get_batch_cache_indices(request_ids)]

    fake.put_in(monkeypatch, fake.modules(manager=PerLayer))
    adapter = importlib.import_module("trtkit_h2o.trtllm.v12")
    manager = runtime(adapter, H2O).manager
    manager.impl.add_sequence(0, 10, 1, None)
    with pytest.raises(UnsupportedError, match="block tables of their own"):
        manager.h2o_pool.blocks(0)
    sys.modules.pop("trtkit_h2o.trtllm.v12")


def test_every_module_that_imported_a_dispatch_function_by_value_is_reached(adapter):
    config = adapter.H2OSparseAttentionConfig(kv_policy=H2O)
    for module in (
        "attention_backend",
        "attention_backend.sparse",
        "attention_backend.sparse.utils",
        "pyexecutor._util",
    ):
        found = sys.modules[f"{fake.TORCH}.{module}"].get_sparse_attn_kv_cache_manager
        assert found(config) is adapter.H2OKVCacheManager, module
        assert found(sparse_attn_config=config) is adapter.H2OKVCacheManager, module
    for module in ("attention_backend", "attention_backend.sparse", "attention_backend.utils"):
        found = sys.modules[f"{fake.TORCH}.{module}"].get_trtllm_sparse_attn_attention_backend
        assert found(config) is adapter.H2OTrtllmAttention, module


def test_attention_backends_without_an_adapter_are_refused_rather_than_given_rocketkv(adapter):
    utils = sys.modules[f"{fake.TORCH}.attention_backend.utils"]
    with pytest.raises(UnsupportedError, match="attn_backend must be TRTLLM"):
        utils.get_vanilla_sparse_attn_attention_backend(adapter.H2OSparseAttentionConfig(kv_policy=H2O))
    rocket = fake.RocketSparseAttentionConfig()
    assert utils.get_vanilla_sparse_attn_attention_backend(rocket) == "RocketVanillaAttention"


def test_other_configurations_keep_their_own_classes(adapter):
    util = sys.modules[f"{fake.TORCH}.pyexecutor._util"]
    assert util.get_sparse_attn_kv_cache_manager(fake.RocketSparseAttentionConfig()) is fake.RocketKVCacheManager
    with pytest.raises(ValueError, match="Unsupported sparse attention algorithm: dsa"):
        util.get_sparse_attn_kv_cache_manager(fake.DeepSeekSparseAttentionConfig())


def test_installing_again_changes_nothing(adapter):
    names = ("get_sparse_attn_kv_cache_manager", "get_trtllm_sparse_attn_attention_backend")
    utils = sys.modules[f"{fake.SPARSE}.utils"]
    before = [getattr(utils, name) for name in names]
    first = adapter.register()
    assert adapter.register() == first
    assert len(first) == 12, first
    assert [getattr(utils, name) for name in names] == before


def test_the_configuration_passes_the_closed_union_uncopied_and_survives_pickling(adapter):
    config = adapter.H2OSparseAttentionConfig(kv_policy=H2O)
    arguments = fake.TorchLlmArgs(model="m", sparse_attention_config=config)
    assert arguments.sparse_attention_config is config
    again = pickle.loads(pickle.dumps(arguments)).sparse_attention_config
    assert type(again) is adapter.H2OSparseAttentionConfig
    assert again.kv_policy == H2O


def test_unpickling_the_configuration_in_a_worker_registers_there(adapter, monkeypatch):
    sent = pickle.dumps(adapter.H2OSparseAttentionConfig(kv_policy=H2O))
    fake.put_in(monkeypatch, fake.modules())  # another process: fresh modules, nothing patched
    util = sys.modules[f"{fake.TORCH}.pyexecutor._util"]
    assert util.get_sparse_attn_kv_cache_manager is fake.get_sparse_attn_kv_cache_manager
    received = pickle.loads(sent)
    assert util.get_sparse_attn_kv_cache_manager(received).__name__ == "H2OKVCacheManager"


def test_a_worker_process_that_has_heard_of_nothing_registers_by_unpickling(adapter, tmp_path):
    sent = tmp_path / "arguments"
    config = adapter.H2OSparseAttentionConfig(kv_policy=H2O)
    sent.write_bytes(pickle.dumps(config))
    code = (
        "import pathlib, pickle, sys, pytest\n"
        "from fakes.trtllm_kv import v12\n"
        "v12.put_in(pytest.MonkeyPatch(), v12.modules())\n"
        "assert not any(name.startswith('trtkit_h2o') for name in sys.modules)\n"
        f"config = pickle.loads(pathlib.Path({str(sent)!r}).read_bytes())\n"
        "util = sys.modules[f'{v12.TORCH}.pyexecutor._util']\n"
        "print(util.get_sparse_attn_kv_cache_manager(config).__name__, config.kv_policy)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert run.stdout.split() == ["H2OKVCacheManager", H2O], run.stderr


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("enable_block_reuse", True, "enable_block_reuse must be False"),
        ("host_cache_size", 1 << 30, "host_cache_size must be 0"),
        ("max_attention_window", [64], "max_attention_window must be left out"),
        ("max_beam_width", 2, "max_beam_width must be 1"),
        ("spec_config", object(), "speculative decoding must be off"),
        ("mapping", "pp", "pipeline parallelism must be 1"),
        ("dtype", fake.DataType.FP8, "must be 16-bit, it is FP8"),
    ],
)
def test_what_eviction_cannot_live_with_is_refused_before_a_pool_exists(adapter, monkeypatch, option, value, line):
    from fakes.trtllm_kv.executor import Mapping

    monkeypatch.setattr(fake, "BlockPool", None)
    cache = {"enable_block_reuse": False}
    options = {"max_batch_size": 2, "max_seq_len": 128, "tokens_per_block": 4, "mapping": Mapping(), "num_layers": 1}
    if option in fake.KvCacheConfig.model_fields:
        cache[option] = value
    else:
        options[option] = Mapping(pp_size=2) if value == "pp" else value
    with pytest.raises(UnsupportedError, match=line):
        adapter.H2OKVCacheManager(
            fake.KvCacheConfig(**cache),
            "SELF",
            sparse_attn_config=adapter.H2OSparseAttentionConfig(kv_policy=H2O),
            **options,
        )


def test_a_policy_that_keeps_everything_is_refused(adapter):
    with pytest.raises(UsageError, match="keeps everything"):
        runtime(adapter, "full")


@pytest.mark.parametrize(
    ("positional", "named", "line"),
    [
        ((), {"pos_embd_params": object()}, "rotation outside"),
        ((), {"q_scaling": 0.5}, "q_scaling=0.5"),
        ((2, None, 0.25), {}, "q_scaling=0.25"),
    ],
)
def test_layers_whose_scores_or_positions_would_be_wrong_are_refused(adapter, positional, named, line):
    with pytest.raises(UnsupportedError, match=line):
        adapter.H2OTrtllmAttention(0, 4, 8, *positional, **named)
    adapter.H2OTrtllmAttention(0, 4, 8, 2, None, 1.0, None)


def test_a_prompt_whose_first_tokens_were_found_cached_is_refused(adapter):
    engine = runtime(adapter, H2O, chunked=True)
    request = LlmRequest(0, prompt_of(30), 20)
    engine.waiting = [request]
    batch = engine._schedule()
    engine.prepare(batch)
    request.context_current_position, request.context_chunk_size = 16, 14
    with pytest.raises(UnsupportedError, match="expected token 0 of a prompt to be next, it is 16"):
        engine.forward(batch)


def test_a_release_that_skips_the_prompt_hook_is_noticed(adapter, monkeypatch):
    monkeypatch.setattr(adapter.H2OTrtllmAttention, "sparse_kv_predict", lambda *_: (None, None))
    with pytest.raises(EngineError, match="0 of 2 layers"):
        runtime(adapter, H2O).run(LlmRequest(0, prompt_of(30), 5))


@pytest.mark.parametrize(
    ("skipped", "where"), [("every", "at the end of a prompt"), ("between", "between the chunks of a prompt")]
)
def test_an_operator_that_does_not_compact_is_noticed_the_first_time(adapter, monkeypatch, skipped, where):
    """Nothing in Python tells whether it does after every chunk; the pool does."""
    compact = AttentionOperator._compact

    def lazy(self, metadata, *sparse):
        last = int(metadata.kv_lens[0]) == 24 + 60 % 16
        if skipped == "between" and last:
            compact(self, metadata, *sparse)

    monkeypatch.setattr(AttentionOperator, "_compact", lazy)
    chunked = {"max_num_tokens": 16, "chunked": True} if skipped == "between" else {}
    with pytest.raises(EngineError, match=f"did not move them, {where}"):
        runtime(adapter, H2O, **chunked).run(LlmRequest(0, prompt_of(60), 5))


def test_rows_of_warm_up_and_padding_leave_real_requests_alone(adapter):
    """They are no requests of the manager's; their queries go to the spare ring."""
    job = (prompt_of(40), 50)
    engine = runtime(adapter, H2O)
    (request,) = jobs_to_requests([job])
    dummy = LlmRequest(99, prompt_of(10, seed=5), 1000)
    engine.waiting = [request]
    engine.step()
    engine.manager.impl.memory[:] = engine.manager.impl.memory.nan_to_num()
    engine.manager.impl.add_sequence(99, 10, 1, dummy)
    dummy.tokens.append(3)
    dummy.state = LlmRequestState.GENERATION_IN_PROGRESS
    engine.running.insert(0, dummy)
    while request in engine.running:
        engine.step()
    assert {0: request.output} == embedded(H2O, job)
    assert not engine.manager.h2o.tracks(99)
    assert engine.manager.impl.num_tokens(99) == 10 + 49, "nobody evicts from it"


def test_h2o_needs_tensorrt_llm():
    from trtkit_h2o.trtllm import h2o_llm_arguments, install

    with pytest.raises(MissingDependencyError, match="--target embedded"):
        install()
    with pytest.raises(UsageError, match="'full' needs no eviction"):
        h2o_llm_arguments(parse_kv_policy("full"))


def test_llm_arguments_turn_off_what_the_manager_would_refuse(adapter, tmp_path):
    from trtkit_h2o.trtllm import h2o_llm_arguments

    arguments = h2o_llm_arguments(parse_kv_policy(H2O), counters_dir=tmp_path)
    assert arguments.pop("sparse_attention_config") == adapter.H2OSparseAttentionConfig(
        kv_policy=parse_kv_policy(H2O).label, counters_dir=str(tmp_path)
    )
    assert arguments == {
        "kv_cache_config": {"enable_block_reuse": False, "host_cache_size": 0},
        "attn_backend": "TRTLLM",
        "max_beam_width": 1,
        "disable_overlap_scheduler": True,
        "cuda_graph_config": None,
    }


def test_every_rank_tells_what_it_has_evicted_and_they_agree(adapter, tmp_path):
    ranks = Ranks(2)
    config = adapter.H2OSparseAttentionConfig(kv_policy=H2O, counters_dir=str(tmp_path))
    engines = [build_v12(MODEL, TENSORS, config, rank=rank, ranks=ranks) for rank in range(2)]
    ranks.run(engines, lambda: jobs_to_requests([(prompt_of(45), 30)]))
    told = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    # One cut of the prompt, 45 to 24; then 29 tokens are fed, and every fourth of them holds a round.
    assert told == [{"evictions": 1 + 7, "tokens_evicted": 21 + 28, "blocks_freed": 6 + 7}] * 2


def test_the_run_that_sizes_the_pool_is_not_counted(adapter, tmp_path):
    """TensorRT-LLM builds a manager with a small pool first, runs a longest prompt through it, and builds another."""
    config = adapter.H2OSparseAttentionConfig(kv_policy=H2O, counters_dir=str(tmp_path))
    build_v12(MODEL, TENSORS, config, blocks=60, estimating=True).run(LlmRequest(0, prompt_of(200), 3))
    build_v12(MODEL, TENSORS, config).run(LlmRequest(1, prompt_of(30), 2))
    told = json.loads((tmp_path / "rank0.json").read_text())
    assert told == {"evictions": 1, "tokens_evicted": 6, "blocks_freed": 2}


def test_no_prompt_is_pinned_where_the_whole_policy_can_run(adapter):
    from trtkit_h2o.trtllm import h2o_llm_arguments

    with pytest.raises(UnsupportedError, match="pins no prompt"):
        h2o_llm_arguments(parse_kv_policy(H2O), pin_prompt=True)
