"""Adapters of KV policies for TensorRT-LLM's PyTorch backend are found by name and merged, never guessed."""

from __future__ import annotations

import dataclasses
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from trtkit.spec.catalog import model_preset
from trtkit.spec.errors import UnsupportedError
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.plan import BuildPlan, Limits, Parallelism
from trtkit.spec.quant import quant_for
from trtkit.trtllm import policies
from trtkit.trtllm.policies import adapter_names, check_adapter, handicaps, pool_tokens, with_policy


class Adapter:
    """Tells what it was asked."""

    def check(self, plan: BuildPlan, *, pool_tokens: int | None) -> tuple[str, ...]:
        if plan.parallel.pp > 1:
            raise UnsupportedError("no pipelines")
        return (f"pool of {pool_tokens}",)

    def arguments(self, plan: BuildPlan, **asked: Any) -> dict[str, Any]:
        return {"kv_cache_config": {"enable_block_reuse": False}, "label": plan.kv.label, "asked": asked}


@pytest.fixture(autouse=True)
def one_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint(name="h2o", value=f"{__name__}:Adapter", group=policies.GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda _: Adapter())
    monkeypatch.setattr(policies.importlib.metadata, "entry_points", lambda group: [point])


def plan(kv: str, target: str = "pytorch", **changes: Any) -> BuildPlan:
    base = BuildPlan(
        name="p", model=model_preset("llama-3-70b"), model_source="x", gpu="h100-sxm", quant=quant_for("int8")
    )
    return dataclasses.replace(base, kv=parse_kv_policy(kv), target=target, **changes)


def test_an_adapters_arguments_win_and_leave_the_others_of_the_same_config(tmp_path: Path) -> None:
    ours = {"kv_cache_config": {"enable_block_reuse": True, "tokens_per_block": 32}, "max_beam_width": 1}
    limits = Limits(kv_memory_bytes=1000 * 327_680)
    merged = with_policy(plan("h2o:50%", limits=limits), ours, pin_prompt=True, counters_dir=tmp_path)
    assert merged == {
        "kv_cache_config": {"enable_block_reuse": False, "tokens_per_block": 32}, "max_beam_width": 1,
        "label": "h2o:50%", "asked": {"pool_tokens": 1000, "pin_prompt": True, "counters_dir": tmp_path},
    }  # fmt: skip
    assert ours["kv_cache_config"] == {"enable_block_reuse": True, "tokens_per_block": 32}


@pytest.mark.parametrize(("kv", "target"), [("full", "pytorch"), ("h2o:50%", "tensorrt")])
def test_a_full_cache_and_engines_need_no_adapter(kv: str, target: str) -> None:
    assert with_policy(plan(kv, target), {"a": 1}) == {"a": 1}
    assert check_adapter(plan(kv, target)) == ()


def test_a_policy_without_an_adapter_is_refused_and_the_others_are_named() -> None:
    assert adapter_names() == ("h2o",)
    with pytest.raises(UnsupportedError, match=r"there are full, h2o"):
        check_adapter(plan("random:64"))


def test_an_adapter_is_asked_before_anything_starts() -> None:
    limits = Limits(kv_memory_bytes=1000 * 327_680)
    assert check_adapter(plan("h2o:50%", limits=limits)) == ("pool of 1000",)
    with pytest.raises(UnsupportedError, match="no pipelines"):
        check_adapter(plan("h2o:50%", parallel=Parallelism(pp=2)))


def test_what_a_policy_costs_the_runtime_is_said_in_lines() -> None:
    off = {"cuda_graph_config": None, "disable_overlap_scheduler": True}
    reserved = {"scheduler_config": {"capacity_scheduler_policy": "GUARANTEED_NO_EVICT"}}
    assert handicaps(plan("h2o:64"), off | reserved) == (
        "KV policy h2o:budget=64: CUDA graphs are off", "KV policy h2o:budget=64: the overlap scheduler is off",
        "KV policy h2o:budget=64: blocks are reserved in full (GUARANTEED_NO_EVICT), so what eviction frees admits no "
        "further request",
    )  # fmt: skip
    assert handicaps(plan("h2o:64"), {"scheduler_config": {"capacity_scheduler_policy": "MAX_UTILIZATION"}}) == ()
    assert handicaps(plan("full"), off | reserved) == ()


def test_a_pool_of_its_own_size_is_what_weights_and_the_runtime_leave() -> None:
    """70.6 billion weights in 8 bits on two GPUs of 80 GiB, a tenth of each for the runtime."""
    tokens = pool_tokens(plan("h2o:50%", parallel=Parallelism(tp=2), limits=Limits(kv_fraction=0.9)))
    assert tokens is not None
    bytes_free = 0.9 * (0.9 * 80 * 2**30 - 36.5e9)
    assert tokens == pytest.approx(bytes_free / 163_840, rel=0.03)
