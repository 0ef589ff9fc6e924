"""Plans in TensorRT-LLM's words: argument lists as recorded, and the rules behind single arguments."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from trtkit.backends.recipe import load_recipe, make_plan
from trtkit.spec.dtype import DType
from trtkit.spec.engine import Request, Sampling
from trtkit.spec.kv import parse_kv_policy
from trtkit.spec.plan import BuildPlan, Limits, Parallelism
from trtkit.spec.quant import quant_for
from trtkit.spec.speculation import parse_speculation
from trtkit.trtllm.lower import (
    build_argv,
    kv_bytes_per_token,
    kv_cache_arguments,
    llm_arguments,
    sampling_arguments,
)

FP16_A100_TP2 = """
trtllm-build --checkpoint_dir c --output_dir e --max_batch_size 32 --max_num_tokens 8192 --max_seq_len 4352
--max_input_len 4351 --max_beam_width 1 --kv_cache_type paged --tokens_per_block 32 --remove_input_padding enable
--context_fmha enable --use_paged_context_fmha enable --use_fp8_context_fmha disable --gpt_attention_plugin auto
--gemm_plugin auto --nccl_plugin auto --use_fused_mlp enable --reduce_fusion enable --multiple_profiles enable
--logits_dtype float32 --workers 2 --output_timing_cache t --profiling_verbosity layer_names_only --log_level info
--monitor_memory
"""
INT8_H100 = """
trtllm-build --checkpoint_dir c --output_dir e --max_batch_size 32 --max_num_tokens 8192 --max_seq_len 4352
--max_input_len 4351 --max_beam_width 1 --kv_cache_type paged --tokens_per_block 32 --remove_input_padding enable
--context_fmha enable --use_paged_context_fmha enable --use_fp8_context_fmha disable --gpt_attention_plugin auto
--gemm_plugin auto --nccl_plugin disable --use_fused_mlp disable --reduce_fusion disable --multiple_profiles enable
--logits_dtype float32 --workers 1 --output_timing_cache t --profiling_verbosity layer_names_only --log_level info
--monitor_memory
"""


def plan(recipe: str = "int8-h100", **changes: object) -> BuildPlan:
    found, _ = make_plan(load_recipe(recipe), dry_run=True)
    return dataclasses.replace(found, **changes)  # type: ignore[arg-type]


def argv(of: BuildPlan) -> list[str]:
    return build_argv(of, Path("c"), Path("e"), Path("t"))


def value(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(f"--{name}") + 1]


@pytest.mark.parametrize(("recipe", "recorded"), [("fp16-a100-tp2", FP16_A100_TP2), ("int8-h100", INT8_H100)])
def test_the_published_configurations_give_these_argument_lists(recipe: str, recorded: str) -> None:
    assert argv(plan(recipe)) == recorded.split()


def test_fp8_rows_name_their_plugin_and_leave_the_fused_mlp_and_the_fused_all_reduce() -> None:
    arguments = argv(plan("fp8-rowwise-h100", parallel=Parallelism(tp=2)))
    assert value(arguments, "reduce_fusion") == "disable"
    assert value(arguments, "nccl_plugin") == "auto"
    assert value(arguments, "fp8_rowwise_gemm_plugin") == "bfloat16"
    assert value(arguments, "use_fused_mlp") == "disable"


def test_an_int8_kv_cache_switches_paged_context_and_what_needs_it_off() -> None:
    with_int8 = plan(quant=quant_for("int8", kv=DType.INT8))
    assert value(argv(with_int8), "use_paged_context_fmha") == "disable"
    arguments = llm_arguments(with_int8, scoring=True)
    assert arguments["enable_chunked_prefill"] is False
    assert arguments["kv_cache_config"]["enable_block_reuse"] is False


def test_a_timing_cache_is_read_only_where_there_is_one(tmp_path: Path) -> None:
    cache = tmp_path / "t"
    assert "--input_timing_cache" not in build_argv(plan(), Path("c"), Path("e"), cache)
    cache.write_bytes(b"x")
    assert value(build_argv(plan(), Path("c"), Path("e"), cache), "input_timing_cache") == str(cache)


def test_a_ranks_token_takes_its_share_of_the_published_320_kib() -> None:
    assert kv_bytes_per_token(plan("fp16-a100-tp2")) == 160 * 1024
    assert kv_bytes_per_token(plan("int8-h100")) == 320 * 1024
    assert kv_bytes_per_token(plan(parallel=Parallelism(pp=2))) == 160 * 1024


def test_a_fixed_pool_becomes_whole_blocks_of_tokens() -> None:
    limits = Limits(max_seq_len=4352, kv_memory_bytes=3 * 32 * 320 * 1024 + 5)
    assert kv_cache_arguments(plan(limits=limits))["max_tokens"] == 96


def test_the_tuned_configuration_takes_64_requests_and_92_percent_of_the_memory() -> None:
    arguments = llm_arguments(plan("int8-h2o50-h100"))
    assert arguments["max_batch_size"] == 64
    assert arguments["kv_cache_config"]["free_gpu_memory_fraction"] == 0.92


def test_engines_are_never_told_a_cache_type_and_the_pytorch_backend_is_told_fp8() -> None:
    fp8 = quant_for("fp8", kv=DType.FP8)
    assert kv_cache_arguments(plan(quant=fp8))["dtype"] == "auto"
    assert kv_cache_arguments(plan(quant=fp8, target="pytorch"))["dtype"] == "fp8"


def test_blocks_are_shared_between_prompts_where_the_plan_says_so_and_whole_ones_only() -> None:
    for target in ("tensorrt", "pytorch"):
        asked = kv_cache_arguments(plan(target=target, limits=Limits(enable_block_reuse=True)))
        assert (asked["enable_block_reuse"], asked["enable_partial_reuse"]) == (True, False)


def test_scoring_asks_for_logits_and_shares_no_blocks_whatever_the_plan_says() -> None:
    for target in ("tensorrt", "pytorch"):
        reusing = plan(target=target, limits=Limits(enable_block_reuse=True))
        assert llm_arguments(reusing)["kv_cache_config"]["enable_block_reuse"] is True
        assert llm_arguments(reusing)["gather_generation_logits"] is False
        scoring = llm_arguments(reusing, scoring=True)
        assert scoring["kv_cache_config"]["enable_block_reuse"] is False
        assert scoring["gather_generation_logits"] is True
    assert llm_arguments(plan())["kv_cache_config"]["enable_block_reuse"] is False


def test_an_approximated_policy_becomes_sinks_and_a_window_on_engines_only() -> None:
    policy = parse_kv_policy("h2o:budget=1024,sinks=4")
    engine = kv_cache_arguments(plan(kv=policy))
    assert (engine["max_attention_window"], engine["sink_token_length"]) == ([1024], 4)
    assert "max_attention_window" not in kv_cache_arguments(plan(kv=policy, target="pytorch"))


def test_iteration_statistics_are_asked_of_the_pytorch_backend_which_gives_none_otherwise() -> None:
    assert llm_arguments(plan(target="pytorch"))["enable_iter_perf_stats"] is True
    assert "enable_iter_perf_stats" not in llm_arguments(plan())


def request(**changes: object) -> Request:
    return Request(request_id="r", prompt_ids=(1,), max_tokens=9, **changes)  # type: ignore[arg-type]


def test_greedy_requests_leave_every_sampling_argument_out() -> None:
    assert not {"temperature", "top_k", "top_p", "seed"} & set(sampling_arguments(request(), 9, (2,)))


def test_sampling_says_all_three_arguments_so_that_no_default_makes_it_greedy() -> None:
    arguments = sampling_arguments(request(sampling=Sampling(temperature=0.7, seed=3)), 9, (2,))
    assert {name: arguments[name] for name in ("temperature", "top_k", "top_p", "seed")} == {
        "temperature": 0.7, "top_k": 0, "top_p": 1.0, "seed": 3,
    }  # fmt: skip


def test_end_tokens_stop_as_stop_tokens_that_stay_in_the_output() -> None:
    arguments = sampling_arguments(request(stop_ids=(7,)), 5, (2, 3))
    assert (arguments["stop_token_ids"], arguments["end_id"], arguments["max_tokens"]) == ([2, 3, 7], -1, 5)
    assert arguments["include_stop_str_in_output"] is True


def test_ignoring_the_end_keeps_other_stop_tokens() -> None:
    arguments = sampling_arguments(request(stop_ids=(7,), ignore_eos=True), 5, (2, 3))
    assert (arguments["stop_token_ids"], arguments["ignore_eos"]) == ([7], True)
    assert sampling_arguments(request(ignore_eos=True), 5, (2, 3))["stop_token_ids"] is None


def test_guesses_become_a_pool_for_each_request_and_a_loop_without_overlap() -> None:
    guessing = plan(target="pytorch", speculation=parse_speculation("ngram:4,match=2"))
    arguments = llm_arguments(guessing)
    assert arguments["speculative_config"] == {
        "decoding_type": "NGram", "max_draft_len": 4, "max_matching_ngram_size": 2, "is_keep_all": True,
        "is_use_oldest": True, "is_public_pool": False,
    }  # fmt: skip
    assert arguments["disable_overlap_scheduler"] is True
    assert "speculative_config" not in llm_arguments(guessing, scoring=True)
    assert not {"speculative_config", "disable_overlap_scheduler"} & set(llm_arguments(plan(target="pytorch")))
