"""Before an engine opens on a device: its largest step, what eviction will hold, and how memory is told apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.device_engines import device_runner, open_device
from support.engine_models import kv_bytes, limits, make_hf, spec_of, trtllm_tensors

from trtkit.engine.device import runner as runner_module
from trtkit.engine.device import setup
from trtkit.engine.device.setup import checked_kernels, device_needs, eviction_bytes, prompt_step
from trtkit.engine.open import chosen_device, open_tensors
from trtkit.engine.weights import weights_from_tensors
from trtkit.kernels.matmul_tiles import GROUPED_WIDTHS, WIDTHS, token_width
from trtkit.spec.dtype import DType
from trtkit.spec.engine import Request
from trtkit.spec.kv import KVPolicySpec, parse_kv_policy
from trtkit.spec.quant import quant_for

SPEC = spec_of(make_hf())
WEIGHTS = weights_from_tensors(SPEC, trtllm_tensors(make_hf()), dtype=DType.FP32)


def test_the_largest_step_is_cut_where_a_request_or_the_batch_ends() -> None:
    def counts(tokens: int, **fields: int) -> list[int]:
        return [len(row.token_ids) for row in prompt_step(limits(**fields), tokens)]

    assert counts(64) == [64]
    assert counts(300, max_seq_len=128) == [128, 128, 44]
    assert counts(300, max_seq_len=128, max_batch_size=2) == [128, 128]


def test_the_warm_up_step_runs_on_a_cache_of_one_block() -> None:
    engine = open_device(make_hf(), blocks=1)
    _, hidden = engine._runner.run(prompt_step(limits(), 64), [])
    assert hidden.shape == (64, 32)


def test_rings_and_ledgers_are_counted_before_they_are_held() -> None:
    policy = parse_kv_policy("h2o:24")
    counted = eviction_bytes(WEIGHTS, limits(), policy)
    engine = open_device(make_hf(), policy=policy)
    held = 0
    for _ in engine.generate(
        [Request(request_id=str(i), prompt_ids=(5,) * 100, max_tokens=28, ignore_eos=True) for i in range(8)]
    ):
        held = max(held, engine.kv_stats().side_bytes)
    assert 0.5 * counted < held <= counted
    assert eviction_bytes(WEIGHTS, limits(), KVPolicySpec()) == 0


def test_sampling_and_activations_share_the_same_memory() -> None:
    needs = device_needs(WEIGHTS, limits(), DType.FP32, KVPolicySpec(), "cpu")
    assert needs.activations == 0
    assert needs.total == needs.sampling > 0
    assert replace(needs, activations=2 * needs.sampling).total == 2 * needs.sampling


def test_kernels_are_checked_with_the_models_own_sizes() -> None:
    assert checked_kernels(SPEC, quant_for("int8"), DType.FP8, limits(), "cpu") == ()


def test_memory_is_told_apart_by_what_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = kv_bytes(SPEC, 16) * 17 // 16  # the pad block is reserved too
    weights = WEIGHTS.num_bytes
    seen = iter(
        [
            {"total": 10**9, "free": 9 * 10**8, "allocated": weights + pool + 1000, "reserved": 8 * 10**7},
            {"total": 10**9, "free": 8 * 10**8, "allocated": weights + pool + 1000, "reserved": 15 * 10**7},
        ]
    )
    monkeypatch.setattr(runner_module, "device_bytes", lambda _: next(seen))
    engine = open_tensors(
        SPEC, trtllm_tensors(make_hf()), limits=limits(kv_memory_bytes=kv_bytes(SPEC, 16)), runner_factory=device_runner(SPEC)
    )  # fmt: skip
    assert engine.info.device_memory == {
        "total": 10**9, "weights": weights, "kv_pool": pool, "static": 1000, "graphs": 10**8, "context": 5 * 10**7,
        "free": 8 * 10**8,
    }  # fmt: skip


def test_auto_means_a_gpu_only_where_the_plan_is_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert chosen_device("auto", "h100-sxm") == "cuda"
    assert chosen_device("auto", "cpu") == "cpu"
    assert chosen_device("cpu", "h100-sxm") == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert chosen_device("auto", "h100-sxm") == "cpu"


@pytest.mark.parametrize("widths", [WIDTHS, GROUPED_WIDTHS])
def test_prompts_of_the_warm_up_bring_every_width_of_the_matrix_kernels_that_a_decode_step_does_not(
    widths: tuple[int, ...],
) -> None:
    warm = {token_width(tokens, widths) for tokens in setup._WARM_TOKENS}
    assert warm | {token_width(1, widths)} == set(widths)
