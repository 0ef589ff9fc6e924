from dataclasses import replace

import pytest

from trtkit.plan.names import precision_from
from trtkit.plan.roofline import floors, max_sequences, throughput_ceiling
from trtkit.plan.scenario import Scenario
from trtkit.spec.catalog import gpu_spec, model_preset
from trtkit.spec.errors import UnsupportedError, UsageError
from trtkit.spec.measured import Source


def scenario(gpu="a100", precision="fp16", tp=2, isl=512, osl=1, concurrency=1, **more):
    return Scenario(
        model=model_preset("llama-3-70b"),
        gpu=gpu_spec(gpu),
        precision=precision_from(precision),
        isl=isl,
        osl=osl,
        concurrency=concurrency,
        tp=tp,
        **more,
    )


@pytest.mark.parametrize(
    ("gpu", "precision", "tp", "isl", "ttft_ms"),
    # The hard floors, worked out by hand from datasheet peaks (A100 312, H100 989.4 and 1,978.9 TFLOP/s).
    [
        ("a100", "fp16", 2, 512, 112.9),
        ("a100", "fp16", 2, 4096, 933.9),
        ("h100", "int8", 1, 512, 71.2),
        ("h100", "int8", 1, 4096, 589.0),
        ("h100", "int8-sq", 1, 512, 35.8),
        ("h100", "int8-sq", 1, 4096, 305.6),
    ],
)
def test_the_first_token_needs_the_prompts_operations(gpu, precision, tp, isl, ttft_ms):
    assert floors(scenario(gpu, precision, tp, isl)).ttft_ms.value == pytest.approx(ttft_ms, abs=0.06)


@pytest.mark.parametrize(
    ("gpu", "precision", "tp", "isl", "concurrency", "tpot_ms"),
    [
        ("a100", "fp16", 2, 512, 1, 34.13),
        ("a100", "fp16", 2, 4096, 1, 34.42),
        ("h100", "int8", 1, 512, 8, 21.47),
        ("a100", "fp16", 2, 4096, 8, 36.72),
        ("h100", "int8", 1, 512, 32, 22.67),
    ],
)
def test_a_step_reads_weights_and_every_cache(gpu, precision, tp, isl, concurrency, tpot_ms):
    assert floors(scenario(gpu, precision, tp, isl, 1, concurrency)).tpot_ms.value == pytest.approx(tpot_ms, abs=0.011)


def test_requests_that_cannot_fit_do_not_add_bytes():
    thirty_two = floors(scenario(isl=4096, concurrency=32))
    assert thirty_two.max_in_flight == pytest.approx(22.8, abs=0.1)
    assert thirty_two.tpot_ms.value == floors(scenario(isl=4096, concurrency=22)).tpot_ms.value


def test_every_floor_says_datasheet():
    found = floors(scenario())
    assert {m.source for m in (found.ttft_ms, found.tpot_ms, found.tok_s, found.e2e_ms)} == {Source.DATASHEET}


def test_a_prefix_cache_lowers_the_first_token_but_not_below_reading_the_weights():
    plain, cached = floors(scenario(isl=4096)), floors(scenario(isl=4096, cached_tokens=4000))
    assert cached.ttft_ms.value < plain.ttft_ms.value / 10
    assert cached.ttft_ms.value >= 34.0


def test_tokens_in_common_are_held_and_read_once():
    plain = scenario(isl=4096, osl=1, concurrency=32, gpu="h100", precision="int8", tp=2)
    shared = replace(plain, cached_tokens=4096)
    assert max_sequences(shared) > 100 * max_sequences(plain)
    token_ms = 327_680 / (2 * 3.35e12) * 1e3
    saved = floors(plain).tpot_ms.value - floors(shared).tpot_ms.value
    assert saved == pytest.approx(31 * 4096 * token_ms, rel=1e-3)
    assert throughput_ceiling(shared) > throughput_ceiling(plain)


def test_one_request_alone_reads_all_of_its_cache():
    plain = scenario(isl=4096)
    assert floors(replace(plain, cached_tokens=4096)).tpot_ms == floors(plain).tpot_ms


def test_eviction_raises_what_fits_and_never_lowers_prefill():
    plain = scenario(isl=4096, osl=256)
    evicted = replace(plain, kept_tokens=2048)
    assert max_sequences(evicted) > 2 * max_sequences(plain)
    assert floors(evicted).ttft_ms == floors(plain).ttft_ms


def test_the_ceiling_charges_prefill_to_the_output():
    # 4,096 prompt tokens cost 934 ms of operations, so 256 tokens take at least that, whatever is overlapped.
    assert throughput_ceiling(scenario(isl=4096, osl=256, concurrency=None)) < 256 / 0.9339


def test_fp8_on_a_gpu_without_it_is_refused():
    with pytest.raises(UnsupportedError, match="fp8"):
        floors(scenario(precision="fp8"))


@pytest.mark.parametrize(
    "bad", [{"isl": 0}, {"osl": 0}, {"concurrency": 0}, {"cached_tokens": 600}, {"kept_tokens": 0}]
)
def test_absurd_loads_are_refused(bad):
    with pytest.raises(UsageError):
        scenario(**bad)
