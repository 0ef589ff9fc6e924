"""The device path, its kernels' torch twins on a CPU, writes the CPU engine's tokens under every load and policy."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from support.device_engines import Replays, device_runner, open_device
from support.engine_models import fp8_rows, kv_bytes, limits, make_hf, open_hf, quantised, spec_of, trtllm_tensors

from trtkit.engine.device import model
from trtkit.engine.loop import EmbeddedEngine
from trtkit.engine.open import open_tensors
from trtkit.spec.dtype import DType
from trtkit.spec.engine import FinishReason, Request, Sampling, ScoreRequest, TokenEvent
from trtkit.spec.kv import KVPolicySpec, parse_kv_policy

FULL = KVPolicySpec()


@cache
def _hf() -> Any:
    return make_hf()


def _requests(seed: int, count: int = 14, longest: int = 60, **fields: Any) -> list[Request]:
    """Prompts of 1 to `longest` tokens, every third one sampled."""
    draw = np.random.default_rng(seed)
    return [
        Request(
            request_id=str(index),
            prompt_ids=tuple(int(token) for token in draw.integers(3, 90, int(draw.integers(1, longest)))),
            max_tokens=int(draw.integers(1, 40)),
            sampling=Sampling(temperature=0.9, top_k=30, top_p=0.9, seed=index) if index % 3 == 0 else Sampling(),
            **{"ignore_eos": True, **fields},
        )
        for index in range(count)
    ]


def _run(engine: EmbeddedEngine, requests: list[Request]) -> dict[str, list[tuple[Any, ...]]]:
    """What each request was told; the books are proved after every event."""
    told: dict[str, list[tuple[Any, ...]]] = {}
    with engine:
        for event in engine.generate(requests):
            told.setdefault(event.request_id, []).append((event.index, event.token_id, event.finish, event.error))
            engine.check()
        assert engine.kv_stats().blocks_used == 0
        assert not engine._runner._places if hasattr(engine._runner, "_places") else True
    return told


@pytest.mark.parametrize("blocks", [256, 34])
@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("captured", [False, True])
def test_it_writes_the_cpu_engines_tokens(blocks: int, late: int, *, captured: bool) -> None:
    requests = _requests(1)
    with open_hf(_hf(), blocks=blocks) as cpu:
        expected = _run(cpu, requests)
    assert (cpu.kv_stats().preemptions > 0) == (blocks == 34), "the small pool must preempt"
    capture = Replays() if captured else None
    assert _run(open_device(_hf(), blocks=blocks, late=late, capture=capture), requests) == expected
    if capture is not None:
        assert capture.captured == 4, "buckets 1, 2, 4 and 8"
        assert capture.replayed > 10


POLICIES = (
    "window:24",
    "snapkv:24",
    "random:24",
    "h2o:24",
    "h2o:budget=24,recent=4,sinks=2,interval=8",
    "h2o:budget=24,scorer=decay",
    "h2o:50%",
)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("late", [0, 1])
def test_it_evicts_as_the_cpu_engine_does(policy: str, late: int) -> None:
    spec = parse_kv_policy(policy)
    requests = _requests(2, count=8, longest=110)
    size = kv_bytes(spec_of(_hf()), 90)
    with open_tensors(
        spec_of(_hf()), trtllm_tensors(_hf()), limits=limits(kv_memory_bytes=size), kv_policy=spec
    ) as cpu:
        expected = _run(cpu, requests)
        evictions, preemptions = cpu.kv_stats().evictions, cpu.kv_stats().preemptions
    assert evictions > 5
    device = open_device(_hf(), blocks=90, policy=spec, late=late, capture=Replays())
    assert _run(device, requests) == expected
    assert device.kv_stats().preemptions >= preemptions > 0 or preemptions == 0


def test_requests_bring_their_own_policy() -> None:
    requests = [
        replace(request, kv=parse_kv_policy(kv) if kv else None)
        for request, kv in zip(_requests(3, count=6, longest=100), ["full", "h2o:16", None, "window:20", "h2o:40", "full"], strict=True)
    ]  # fmt: skip
    spec = parse_kv_policy("h2o:24")
    size = kv_bytes(spec_of(_hf()), 128)
    with open_tensors(
        spec_of(_hf()), trtllm_tensors(_hf()), limits=limits(kv_memory_bytes=size), kv_policy=spec
    ) as cpu:
        expected = _run(cpu, requests)
    assert _run(open_device(_hf(), blocks=128, policy=spec), requests) == expected


def test_several_pieces_of_a_prompt_are_fed_in_one_step() -> None:
    spec = parse_kv_policy("h2o:16")
    prompt = tuple(int(token) for token in np.random.default_rng(4).integers(3, 90, 110))
    request = Request(request_id="a", prompt_ids=prompt, max_tokens=6, ignore_eos=True)
    engine = open_device(_hf(), policy=spec, max_num_tokens=128)
    steps: list[int] = []
    launch = engine._runner.launch
    engine._runner.launch = lambda step: (steps.append(len(step.rows[0].token_ids)), launch(step))[1]  # type: ignore[method-assign]
    told = _run(engine, [request])
    with open_hf(_hf(), max_num_tokens=128, blocks=64) as cpu:
        expected = _run(cpu, [replace(request, kv=spec)])
    assert told == expected
    assert steps[0] == 110, "the whole prompt in one step"
    assert engine.kv_stats().blocks_peak == (16 + 32) // 4, "though the cache never holds more than budget and a piece"


@pytest.mark.parametrize(
    ("kind", "options"),
    [("Qwen2", {}), ("Qwen3", {"head_dim": 16}), ("Llama", {"num_key_value_heads": 1}), ("Llama", {"tie_word_embeddings": True})],
)  # fmt: skip
def test_other_models_run_too(kind: str, options: dict[str, Any]) -> None:
    hf = make_hf(kind, **options)
    requests = _requests(5, count=6)
    with open_hf(hf) as cpu:
        expected = _run(cpu, requests)
    assert _run(open_device(hf, capture=Replays()), requests) == expected


@pytest.mark.parametrize("kv_dtype", [DType.FP32, DType.FP8, DType.BF16])
def test_int8_weights_and_narrow_caches_run_too(kv_dtype: DType) -> None:
    spec, tensors = spec_of(_hf()), quantised(trtllm_tensors(_hf()))
    requests = _requests(6, count=6)
    size = limits(kv_memory_bytes=kv_bytes(spec, 128))
    expected = _run(open_tensors(spec, tensors, limits=size, kv_dtype=kv_dtype), requests)
    device = open_tensors(spec, tensors, limits=size, kv_dtype=kv_dtype, runner_factory=device_runner(spec))
    assert _run(device, requests) == expected


def test_fp8_weights_run_on_both_paths_with_short_and_long_prompts() -> None:
    spec, tensors = spec_of(_hf()), fp8_rows(trtllm_tensors(_hf()))
    requests = [
        Request(request_id=str(length), prompt_ids=tuple(range(3, 3 + length)), max_tokens=10, ignore_eos=True)
        for length in (4, 90)
    ]
    size = limits(kv_memory_bytes=kv_bytes(spec, 128), max_num_tokens=128)
    expected = _run(open_tensors(spec, tensors, limits=size), requests)
    assert _run(open_tensors(spec, tensors, limits=size, runner_factory=device_runner(spec)), requests) == expected


def test_fp8_weights_take_rows_that_norm_and_activation_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    """In steps of more than 64 tokens, and in no others."""
    spec, tensors = spec_of(_hf()), fp8_rows(trtllm_tensors(_hf()))
    asked: dict[str, list[int]] = {"add_rms_norm_fp8": [], "silu_mul_fp8": [], "fp8_product": []}
    for name, sizes in asked.items():
        run = getattr(model, name)
        index = 1 if name == "add_rms_norm_fp8" else 0

        def counted(*args: Any, run: Any = run, sizes: list[int] = sizes, index: int = index, **kwargs: Any) -> Any:
            sizes.append(args[index].shape[0])
            return run(*args, **kwargs)

        monkeypatch.setattr(model, name, counted)
    size = limits(kv_memory_bytes=kv_bytes(spec, 128), max_num_tokens=128)
    prompt = Request(request_id="long", prompt_ids=tuple(range(3, 93)), max_tokens=3, ignore_eos=True)
    _run(open_tensors(spec, tensors, limits=size, runner_factory=device_runner(spec)), [prompt])
    layers = spec.num_layers
    assert asked["add_rms_norm_fp8"] == [90] * 2 * layers
    assert asked["silu_mul_fp8"] == [90] * layers
    assert asked["fp8_product"] == [90] * 3 * layers


def test_an_8_bit_cache_is_evicted_too() -> None:
    spec, tensors, policy = spec_of(_hf()), trtllm_tensors(_hf()), parse_kv_policy("h2o:24")
    requests = _requests(7, count=5, longest=100)
    size = limits(kv_memory_bytes=kv_bytes(spec, 32))
    cpu = open_tensors(spec, tensors, limits=size, kv_dtype=DType.FP8, kv_policy=policy)
    expected = _run(cpu, requests)
    assert cpu.kv_stats().evictions
    factory = device_runner(spec, policy)
    device = open_tensors(spec, tensors, limits=size, kv_dtype=DType.FP8, kv_policy=policy, runner_factory=factory)
    assert _run(device, requests) == expected


def _stop_ids(seed: int) -> tuple[list[Request], dict[str, list[tuple[Any, ...]]]]:
    """Requests that each stop at a token they write midway, and what the CPU engine tells about them."""
    requests = _requests(seed, count=8)
    with open_hf(_hf()) as cpu:
        free = _run(cpu, requests)
    stopping = [replace(r, stop_ids=(free[r.request_id][len(free[r.request_id]) // 2][1],)) for r in requests]
    with open_hf(_hf()) as cpu:
        return stopping, _run(cpu, stopping)


def test_a_stop_token_found_late_ends_the_request_where_it_was() -> None:
    requests, expected = _stop_ids(8)
    assert any(events[-1][2] is FinishReason.STOP for events in expected.values())
    assert _run(open_device(_hf(), late=1), requests) == expected


def test_eos_ends_a_request_on_the_device_path() -> None:
    hf = make_hf(seed=3, eos_token_id=list(range(40)))
    requests = _requests(9, ignore_eos=False)
    with open_hf(hf) as cpu:
        expected = _run(cpu, requests)
    assert _run(open_device(hf), requests) == expected


@pytest.mark.parametrize("late", [0, 1])
def test_output_that_is_not_a_number_ends_its_request_and_no_other(late: int) -> None:
    requests = [Request(request_id=name, prompt_ids=(10, token, 11), max_tokens=9, ignore_eos=True) for name, token in (("good", 7), ("bad", 5))]  # fmt: skip
    with open_hf(_hf()) as cpu:
        good = _run(cpu, requests[:1])["good"]
    engine = open_device(_hf(), late=late)
    engine._runner.weights.embedding[5] = torch.nan
    told = _run(engine, requests)
    assert told["good"] == good
    assert told["bad"] == [(0, None, FinishReason.ERROR, "the model's output is not a number; try a wider type")]


def test_a_cancelled_request_drops_the_token_in_flight() -> None:
    engine = open_device(_hf(), late=1)
    requests = [Request(request_id=name, prompt_ids=(5, 6, 7), max_tokens=30, ignore_eos=True) for name in "ab"]
    events: list[TokenEvent] = []
    for event in engine.generate(requests):
        events.append(event)
        if event.request_id == "a" and event.index == 4:
            engine.cancel("a")
    of_a = [event for event in events if event.request_id == "a"]
    assert [event.index for event in of_a] == list(range(len(of_a)))
    assert of_a[-1].finish is FinishReason.CANCELLED
    assert of_a[-1].token_id is None
    assert sum(event.request_id == "b" for event in events) == 30
    engine.check()


def test_leaving_early_leaves_nothing_behind() -> None:
    engine = open_device(_hf(), late=1)
    request = Request(request_id="a", prompt_ids=(5, 6, 7), max_tokens=12, ignore_eos=True)
    for event in engine.generate([request]):
        if event.index == 3:
            break
    assert engine.kv_stats().blocks_used == 0
    assert len(list(engine.generate([request]))) == 12


def test_times_are_those_of_each_steps_own_tokens() -> None:
    engine = open_device(_hf(), late=1)
    request = Request(request_id="a", prompt_ids=(5, 6, 7), max_tokens=20, ignore_eos=True)
    times = [event.time_ns for event in engine.generate([request])]
    assert all(a < b for a, b in pairwise(times))


@pytest.mark.parametrize("policy", ["full", "h2o:12"])
def test_scores_are_the_cpu_engines(policy: str) -> None:
    spec = parse_kv_policy(policy)
    draw = np.random.default_rng(10)
    requests = [
        ScoreRequest(
            request_id=str(index),
            context_ids=tuple(int(t) for t in draw.integers(3, 90, 50)),
            continuations=((7, 8, 9), (4,), tuple(int(t) for t in draw.integers(3, 90, 12))),
            chunk_ends=(20, 21, 50) if index % 2 else (),
            top_logprobs=2,
        )
        for index in range(5)
    ]
    size = kv_bytes(spec_of(_hf()), 128)
    with open_tensors(
        spec_of(_hf()), trtllm_tensors(_hf()), limits=limits(kv_memory_bytes=size), kv_policy=spec
    ) as cpu:
        expected = {result.request_id: result for result in cpu.score(requests)}
    with open_device(_hf(), blocks=128, policy=spec) as device:
        scored = {result.request_id: result for result in device.score(requests)}
    for name, result in expected.items():
        ours = scored[name]
        assert (ours.error, ours.evictions, ours.tokens_evicted) == (None, result.evictions, result.tokens_evicted)
        for mine, theirs in zip(ours.continuations, result.continuations, strict=True):
            np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=2e-4)
            assert mine.is_greedy == theirs.is_greedy


def test_a_capture_that_fails_leaves_the_step_eager_and_says_so() -> None:
    requests = _requests(11, count=4)
    with open_hf(_hf()) as cpu:
        expected = _run(cpu, requests)
    engine = open_device(_hf(), capture=Replays(fails=True))
    (note,) = engine.info.notes
    assert "batch size 8 not captured" in note
    assert "\n" not in note
    assert _run(engine, requests) == expected


def test_only_steps_that_are_launched_at_once_are_launched_ahead() -> None:
    engine = open_device(_hf(), late=1)
    runner, ahead = engine._runner, []
    launch, collect, flying = runner.launch, runner.collect, []

    def launched(step: Any) -> Any:
        ahead.append((max(len(row.token_ids) for row in step.rows) > 1, len(flying)))
        flying.append(launch(step))
        return flying[-1]

    def collected(flight: Any) -> list[int]:
        assert flying.pop(0) is flight, "in order"
        return collect(flight)

    runner.launch, runner.collect = launched, collected  # type: ignore[method-assign]
    told = _run(engine, _requests(12))
    assert len(told) == 14
    assert {count for reads_prompt, count in ahead if reads_prompt} == {0}
    assert {count for reads_prompt, count in ahead if not reads_prompt} >= {1}
