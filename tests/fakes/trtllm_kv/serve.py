"""The paged fakes behind the fake `LLM`: a checkpoint in, requests at any time, one event per token out.

Tensor-parallel ranks are threads with executors of their own that take every step together. All compute in fp32.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from fakes.trtllm_kv import v12, v13
from fakes.trtllm_kv.executor import LlmRequest, LlmRequestState, Ranks, build_v12
from safetensors.torch import load_file

from trtkit.spec.checkpoint_config import read_checkpoint_config
from trtkit.spec.engine import FinishReason, KVStats, TokenEvent


class PagedEngine:
    """As much of trtkit's `Engine` as the fake `LLM` uses."""

    def __init__(self, checkpoint, config, limits, *, blocks, ranks, **running):
        spec, quant, parallel = read_checkpoint_config(checkpoint)
        assert quant.algo is None
        assert parallel.world_size == 1
        tensors = {name: tensor.float() for name, tensor in load_file(checkpoint / "rank0.safetensors").items()}
        self._limits, self._blocks = limits, blocks
        sizes = {
            "max_seq_len": limits.max_seq_len,
            "tokens_per_block": limits.tokens_per_block,
            "blocks": blocks,
            "max_batch_size": limits.max_batch_size,
            "max_num_tokens": limits.max_num_tokens,
        }
        if f"{v12.TORCH}.pyexecutor.kv_cache_manager_v2" in sys.modules:
            assert ranks == 1, "the fake of 1.3 runs on one rank"
            util = sys.modules[f"{v12.TORCH}.pyexecutor._util"]
            attention = sys.modules[f"{v12.TORCH}.attention_backend.trtllm"].TrtllmAttention
            del running["capacity"]  # V2 suspends instead
            sizes.pop("max_num_tokens")
            running["max_num_tokens"] = limits.max_num_tokens
            self._executors = [
                v13.build_v13(util, attention, spec, tensors, pickle.loads(config), running=running, **sizes)
            ]
        else:
            group = Ranks(ranks)
            self._executors = [
                build_v12(spec, tensors, pickle.loads(config), rank=rank, ranks=group, **sizes, **running)
                for rank in range(ranks)
            ]
        self._threads = ThreadPoolExecutor(ranks)
        self._live: dict[str, list[LlmRequest]] = {}
        self._told: dict[str, int] = {}

    def generate(self, requests):
        source, more = iter(requests), True
        while more or self._live:
            while more:
                request = next(source, StopIteration)
                more = request is not StopIteration
                if not more or request is None:
                    break
                self._add(request)
            if self._live:
                yield from self._step()

    def _add(self, request):
        assert request.sampling.temperature == 0, "the paged fakes are greedy"
        copies = [
            LlmRequest(int(request.request_id), list(request.prompt_ids), request.max_tokens, stop_ids=request.stop_ids)
            for _ in self._executors
        ]
        self._live[request.request_id], self._told[request.request_id] = copies, 0
        for executor, copy in zip(self._executors, copies, strict=True):
            executor.waiting.append(copy)

    def _step(self):
        """One step of every rank; they must agree, since nobody tells them what the others sampled."""
        list(self._threads.map(lambda executor: executor.step(), self._executors))
        for name, copies in list(self._live.items()):
            assert all(copy.output == copies[0].output for copy in copies), "ranks disagree"
            while self._told[name] < len(copies[0].output):
                index = self._told[name]
                self._told[name] += 1
                token, last = copies[0].output[index], index + 1 == len(copies[0].output)
                finish = None
                if last and copies[0].state is LlmRequestState.GENERATION_COMPLETE:
                    finish = FinishReason.STOP if token in copies[0].stop_ids else FinishReason.LENGTH
                    del self._live[name]
                yield TokenEvent(
                    request_id=name, index=index, token_id=token, time_ns=time.monotonic_ns(), finish=finish
                )

    def cancel(self, request_id):
        raise NotImplementedError

    def kv_stats(self):
        used = max(executor.manager.impl.used for executor in self._executors)
        running = self._executors[0].running
        return KVStats(
            tokens_per_block=self._limits.tokens_per_block,
            block_bytes=1,
            blocks_total=self._blocks,
            blocks_used=used,
            blocks_peak=used,
            requests_running=len(running),
            requests_waiting=len(self._executors[0].waiting),
        )

    def close(self):
        with contextlib.suppress(RuntimeError):
            self._threads.shutdown()
