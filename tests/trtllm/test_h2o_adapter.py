"""What trtkit asks H2O's adapter before it builds or opens a bundle: no TensorRT-LLM is needed for the answers."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
from fakes.trtllm_kv import v12, v13
from fakes.trtllm_kv.v12 import put_in

from trtkit.backends.outline import outline, render
from trtkit.spec.catalog import model_preset
from trtkit.spec.dtype import DType
from trtkit.spec.errors import CapacityError, UnsupportedError, UsageError
from trtkit.spec.kv import KVFidelity, parse_kv_policy
from trtkit.spec.plan import BuildPlan, Limits, Parallelism
from trtkit.spec.quant import quant_for
from trtkit.trtllm.policies import adapter_names, check_adapter
from trtkit_h2o.trtllm import ADAPTER
from trtkit_h2o.trtllm.adapter import capacity_policy, held_tokens
from trtkit_h2o.trtllm.report import CounterFile
from trtkit_h2o.trtllm.tracked import Counters

LIMITS = Limits(max_batch_size=8, max_num_tokens=8192, max_seq_len=8192, tokens_per_block=32)


def plan(kv="h2o:2048,interval=64", *, limits=LIMITS, **changes):
    given = {"quant": quant_for("fp16"), "parallel": Parallelism(tp=4), **changes}
    return BuildPlan(
        name="p", model=given.pop("model", model_preset("llama-3-70b")), model_source="x", gpu="h100-sxm",
        kv=parse_kv_policy(kv), target="pytorch", limits=limits, **given,
    )  # fmt: skip


def limits(**changes):
    return dataclasses.replace(LIMITS, **changes)


@pytest.fixture(autouse=True)
def _forget_adapters():
    yield
    for name in [name for name in sys.modules if name.startswith("trtkit_h2o.trtllm.v1")]:
        del sys.modules[name]


def test_the_adapter_serves_every_policy_it_is_tested_with():
    assert adapter_names() == ("h2o", "snapkv", "window")
    for kv in ("h2o:50%", "snapkv:2048", "window:2048"):
        assert len(check_adapter(plan(kv))) == 2


@pytest.mark.parametrize(
    ("changes", "error", "line"),
    [
        ({"parallel": Parallelism(pp=2)}, UnsupportedError, "pipeline parallelism; use tp"),
        ({"quant": quant_for("fp8", kv=DType.FP8)}, UnsupportedError, "scores keys of 16 bits, the KV cache is fp8"),
        (
            {"limits": limits(max_num_tokens=2048, enable_chunked_prefill=False)},
            UnsupportedError,
            "up to 8191 tokens do not fit a step of max_num_tokens 2048; raise it or enable chunked prefill",
        ),
        (
            {"model": dataclasses.replace(model_preset("llama-3-70b"), sliding_window=4096)},
            UnsupportedError,
            "sliding window \\(4096 tokens\\)",
        ),
        ({"kv": "h2o:10000"}, UsageError, "above max_seq_len 8192"),
        ({"kv": "snapkv:2048", "target_version": "1.3.0"}, UnsupportedError, "a pinned prompt is never scored"),
    ],
)
def test_plans_that_could_not_run_are_refused_in_one_line_before_anything_starts(changes, error, line):
    with pytest.raises(error, match=line) as raised:
        check_adapter(plan(**changes))
    assert "\n" not in str(raised.value)


def test_prompts_come_whole_where_they_fit_a_step_and_in_chunks_where_they_do_not():
    whole, chunked = plan(), plan(limits=limits(max_num_tokens=1024))
    assert held_tokens(whole) == 2048 + 64 + 1
    assert held_tokens(chunked) == 2048 + 1024
    assert "prompts come whole (max_num_tokens 8192)" in check_adapter(whole)[0]
    assert "one holds at most 3072 tokens" in check_adapter(chunked)[0]


def test_a_dry_run_refuses_and_tells_before_a_worker_could(tmp_path):
    text = render(outline(plan(), tmp_path))
    assert "note       prompts come whole" in text
    assert "note       a batch of 8 x 2113 tokens fits the KV pool" in text
    with pytest.raises(UnsupportedError, match="do not fit a step of max_num_tokens 2048"):
        outline(plan(limits=limits(max_num_tokens=2048, enable_chunked_prefill=False)), tmp_path)
    later = outline(plan(target_version="1.3.0"), tmp_path, allow_approximate=True)
    assert later.fidelity is KVFidelity.GENERATED_ONLY
    assert "carried out as generated_only, not as h2o" in render(later)


@pytest.mark.parametrize(
    ("pool_tokens", "policy"),
    [(8 * 67 * 32, "MAX_UTILIZATION"), (8 * 67 * 32 - 1, "GUARANTEED_NO_EVICT"), (None, "GUARANTEED_NO_EVICT")],
)
def test_freed_blocks_admit_others_only_where_nobody_could_ever_be_paused(pool_tokens, policy):
    """A request holds up to 2048 + 64 + 1 tokens between steps, which are 67 blocks."""
    assert capacity_policy(plan(), pool_tokens) == policy
    (_, note) = ADAPTER.check(plan(), pool_tokens=pool_tokens)
    assert ("admit further requests" in note) == (policy == "MAX_UTILIZATION")
    assert ("a paused request's tokens would change" in note) == (policy != "MAX_UTILIZATION")


def test_a_pool_that_could_not_hold_the_longest_prompt_is_refused_though_chunks_would_fit():
    chunked = plan(limits=limits(max_num_tokens=1024))
    assert ADAPTER.check(chunked, pool_tokens=8192)
    with pytest.raises(CapacityError, match=r"room for 8191 tokens \(modeled\), max_seq_len is 8192"):
        ADAPTER.check(chunked, pool_tokens=8191)
    assert ADAPTER.check(plan(target_version="1.3.0"), pool_tokens=8191), "V2 makes room chunk by chunk"


def test_arguments_follow_the_plan_on_1_2(monkeypatch, tmp_path):
    put_in(monkeypatch, v12.modules())
    asked = {"pin_prompt": False, "counters_dir": tmp_path}
    whole = ADAPTER.arguments(plan(), pool_tokens=10**9, **asked)
    assert whole["enable_chunked_prefill"] is False
    assert whole["scheduler_config"] == {"capacity_scheduler_policy": "MAX_UTILIZATION"}
    assert whole["sparse_attention_config"].counters_dir == str(tmp_path)
    chunked = ADAPTER.arguments(plan(limits=limits(max_num_tokens=1024)), pool_tokens=None, **asked)
    assert chunked["enable_chunked_prefill"] is True
    assert chunked["scheduler_config"] == {"capacity_scheduler_policy": "GUARANTEED_NO_EVICT"}
    with pytest.raises(UnsupportedError, match="pins no prompt"):
        ADAPTER.arguments(plan(), pool_tokens=None, pin_prompt=True, counters_dir=None)
    with pytest.raises(UnsupportedError, match="use tp"):
        ADAPTER.arguments(plan(parallel=Parallelism(pp=2)), pool_tokens=None, **asked)


def test_arguments_of_a_pinned_prompt_leave_admission_to_the_second_manager(monkeypatch, tmp_path):
    put_in(monkeypatch, v13.modules())
    arguments = ADAPTER.arguments(
        plan(target_version="1.3.0"), pool_tokens=None, pin_prompt=True, counters_dir=tmp_path
    )
    assert arguments["kv_cache_compression_config"].counters_dir == str(tmp_path)
    assert arguments["kv_cache_config"]["use_kv_cache_manager_v2"] is True
    assert not {"scheduler_config", "enable_chunked_prefill"} & set(arguments)
    assert check_adapter(plan(target_version="1.3.0")) == (
        "prompts are kept whole; the budget counts generated tokens",
    )


def test_counters_are_replaced_whole_and_only_when_they_change(tmp_path):
    counters, file = Counters(evictions=1, tokens_evicted=7, blocks_freed=0), CounterFile(str(tmp_path), 3)
    file.tell(counters)
    (written,) = tmp_path.iterdir()
    assert written.name == "rank3.json"
    assert json.loads(written.read_text()) == {"evictions": 1, "tokens_evicted": 7, "blocks_freed": 0}
    written.unlink()
    file.tell(counters)
    assert not list(tmp_path.iterdir()), "nothing has changed"
    counters.evictions += 1
    file.tell(counters)
    assert json.loads(written.read_text())["evictions"] == 2


def test_a_reader_that_has_gone_away_stops_no_worker(tmp_path):
    CounterFile(str(tmp_path / "gone"), 0).tell(Counters(evictions=1))
    CounterFile("", 0).tell(Counters(evictions=1))
    assert not list(tmp_path.iterdir())
