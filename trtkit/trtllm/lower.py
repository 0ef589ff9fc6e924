"""A `BuildPlan` in TensorRT-LLM's words: arguments of `trtllm-build`, of `LLM`, of `KvCacheConfig`, of `SamplingParams`.

Plain data, decided here and nowhere else; `runtime` turns it into TensorRT-LLM's classes. Nothing that matters is left
to a default, since defaults move between releases. What each argument relies on is in `docs/tensorrt-llm.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trtkit.spec.checkpoint import kv_heads_per_rank
from trtkit.spec.dtype import DType
from trtkit.spec.engine import Request
from trtkit.spec.plan import BuildPlan
from trtkit.spec.quant import FP8_ROWWISE
from trtkit.trtllm.capabilities import adjustments
from trtkit.trtllm.guesses import guess_arguments


def kv_bytes_per_token(plan: BuildPlan) -> int:
    """Bytes that one token adds to one rank's cache, all its layers."""
    layers = plan.model.num_layers // plan.parallel.pp
    heads = kv_heads_per_rank(plan.model, plan.parallel.tp)
    return 2 * layers * heads * plan.model.head_dim * plan.quant.kv.bits // 8


def build_argv(plan: BuildPlan, checkpoint_dir: Path, output_dir: Path, timing_cache: Path) -> list[str]:
    """`trtllm-build` of 1.2.x with every limit explicit.

    One worker per rank: the tool caps them at the visible GPUs and builds the rest one after the other.
    """
    limits, quant = plan.limits, plan.quant
    paged_context = "use_paged_context_fmha" not in adjustments(plan)
    argv = ["trtllm-build"]
    options: dict[str, object] = {
        "checkpoint_dir": checkpoint_dir,
        "output_dir": output_dir,
        "max_batch_size": limits.max_batch_size,
        "max_num_tokens": limits.max_num_tokens,
        "max_seq_len": limits.max_seq_len,
        "max_input_len": limits.max_seq_len - 1,
        "max_beam_width": 1,
        "kv_cache_type": "paged",
        "tokens_per_block": limits.tokens_per_block,
        "remove_input_padding": "enable",
        "context_fmha": "enable",
        "use_paged_context_fmha": _switch(paged_context),
        "use_fp8_context_fmha": _switch(quant.algo == "FP8" and quant.kv is DType.FP8),
        "gpt_attention_plugin": "auto",
        "gemm_plugin": "auto",
        **({"fp8_rowwise_gemm_plugin": quant.compute.trtllm_name} if quant.algo == FP8_ROWWISE else {}),
        "nccl_plugin": "auto" if plan.parallel.world_size > 1 else "disable",
        "use_fused_mlp": _switch(quant.algo in (None, "FP8")),
        # The row-wise MLP takes no fused all-reduce (layers.py: `Fp8RowwiseGatedMLP.forward`).
        "reduce_fusion": _switch(plan.parallel.tp > 1 and quant.algo != FP8_ROWWISE),
        "multiple_profiles": "enable",
        "logits_dtype": "float32",
        "workers": plan.parallel.world_size,
        "output_timing_cache": timing_cache,
        "profiling_verbosity": "layer_names_only",
        "log_level": "info",
    }
    if timing_cache.is_file():
        options["input_timing_cache"] = timing_cache
    for name, value in options.items():
        argv += [f"--{name}", str(value)]
    return [*argv, "--monitor_memory"]


def _switch(on: bool) -> str:
    return "enable" if on else "disable"


def kv_cache_arguments(plan: BuildPlan, *, scoring: bool = False) -> dict[str, Any]:
    """`KvCacheConfig`. Blocks are reused if the plan says so, which by default it does not: a benchmark that repeats a
    prompt must not find it cached. Scoring never reuses them: a prompt whose beginning is found gets other logits than
    one that is computed (TensorRT-LLM issue 15503: up to 0.16 in BF16; issue 2699: wrong text with an FP8 cache), so a
    score would depend on what was asked before.

    Whole blocks only, so that reported blocks are tokens. With a fixed pool both `max_tokens` and the fraction are given;
    TensorRT-LLM takes the smaller.
    """
    limits = plan.limits
    engine = plan.target == "tensorrt"
    can_reuse = plan.kv.is_full and "use_paged_context_fmha" not in adjustments(plan)
    arguments: dict[str, Any] = {
        "enable_block_reuse": limits.enable_block_reuse and can_reuse and not scoring,
        "enable_partial_reuse": False,
        "free_gpu_memory_fraction": limits.kv_fraction,
        # Engines take the cache type from their checkpoint and refuse any other word here.
        "dtype": "fp8" if plan.quant.kv is DType.FP8 and not engine else "auto",
        "tokens_per_block": limits.tokens_per_block,
    }
    if limits.kv_memory_bytes is not None:
        blocks = limits.kv_memory_bytes // (kv_bytes_per_token(plan) * limits.tokens_per_block)
        arguments["max_tokens"] = blocks * limits.tokens_per_block
    if engine and not plan.kv.is_full:
        policy = plan.kv.resolved(limits.max_seq_len)
        arguments["max_attention_window"] = [policy.budget]
        arguments["sink_token_length"] = policy.sinks or 0
    return arguments


def llm_arguments(plan: BuildPlan, *, scoring: bool = False) -> dict[str, Any]:
    """Keyword arguments of `LLM` besides the model's path; nested configurations as plain data.

    `scoring` opens it to give the logits of generated tokens, without block reuse. It asks for one token a prompt, so it
    guesses none.
    """
    limits = plan.limits
    arguments: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "tensor_parallel_size": plan.parallel.tp,
        "pipeline_parallel_size": plan.parallel.pp,
        "max_batch_size": limits.max_batch_size,
        "max_num_tokens": limits.max_num_tokens,
        "max_seq_len": limits.max_seq_len,
        "max_beam_width": 1,
        "enable_chunked_prefill": limits.enable_chunked_prefill and "use_paged_context_fmha" not in adjustments(plan),
        "kv_cache_config": kv_cache_arguments(plan, scoring=scoring),
        "scheduler_config": {"capacity_scheduler_policy": "GUARANTEED_NO_EVICT"},
        "gather_generation_logits": scoring,
    }
    if plan.target == "tensorrt":
        arguments["extended_runtime_perf_knob_config"] = {"multi_block_mode": True, "cuda_graph_mode": False}
    else:
        arguments |= {
            "dtype": plan.quant.compute.trtllm_name,
            "attn_backend": "TRTLLM",
            "stream_interval": 1,
            "enable_iter_perf_stats": True,
            **({} if scoring else guess_arguments(plan)),
        }
    return arguments


def sampling_arguments(request: Request, max_tokens: int, eos_ids: Sequence[int]) -> dict[str, Any]:
    """`SamplingParams` of a request.

    Every token that stops goes in as a stop token that stays in the output, and the end id is -1 (none): there is
    then one way to stop, and whether an end id is part of the output does not matter.
    """
    stops = sorted({*request.stop_ids, *(() if request.ignore_eos else eos_ids)})
    arguments: dict[str, Any] = {
        "max_tokens": max_tokens,
        "end_id": -1,
        "pad_id": -1,
        "stop_token_ids": stops or None,
        "include_stop_str_in_output": True,
        "ignore_eos": request.ignore_eos,
        "detokenize": False,
        "add_special_tokens": False,
    }
    sampling = request.sampling
    if sampling.temperature > 0:
        arguments |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        if sampling.seed is not None:
            arguments["seed"] = sampling.seed
    return arguments


def logits_arguments() -> dict[str, Any]:
    """`SamplingParams` that give the logits of the one next token."""
    return {
        "max_tokens": 1,
        "end_id": -1,
        "pad_id": -1,
        "ignore_eos": True,
        "detokenize": False,
        "add_special_tokens": False,
        "return_generation_logits": True,
    }
