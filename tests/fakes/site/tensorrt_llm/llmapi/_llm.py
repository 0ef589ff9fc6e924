# ruff: noqa: RUF012, T201
"""`LLM` of both backends over the embedded engine: in-flight batching in a thread, results through queues."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tensorrt_llm import llmapi
from tensorrt_llm.llmapi import KvCacheConfig, SamplingParams, SchedulerConfig, Strict, check_type

VERSION = os.environ.get("FAKE_TRTLLM_VERSION", "1.2.1")
NONE = type(None)
SPECULATION = getattr(llmapi, "NGramDecodingConfig", NONE)
_ANY = (object,)
_COMMON: dict[str, tuple[Any, tuple[type, ...]]] = {
    "tokenizer": (None, _ANY), "tokenizer_mode": ("auto", (str,)), "skip_tokenizer_init": (False, (bool,)),
    "trust_remote_code": (False, (bool,)), "tensor_parallel_size": (1, (int,)), "dtype": ("auto", (str,)),
    "revision": (None, _ANY), "tokenizer_revision": (None, _ANY), "custom_tokenizer": (None, _ANY),
    "pipeline_parallel_size": (1, (int,)), "context_parallel_size": (1, (int,)), "gpus_per_node": (None, (int, NONE)),
    "moe_cluster_parallel_size": (None, _ANY), "moe_tensor_parallel_size": (None, _ANY),
    "moe_expert_parallel_size": (None, _ANY), "enable_attention_dp": (False, (bool,)),
    "enable_lm_head_tp_in_adp": (False, (bool,)), "pp_partition": (None, _ANY), "cp_config": (None, _ANY),
    "load_format": ("auto", (str,)), "fail_fast_on_attention_window_too_large": (False, (bool,)),
    "enable_lora": (False, (bool,)), "lora_config": (None, _ANY), "kv_cache_config": (None, (KvCacheConfig, NONE)),
    "enable_chunked_prefill": (False, (bool,)), "guided_decoding_backend": (None, _ANY),
    "batched_logits_processor": (None, _ANY), "iter_stats_max_iterations": (None, (int, NONE)),
    "request_stats_max_iterations": (None, (int, NONE)), "peft_cache_config": (None, _ANY),
    "scheduler_config": (None, (SchedulerConfig, NONE)), "cache_transceiver_config": (None, _ANY),
    "sparse_attention_config": (None, _ANY), "speculative_config": (None, (SPECULATION, NONE)), "max_batch_size": (None, (int, NONE)),
    "max_input_len": (None, (int, NONE)), "max_seq_len": (None, (int, NONE)), "max_beam_width": (None, (int, NONE)),
    "max_num_tokens": (8192, (int, NONE)), "gather_generation_logits": (False, (bool,)),
    "num_postprocess_workers": (0, (int,)), "postprocess_tokenizer_dir": (None, _ANY), "reasoning_parser": (None, _ANY),
    "decoding_config": (None, _ANY), "mpi_session": (None, _ANY), "otlp_traces_endpoint": (None, _ANY),
    "backend": (None, (str, NONE)), "return_perf_metrics": (False, (bool,)), "orchestrator_type": (None, (str, NONE)),
    "env_overrides": (None, (dict, NONE)),
}  # fmt: skip
_ENGINE_ONLY: dict[str, tuple[Any, tuple[type, ...]]] = {
    "enable_tqdm": (False, (bool,)), "workspace": (None, _ANY), "enable_build_cache": (False, _ANY),
    "extended_runtime_perf_knob_config": (None, _ANY), "calib_config": (None, _ANY), "quant_config": (None, _ANY),
    "embedding_parallel_mode": ("SHARDING_ALONG_VOCAB", (str,)), "fast_build": (False, (bool,)),
    "build_config": (None, _ANY), "enable_prompt_adapter": (False, (bool,)), "max_prompt_adapter_token": (0, (int,)),
    "batching_type": (None, _ANY), "normalize_log_probs": (False, (bool,)),
}  # fmt: skip
_TORCH_ONLY: dict[str, tuple[Any, tuple[type, ...]]] = {
    "garbage_collection_gen0_threshold": (20000, (int,)), "cuda_graph_config": (None, _ANY),
    "attention_dp_config": (None, _ANY), "disable_overlap_scheduler": (False, (bool,)), "moe_config": (None, _ANY),
    "attn_backend": ("TRTLLM", (str,)), "sampler_type": ("auto", (str,)), "enable_iter_perf_stats": (False, (bool,)),
    "enable_iter_req_stats": (False, (bool,)), "print_iter_log": (False, (bool,)),
    "perf_metrics_max_requests": (0, (int,)), "batch_wait_timeout_ms": (0, (float,)),
    "batch_wait_timeout_iters": (0, (int,)), "batch_wait_max_tokens_ratio": (0, (float,)),
    "torch_compile_config": (None, _ANY), "enable_autotuner": (True, (bool,)),
    "enable_layerwise_nvtx_marker": (False, (bool,)), "enable_min_latency": (False, (bool,)),
    "stream_interval": (1, (int,)), "force_dynamic_quantization": (False, (bool,)),
    "allreduce_strategy": ("AUTO", (str,)), "checkpoint_loader": (None, _ANY), "checkpoint_format": (None, _ANY),
    "kv_connector_config": (None, _ANY), "mm_encoder_only": (False, (bool,)), "ray_worker_extension_cls": (None, _ANY),
}  # fmt: skip


class Output:
    """One sequence's tokens so far (`CompletionOutput`)."""

    def __init__(self) -> None:
        self.index = 0
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.generation_logits: Any = None


class Result:
    """What `generate_async` returns (`RequestOutput`): async-iterable only if made inside a running event loop."""

    def __init__(self, request_id: int, prompt: list[int], abort: Any) -> None:
        self.request_id, self.prompt_token_ids, self.outputs = request_id, prompt, [Output()]
        self.finished = False
        self._abort = abort
        self._sync: queue.Queue[Any] = queue.Queue()
        self._async: asyncio.Queue[Any] | None = None
        with contextlib.suppress(RuntimeError):
            self._loop = asyncio.get_running_loop()
            self._async = asyncio.Queue()

    def push(self, item: tuple[list[int], str | None, Any]) -> None:
        if self._async is not None:
            self._loop.call_soon_threadsafe(self._async.put_nowait, item)
        else:
            self._sync.put(item)

    def _take(self, item: tuple[list[int], str | None, Any]) -> None:
        tokens, reason, extra = item
        if reason == "error":
            self.finished = True
            raise RuntimeError(extra)
        self.outputs[0].token_ids += tokens
        if reason is not None:
            self.outputs[0].finish_reason, self.finished = reason, True
        self.outputs[0].generation_logits = extra

    def abort(self) -> None:
        self._abort(self.request_id)

    async def aresult(self) -> Result:
        async for _ in self:
            pass
        return self

    def result(self, timeout: float | None = None) -> Result:
        while not self.finished:
            self._take(self._sync.get(timeout=timeout))
        return self

    async def __aiter__(self) -> AsyncIterator[Result]:
        assert self._async is not None, "created outside an event loop"
        while not self.finished:
            self._take(await self._async.get())
            yield self


class Guesses:
    """Steps that bring several tokens: of `n` guesses 0, 1, ... n are accepted in turn. Text is never changed."""

    def __init__(self, config: Any) -> None:
        self._most = 0 if config is None else config.max_draft_len
        self._steps = 0

    def next_step(self) -> int:
        """Tokens of the coming step."""
        return 1 + self._steps % (self._most + 1)

    def stats(self, tokens: int) -> dict[str, Any]:
        """What a step that brought `tokens` adds to its iteration's statistics."""
        self._steps += 1
        if not self._most:
            return {}
        told = {"numDraftTokens": self._most, "numAcceptedTokens": max(0, tokens - 1), "numRequestsWithDraftTokens": 1}
        return {"specDecodingStats": {**told, "acceptanceLength": float(tokens)}}


class _BaseLLM:
    FIELDS: dict[str, tuple[Any, tuple[type, ...]]] = {}

    def __init__(self, model: str | Path, **given: Any) -> None:
        check_type("LLM.model", model, (str, Path))
        for name, value in given.items():
            if name not in self.FIELDS:
                raise ValueError(f"LLM: Extra inputs are not permitted: {name}")
            check_type(f"LLM.{name}", value, self.FIELDS[name][1])
        self.args = Strict()
        for name, (default, _) in self.FIELDS.items():
            setattr(self.args, name, given.get(name, default))
        self.args.kv_cache_config = self.args.kv_cache_config or KvCacheConfig()
        if not self.args.skip_tokenizer_init:
            raise OSError(f"{model} has no tokenizer files")
        if self.args.max_num_tokens is not None and self.args.max_num_tokens < (self.args.max_batch_size or 0):
            print("warning: max_num_tokens < max_batch_size")
        self._model = Path(model)
        self._check_model()
        self._workers = self._start_workers(self.args.tensor_parallel_size * self.args.pipeline_parallel_size)
        self._scratch = tempfile.TemporaryDirectory(prefix="fake-trtllm-")
        self._limits, self._vocab_size, self._checkpoint = self._load(Path(self._scratch.name))
        self._scores: Any = None
        self._stats: queue.Queue[dict[str, Any]] = queue.Queue(maxsize=1000)
        self._inbox: queue.Queue[Any] = queue.Queue()
        self._results: dict[int, Result] = {}
        self._cancelled: queue.Queue[int] = queue.Queue()
        self._count = 0
        self._closing = False
        self._iteration = 0
        self._engine = self._open()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _open(self) -> Any:
        from trtkit.engine.open import open_checkpoint

        return open_checkpoint(self._checkpoint, limits=self._limits)

    def _start_workers(self, world_size: int) -> list[subprocess.Popen[bytes]]:
        """One more process per further rank, as MPI_Comm_spawn would; under a launcher its size must match."""
        launched = os.environ.get("tllm_mpi_size")  # noqa: SIM112 - upstream's own spelling
        if launched is not None:
            if int(launched) != world_size:
                raise RuntimeError(f"launched with {launched} ranks, the model wants {world_size}")
            return []
        gpus = int(os.environ.get("FAKE_GPUS", "1"))
        if world_size > gpus:
            raise RuntimeError(f"world size {world_size} is more than the {gpus} GPUs here")
        command = [sys.executable, "-c", "import sys; sys.stdin.read()  # fake-mpi-worker"]
        return [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(world_size - 1)]

    def generate_async(
        self, inputs: list[int], sampling_params: SamplingParams | None = None, *, streaming: bool = False
    ) -> Result:
        if not (isinstance(inputs, list) and inputs and all(type(i) is int for i in inputs)):
            raise TypeError(f"prompt must be a non-empty list of int, got {inputs!r:.60}")
        if not isinstance(sampling_params, SamplingParams):
            raise TypeError("The sampling_params must be type SamplingParams")
        if sampling_params.end_id is None:
            raise ValueError("tokenizer is required to reset end_id if it is None")
        if sampling_params.return_context_logits:
            raise ValueError("the engine was built without gather_context_logits")
        if sampling_params.return_generation_logits and not self.args.gather_generation_logits:
            raise ValueError("return_generation_logits requires gather_generation_logits=True")
        self._check_request(len(inputs), sampling_params)
        self._count += 1
        result = Result(self._count, list(inputs), self._cancelled.put)
        self._results[self._count] = result
        if sampling_params.return_generation_logits:
            self._answer_logits(result, inputs, sampling_params)
        else:
            self._inbox.put((self._count, inputs, sampling_params, streaming))
        return result

    def get_stats(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        if type(self) is TorchLLM and not self.args.enable_iter_perf_stats:
            return []
        found = []
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._stats.get(timeout=timeout))
                timeout = 0.001
        return found

    def shutdown(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._inbox.put(None)
        self._thread.join(10)
        for worker in self._workers:
            worker.stdin.close()
            worker.wait()
        self._scratch.cleanup()

    def __enter__(self) -> _BaseLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _answer_logits(self, result: Result, prompt: list[int], params: SamplingParams) -> None:
        """Logits of the one next token, padded as a tensor-parallel lm_head is."""
        import torch

        from trtkit.spec.engine import ScoreRequest

        assert params.max_tokens == 1, "the fake gives logits of one token only"
        if self._scores is None:
            self._scores = self._open()
        request = ScoreRequest(
            request_id="x", context_ids=tuple(prompt), continuations=((0,),), top_logprobs=self._vocab_size
        )
        (score,) = self._scores.score([request])
        row = torch.full((1, self._vocab_size + 2), -1e9)
        for token, logprob in score.continuations[0].top[0]:
            row[0, token] = logprob + 3.0
        result.push(([score.continuations[0].top[0][0][0]], "length", row))

    def _run(self) -> None:
        from trtkit.spec.engine import FinishReason

        names = {FinishReason.LENGTH: "length", FinishReason.STOP: "stop", FinishReason.CANCELLED: "cancelled"}
        streaming: dict[str, bool] = {}
        held: dict[str, list[int]] = {}
        guesses = Guesses(self.args.speculative_config)
        for event in self._engine.generate(self._feed(streaming)):
            result = self._results[int(event.request_id)]
            while True:
                try:
                    self._engine.cancel(str(self._cancelled.get_nowait()))
                except queue.Empty:
                    break
            if os.environ.get("FAKE_TRTLLM_DIE_AFTER") == str(self._iteration):
                sys.stderr.write("[TRT-LLM] [E] CUDA error: an illegal memory access\n")
                os._exit(134)
            tokens = held.setdefault(event.request_id, [])
            if event.error is not None:
                result.push(([], "error", event.error))
                continue
            if event.token_id is not None:
                tokens.append(event.token_id)
            step = guesses.next_step() if streaming[event.request_id] else sys.maxsize
            if event.finish or len(tokens) >= step:
                self._note_iteration(guesses.stats(len(tokens)))
                result.push((held.pop(event.request_id), names.get(event.finish), None))
            else:
                self._note_iteration({})

    def _feed(self, streaming: dict[str, bool]) -> Any:
        from trtkit.spec.engine import Request, Sampling

        busy: set[str] = set()
        while True:
            busy = {key for key in busy if not self._results[int(key)].finished}
            try:
                item = self._inbox.get(timeout=0.001 if busy else 0.02)
            except queue.Empty:
                yield None
                continue
            if item is None:
                return
            number, prompt, params, stream = item
            streaming[str(number)] = stream
            busy.add(str(number))
            yield Request(
                request_id=str(number), prompt_ids=tuple(prompt), max_tokens=params.max_tokens,
                sampling=Sampling(
                    temperature=params.temperature or 0.0, top_k=params.top_k or 0,
                    top_p=1.0 if params.top_p is None else params.top_p, seed=params.seed,
                ),
                stop_ids=tuple(params.stop_token_ids or ()), ignore_eos=True,
            )  # fmt: skip

    def _note_iteration(self, guessed: dict[str, Any]) -> None:
        self._iteration += 1
        stats = self._engine.kv_stats()
        if self._stats.full():
            self._stats.get()
        self._stats.put(
            {
                "iter": self._iteration, "timestamp": time.time(), "numActiveRequests": stats.requests_running,
                "numQueuedRequests": stats.requests_waiting,
                "kvCacheStats": {
                    "maxNumBlocks": stats.blocks_total, "usedNumBlocks": stats.blocks_used,
                    "freeNumBlocks": stats.blocks_total - stats.blocks_used, "tokensPerBlock": stats.tokens_per_block,
                    "reusedBlocks": stats.prompt_tokens_reused // stats.tokens_per_block,
                },
                "inflightBatchingStats": {"numPausedRequests": 0}, **guessed,
            }
        )  # fmt: skip

    def _limits_of(self, limits: dict[str, int], tokens_per_block: int) -> Any:
        from trtkit.spec.plan import Limits

        cache = self.args.kv_cache_config
        blocks = 4096 if cache.max_tokens is None else cache.max_tokens // tokens_per_block
        self._pool_tokens = blocks * tokens_per_block
        return Limits(
            max_batch_size=min(limits["max_batch_size"], self.args.max_batch_size or 1 << 30),
            max_num_tokens=min(limits["max_num_tokens"], self.args.max_num_tokens or 1 << 30),
            max_seq_len=limits["max_seq_len"],
            tokens_per_block=tokens_per_block,
            kv_memory_bytes=None,
            enable_block_reuse=cache.enable_block_reuse and self.args.sparse_attention_config is None,
        )


class EngineLLM(_BaseLLM):
    """`tensorrt_llm._tensorrt_engine.LLM` on an engine directory."""

    FIELDS = {**_COMMON, **_ENGINE_ONLY}

    def _check_model(self) -> None:
        config = json.loads((self._model / "config.json").read_text())
        assert set(config) == {"version", "pretrained_config", "build_config"}, sorted(config)
        if config["version"] != VERSION:
            raise RuntimeError(
                f"Failed to deserialize cuda engine: built by TensorRT-LLM {config['version']}, this is {VERSION}"
            )
        mapping = config["pretrained_config"]["mapping"]
        for name, given in (("tp", self.args.tensor_parallel_size), ("pp", self.args.pipeline_parallel_size)):
            if given not in (1, mapping[f"{name}_size"]):
                raise ValueError(f"{name}_size {given} is not the engine's {mapping[f'{name}_size']}")
        self.args.tensor_parallel_size, self.args.pipeline_parallel_size = mapping["tp_size"], mapping["pp_size"]
        assert self.args.kv_cache_config.dtype == "auto", "KvCacheConfig.dtype should be 'auto' for TRT backend"
        paged = config["build_config"]["plugin_config"]["use_paged_context_fmha"]
        if self.args.enable_chunked_prefill and not paged:
            raise ValueError("chunked context needs paged context FMHA")
        if self.args.kv_cache_config.enable_block_reuse and not paged:
            raise ValueError("KV cache block reuse needs paged context FMHA")
        if self.args.speculative_config is not None:
            raise ValueError("NGram speculative decoding is not supported by the TensorRT backend")
        self._config = config

    def _load(self, scratch: Path) -> tuple[Any, int, Path]:
        pretrained, build = self._config["pretrained_config"], self._config["build_config"]
        plain = {**pretrained, "quantization": {**pretrained["quantization"], "kv_cache_quant_algo": None}}
        plain["trtkit"] = {key: value for key, value in pretrained["trtkit"].items() if key not in ("weights", "kv")}
        if pretrained["quantization"]["quant_algo"] not in (None, "W8A16"):
            plain["quantization"]["quant_algo"] = None
        else:
            plain["trtkit"] |= {key: pretrained["trtkit"][key] for key in ("weights",)}
        (scratch / "config.json").write_text(json.dumps(plain))
        for rank in range(pretrained["mapping"]["world_size"]):
            engine = self._model / f"rank{rank}.engine"
            if not engine.is_file():
                raise RuntimeError(f"Engine file {engine} does not exist")
            (scratch / f"rank{rank}.safetensors").symlink_to(engine.absolute())
        limits = self._limits_of(build, build["plugin_config"]["tokens_per_block"])
        return limits, pretrained["vocab_size"], scratch

    def _check_request(self, prompt_len: int, params: SamplingParams) -> None:
        if not self.args.enable_chunked_prefill and prompt_len + params.max_tokens > self._limits.max_seq_len:
            raise ValueError(f"prompt {prompt_len} and max_tokens {params.max_tokens} exceed max_seq_len")


class TorchLLM(_BaseLLM):
    """`tensorrt_llm.LLM` on a Hugging Face directory, quantised or not."""

    FIELDS = {**_COMMON, **_TORCH_ONLY}

    def _check_model(self) -> None:
        if self.args.backend not in (None, "pytorch"):
            raise ValueError(f"backend {self.args.backend!r} is not supported")
        if self.args.kv_cache_config.dtype not in ("auto", "fp8"):
            raise ValueError("kv_cache_config.dtype must be auto or fp8")
        if self.args.speculative_config is not None:
            if self.args.pipeline_parallel_size > 1:
                raise NotImplementedError("Drafting is not supported for selected executor loop.")
            if not self.args.disable_overlap_scheduler:
                raise NotImplementedError(
                    "NGram has no overlap scheduler: newer releases switch it off, older ones refuse"
                )
            if self.args.sparse_attention_config is not None:
                raise NotImplementedError("sparse attention beside speculation: no release was read to support it")

    def _load(self, scratch: Path) -> tuple[Any, int, Path]:
        from tensorrt_llm.llmapi._hf import dequantised_checkpoint

        vocab_size = dequantised_checkpoint(self._model, scratch)
        longest = json.loads((self._model / "config.json").read_text())["max_position_embeddings"]
        limits = {
            "max_batch_size": self.args.max_batch_size or 2048,
            "max_num_tokens": self.args.max_num_tokens or 8192,
            "max_seq_len": self.args.max_seq_len or longest,
        }
        return self._limits_of(limits, self.args.kv_cache_config.tokens_per_block), vocab_size, scratch / "checkpoint"

    def _check_request(self, prompt_len: int, params: SamplingParams) -> None:
        limit = self.args.max_num_tokens
        if not self.args.enable_chunked_prefill and limit and prompt_len > limit:
            raise ValueError(f"The sum of prompt length ({prompt_len}) should not exceed max_num_tokens ({limit})")
