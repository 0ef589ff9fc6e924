# ruff: noqa: RUF012, E741
"""Argument classes of the LLM API, strict: a name or a type that the real class does not take is an error."""

from __future__ import annotations

import os
from enum import Enum
from typing import Any

_NEWER = not os.environ.get("FAKE_TRTLLM_VERSION", "1.2.1").startswith("1.2")


class Strict:
    """Keyword arguments are checked against `FIELDS`: name -> (default, allowed types)."""

    FIELDS: dict[str, tuple[Any, tuple[type, ...]]] = {}

    def __init__(self, **given: Any) -> None:
        for name, value in given.items():
            if name not in self.FIELDS:
                raise ValueError(f"{type(self).__name__}: Extra inputs are not permitted: {name}")
            check_type(f"{type(self).__name__}.{name}", value, self.FIELDS[name][1])
        for name, (default, _) in self.FIELDS.items():
            setattr(self, name, given.get(name, default))

    def __init_subclass__(cls) -> None:
        cls.model_fields = dict(cls.FIELDS)


def check_type(where: str, value: Any, kinds: tuple[type, ...]) -> None:
    """None is fine where NoneType is listed; a bool is no int."""
    if isinstance(value, bool) and bool not in kinds:
        raise TypeError(f"{where}: {value!r} is a bool, expected {kinds}")
    if not isinstance(value, kinds) and not (isinstance(value, int) and float in kinds):
        raise TypeError(f"{where}: {value!r} is {type(value).__name__}, expected {kinds}")


NONE = type(None)
B, I, F, S, L = (bool,), (int,), (float,), (str,), (list,)


class CapacitySchedulerPolicy(str, Enum):
    MAX_UTILIZATION = "MAX_UTILIZATION"
    GUARANTEED_NO_EVICT = "GUARANTEED_NO_EVICT"
    STATIC_BATCH = "STATIC_BATCH"


class BatchingType(str, Enum):
    STATIC = "STATIC"
    INFLIGHT = "INFLIGHT"


class KvCacheConfig(Strict):
    FIELDS = {
        "enable_block_reuse": (True, B),
        "max_tokens": (None, (*I, NONE)),
        "max_attention_window": (None, (*L, NONE)),
        "sink_token_length": (None, (*I, NONE)),
        "free_gpu_memory_fraction": (0.9, (*F, NONE)),
        "host_cache_size": (None, (*I, NONE)),
        "onboard_blocks": (True, B),
        "cross_kv_cache_fraction": (None, (*F, NONE)),
        "secondary_offload_min_priority": (None, (*I, NONE)),
        "event_buffer_max_size": (0, I),
        "attention_dp_events_gather_period_ms": (5, I),
        "enable_partial_reuse": (True, B),
        "copy_on_partial_reuse": (True, B),
        "use_uvm": (False, B),
        "max_gpu_total_bytes": (0, I),
        "dtype": ("auto", S),
        "mamba_ssm_cache_dtype": ("auto", S),
        "tokens_per_block": (32, I),
        **({"use_kv_cache_manager_v2": (False, B), "max_util_for_resume": (0.95, F)} if _NEWER else {}),
    }


class SchedulerConfig(Strict):
    FIELDS = {
        "capacity_scheduler_policy": (CapacitySchedulerPolicy.GUARANTEED_NO_EVICT, (CapacitySchedulerPolicy,)),
        "context_chunking_policy": (None, (NONE,)),
        "dynamic_batch_config": (None, (NONE,)),
        **({"waiting_queue_policy": ("fcfs", S)} if _NEWER else {}),
    }


class ExtendedRuntimePerfKnobConfig(Strict):
    FIELDS = {
        "multi_block_mode": (True, B),
        "enable_context_fmha_fp32_acc": (False, B),
        "cuda_graph_mode": (False, B),
        "cuda_graph_cache_size": (0, I),
    }


class CudaGraphConfig(Strict):
    FIELDS = {
        "batch_sizes": (None, (*L, NONE)),
        "max_batch_size": (None, (*I, NONE)),
        "enable_padding": (False, B),
    }


_ANY = (object,)


class NGramDecodingConfig(Strict):
    """`decoding_type` is no argument of it: files name the class by it."""

    FIELDS = {
        "max_draft_len": (None, (*I, NONE)),
        "max_total_draft_tokens": (None, (*I, NONE)),
        "speculative_model": (None, _ANY),
        "max_concurrency": (None, (*I, NONE)),
        "draft_len_schedule": (None, (dict, NONE)),
        "load_format": (None, (*S, NONE)),
        "acceptance_window": (None, (*I, NONE)),
        "max_matching_ngram_size": (2 if _NEWER else 0, I),
        "is_keep_all": (True, B),
        "is_use_oldest": (True, B),
        "is_public_pool": (True, B),
    }

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        if not self.max_draft_len or self.max_draft_len < 1:
            raise ValueError("max_draft_len must be > 0 for NGram")
        if self.max_matching_ngram_size < 1:
            raise ValueError("max_matching_ngram_size must be > 0 for NGram")
        self.max_total_draft_tokens = self.max_draft_len


class SamplingParams(Strict):
    FIELDS = {
        "end_id": (None, (*I, NONE)), "pad_id": (None, (*I, NONE)), "max_tokens": (32, I),
        "bad": (None, _ANY), "bad_token_ids": (None, (*L, NONE)), "stop": (None, _ANY),
        "stop_token_ids": (None, (*L, NONE)), "include_stop_str_in_output": (False, B),
        "embedding_bias": (None, _ANY), "logits_processor": (None, _ANY),
        "apply_batched_logits_processor": (False, B), "n": (1, I), "best_of": (None, (*I, NONE)),
        "use_beam_search": (False, B), "top_k": (None, (*I, NONE)), "top_p": (None, (*F, NONE)),
        "top_p_min": (None, (*F, NONE)), "top_p_reset_ids": (None, _ANY), "top_p_decay": (None, (*F, NONE)),
        "seed": (None, (*I, NONE)), "temperature": (None, (*F, NONE)), "min_tokens": (None, (*I, NONE)),
        "beam_search_diversity_rate": (None, _ANY), "repetition_penalty": (None, _ANY),
        "presence_penalty": (None, _ANY), "frequency_penalty": (None, _ANY), "prompt_ignore_length": (None, _ANY),
        "length_penalty": (None, _ANY), "early_stopping": (None, _ANY), "no_repeat_ngram_size": (None, _ANY),
        "min_p": (None, _ANY), "beam_width_array": (None, _ANY), "logprobs": (None, (*I, NONE)),
        "prompt_logprobs": (None, (*I, NONE)), "return_context_logits": (False, B),
        "return_generation_logits": (False, B), "exclude_input_from_output": (True, B),
        "return_encoder_output": (False, B), "return_perf_metrics": (False, B), "additional_model_outputs": (None, _ANY),
        "lookahead_config": (None, _ANY), "guided_decoding": (None, _ANY), "ignore_eos": (False, B),
        "detokenize": (True, B), "add_special_tokens": (True, B), "truncate_prompt_tokens": (None, (*I, NONE)),
        "skip_special_tokens": (True, B), "spaces_between_special_tokens": (True, B),
        **({"logprobs_mode": ("RAW", S)} if _NEWER else {}),
    }  # fmt: skip


if os.environ.get("FAKE_TRTLLM_NGRAM") == "gone":
    del NGramDecodingConfig

__all__ = [
    "BatchingType",
    "CapacitySchedulerPolicy",
    "CudaGraphConfig",
    "ExtendedRuntimePerfKnobConfig",
    "KvCacheConfig",
    "NGramDecodingConfig",
    "SamplingParams",
    "SchedulerConfig",
]
