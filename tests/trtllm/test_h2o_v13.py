"""H2O as a compression manager of TensorRT-LLM 1.3 and later, on a fake of that life cycle."""

from __future__ import annotations

import importlib
import json
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pydantic
import pytest
from fakes.trtllm_kv import v13 as fake
from fakes.trtllm_kv.executor import LlmRequest
from fakes.trtllm_kv.v12 import put_in
from support.dense_oracle import open_small, random_tensors, small_model

from trtkit.engine import eviction
from trtkit.spec.engine import Request
from trtkit.spec.errors import UnsupportedError, UsageError
from trtkit.spec.kv import parse_kv_policy

MODEL = small_model()
TENSORS = random_tensors(MODEL)
BUDGET, RECENT, INTERVAL = 16, 6, 4
H2O = f"h2o:{BUDGET},sinks=0,recent={RECENT},interval={INTERVAL}"


@pytest.fixture
def adapter(monkeypatch):
    put_in(monkeypatch, fake.modules())
    from trtkit_h2o.trtllm.install import install

    assert install() == "v13"
    yield importlib.import_module("trtkit_h2o.trtllm.v13")
    sys.modules.pop("trtkit_h2o.trtllm.v13")


@pytest.fixture(autouse=True)
def whole_prompts(monkeypatch):
    monkeypatch.setattr(eviction, "_MIN_PIECE", 1000)


def prompt_of(length, seed=0):
    return np.random.default_rng(seed).integers(3, MODEL.vocab_size, length).tolist()


def util():
    return sys.modules[f"{fake.TORCH}.pyexecutor._util"]


def runtime(adapter, kv=H2O, **options):
    attention = sys.modules[f"{fake.TORCH}.attention_backend.trtllm"].TrtllmAttention
    config = adapter.H2OKvCacheCompressionConfig(kv_policy=kv)
    return fake.build_v13(util(), attention, MODEL, TENSORS, config, **options)


def embedded(prompt, count, kv=None):
    """The embedded engine with the prompt as sinks and the budget on top: what pinning means."""
    length = len(prompt)
    kv = kv or f"h2o:{BUDGET + length},sinks={length},recent={RECENT},interval={INTERVAL}"
    engine = open_small(MODEL, TENSORS, kv)
    request = Request(request_id="0", prompt_ids=tuple(prompt), max_tokens=count, ignore_eos=True)
    return [event.token_id for event in engine.generate([request])]


@pytest.mark.parametrize("late", [False, True])
def test_tokens_equal_the_embedded_engines_with_the_prompt_as_sinks(adapter, late):
    prompt = prompt_of(30)
    engine = runtime(adapter, late=late)
    assert engine.run(LlmRequest(0, list(prompt), 70)) == {0: embedded(prompt, 70)}
    assert embedded(prompt, 70) != embedded(prompt, 70, "full"), "nothing was evicted, so nothing was tested"


def test_a_mixed_batch_gives_each_request_what_it_gets_alone(adapter):
    jobs = [(prompt_of(n, seed=n), c) for n, c in [(40, 50), (9, 70), (33, 1), (20, 2), (25, 40)]]
    engine = runtime(adapter, max_batch_size=3)
    outputs = engine.run(*[LlmRequest(i, list(prompt), count) for i, (prompt, count) in enumerate(jobs)])
    assert outputs == {i: embedded(prompt, count) for i, (prompt, count) in enumerate(jobs)}
    assert engine.peak_running == 3


def test_pages_go_back_and_the_prompt_stays_untouched(adapter):
    engine = runtime(adapter, blocks=20)
    request = LlmRequest(0, prompt_of(30), 90)
    engine.waiting = [request]
    engine.step()
    prompt_pages = engine.manager.get_batch_cache_indices([0])[0][:7]
    before = engine.manager.impl.memory[prompt_pages].clone()
    while engine.waiting or engine.running:
        if request in engine.running:
            assert engine.manager.get_batch_cache_indices([0])[0][:7] == prompt_pages
            assert bool((engine.manager.impl.memory[prompt_pages] == before).all())
        engine.step()
    assert max(engine.held) <= 30 + BUDGET + INTERVAL - 1
    assert request.py_num_compressed_tokens == 30 + 90 - 1 - (30 + BUDGET) - (90 - 1 - BUDGET) % INTERVAL


@pytest.mark.parametrize("running", [{"overlap": True}, {"chunked": True, "max_num_tokens": 12}])
def test_overlap_and_chunked_prompts_change_no_token(adapter, running):
    """A pinned prompt is never scored, and a round falls due by counts."""
    jobs = [(prompt_of(n, seed=n), c) for n, c in [(40, 50), (9, 70), (33, 1), (25, 40)]]
    engine = runtime(adapter, max_batch_size=3, running=running)
    outputs = engine.run(*[LlmRequest(i, list(prompt), count) for i, (prompt, count) in enumerate(jobs)])
    assert outputs == {i: embedded(prompt, count) for i, (prompt, count) in enumerate(jobs)}


def test_a_suspended_cache_is_compacted_when_it_is_back(adapter):
    engine = runtime(adapter)
    request = LlmRequest(0, prompt_of(30), 60)
    engine.waiting = [request]
    for _ in range(BUDGET + INTERVAL):
        engine.step()
    cache = engine.manager.kv_cache_map[0]
    batch = engine._schedule()
    engine.prepare(batch)
    done = (batch, *engine.forward(batch))
    engine._move_on(done)
    engine._append(done)
    cache.is_active = False
    engine.update(batch, done[1])
    assert request.py_num_compressed_tokens == 0, "the round was due"
    cache.is_active = True
    engine.step()
    assert request.py_num_compressed_tokens == INTERVAL, "held before the next token, as if it had been in time"
    while engine.running:
        engine.step()
    assert request.output == embedded(prompt_of(30), 60)


def test_the_configuration_joins_the_union_and_leaves_the_others_alone(adapter):
    arguments = sys.modules["tensorrt_llm.llmapi.llm_args"].TorchLlmArgs
    config = adapter.H2OKvCacheCompressionConfig(kv_policy=H2O)
    taken = arguments(model="m", kv_cache_compression_config=config).kv_cache_compression_config
    assert taken is config
    parsed = arguments(model="m", kv_cache_compression_config={"algorithm": "h2o", "kv_policy": H2O})
    assert type(parsed.kv_cache_compression_config) is adapter.H2OKvCacheCompressionConfig
    other = arguments(model="m", kv_cache_compression_config={"algorithm": "quantization"})
    assert type(other.kv_cache_compression_config) is fake.QuantizationConfig
    with pytest.raises(pydantic.ValidationError):
        arguments(model="m", kv_cache_compression_config={"algorithm": "nothing"})
    assert type(pickle.loads(pickle.dumps(config))) is adapter.H2OKvCacheCompressionConfig


def test_registering_again_changes_nothing(adapter):
    attention = sys.modules[f"{fake.TORCH}.attention_backend.trtllm"].TrtllmAttention
    arguments = sys.modules["tensorrt_llm.llmapi.llm_args"].TorchLlmArgs
    before = attention.forward, arguments.model_fields["kv_cache_compression_config"].annotation
    first = adapter.register()
    assert adapter.register() == first
    assert len(first) == 2
    assert (attention.forward, arguments.model_fields["kv_cache_compression_config"].annotation) == before


def test_other_methods_keep_their_own_factory(adapter):
    with pytest.raises(ValueError, match="unknown compression algorithm quantization"):
        util().create_kv_cache_compression_manager(fake.QuantizationConfig())


def test_admission_refuses_reuse_and_speculation(adapter):
    config = adapter.H2OKvCacheCompressionConfig(kv_policy=H2O)
    validate = util().validate_kv_cache_compression_compatibility
    validate(config, SimpleNamespace(enable_block_reuse=False), None)
    with pytest.raises(UnsupportedError, match="enable_block_reuse"):
        validate(config, SimpleNamespace(enable_block_reuse=True), None)
    with pytest.raises(UnsupportedError, match="speculative"):
        validate(config, SimpleNamespace(enable_block_reuse=False), spec_config=object())


@pytest.mark.parametrize(
    ("kv", "error", "line"),
    [
        ("full", UsageError, "keeps everything"),
        ("snapkv:24,recent=8", UnsupportedError, "a pinned prompt is never scored"),
    ],
)
def test_policies_that_make_no_sense_here_are_refused(adapter, kv, error, line):
    with pytest.raises(error, match=line):
        runtime(adapter, kv).run(LlmRequest(0, prompt_of(10), 5))


def test_the_window_policy_keeps_prompt_and_newest(adapter):
    prompt = prompt_of(20)
    tokens = runtime(adapter, "window:16,sinks=0,interval=4").run(LlmRequest(0, list(prompt), 60))
    assert tokens == {0: embedded(prompt, 60, "window:36,sinks=20,interval=4")}


def test_what_was_evicted_is_told_in_the_directory_of_the_configuration(adapter, tmp_path):
    attention = sys.modules[f"{fake.TORCH}.attention_backend.trtllm"].TrtllmAttention
    config = adapter.H2OKvCacheCompressionConfig(kv_policy=H2O, counters_dir=str(tmp_path))
    fake.build_v13(util(), attention, MODEL, TENSORS, config).run(LlmRequest(0, prompt_of(30), 60))
    rounds = (60 - 1 - BUDGET) // INTERVAL
    told = json.loads((tmp_path / "rank0.json").read_text())
    assert told == {"evictions": rounds, "tokens_evicted": rounds * INTERVAL, "blocks_freed": rounds}


def test_llm_arguments_ask_for_the_second_manager(adapter):
    from trtkit_h2o.trtllm import h2o_llm_arguments

    arguments = h2o_llm_arguments(parse_kv_policy(H2O), pin_prompt=True)
    assert arguments["kv_cache_compression_config"].kv_policy == parse_kv_policy(H2O).label
    assert arguments["kv_cache_config"] == {"use_kv_cache_manager_v2": True, "enable_block_reuse": False}
    assert arguments["disable_overlap_scheduler"] is True


def test_a_pinned_prompt_must_be_asked_for(adapter):
    from trtkit_h2o.trtllm import h2o_llm_arguments

    with pytest.raises(UnsupportedError, match="evict generated tokens only"):
        h2o_llm_arguments(parse_kv_policy(H2O))
