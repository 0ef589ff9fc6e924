"""Adapters of KV policies for TensorRT-LLM's PyTorch backend are found by name and merged, never guessed."""

from __future__ import annotations

import dataclasses
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from trtkit.spec.catalog import model_preset
from trtkit.spec.errors import UnsupportedError
from trtkit.spec.kv import KVPolicySpec, parse_kv_policy
from trtkit.spec.plan import BuildPlan
from trtkit.spec.quant import quant_for
from trtkit.trtllm import policies
from trtkit.trtllm.policies import adapter_names, check_adapter, with_policy


def adapter(spec: KVPolicySpec) -> dict[str, Any]:
    return {"kv_cache_config": {"enable_block_reuse": False}, "disable_overlap_scheduler": True, "label": spec.label}


@pytest.fixture(autouse=True)
def one_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint(name="h2o", value=f"{__name__}:adapter", group=policies.GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda _: adapter)
    found = lambda group, name=None: [point] if name in (None, "h2o") else []  # noqa: E731
    monkeypatch.setattr(policies.importlib.metadata, "entry_points", found)


def plan(kv: str, target: str = "pytorch") -> BuildPlan:
    base = BuildPlan(
        name="p", model=model_preset("llama-3-70b"), model_source="x", gpu="h100-sxm", quant=quant_for("int8")
    )
    return dataclasses.replace(base, kv=parse_kv_policy(kv), target=target)


def test_an_adapters_arguments_win_and_leave_the_others_of_the_same_config() -> None:
    ours = {"kv_cache_config": {"enable_block_reuse": True, "tokens_per_block": 32}, "max_beam_width": 1}
    assert with_policy(plan("h2o:50%"), ours) == {
        "kv_cache_config": {"enable_block_reuse": False, "tokens_per_block": 32}, "max_beam_width": 1,
        "disable_overlap_scheduler": True, "label": "h2o:50%",
    }  # fmt: skip
    assert ours["kv_cache_config"] == {"enable_block_reuse": True, "tokens_per_block": 32}


@pytest.mark.parametrize(("kv", "target"), [("full", "pytorch"), ("h2o:50%", "tensorrt")])
def test_a_full_cache_and_engines_need_no_adapter(kv: str, target: str) -> None:
    assert with_policy(plan(kv, target), {"a": 1}) == {"a": 1}


def test_a_policy_without_an_adapter_is_refused_and_the_others_are_named() -> None:
    assert adapter_names() == ("h2o",)
    with pytest.raises(UnsupportedError, match=r"there are full, h2o"):
        check_adapter(plan("random:64"))
