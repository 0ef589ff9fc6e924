"""`LLM` of the PyTorch backend: without a policy the embedded engine computes, with one the paged fakes do."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from tensorrt_llm.llmapi._llm import _ANY, VERSION, TorchLLM

_COMPRESSION = "kv_cache_compression_config"


class LLM(TorchLLM):
    """A configuration of ours reaches every rank by pickle, as the LLM API's arguments reach MPI workers."""

    FIELDS = TorchLLM.FIELDS if VERSION.startswith("1.2") else {**TorchLLM.FIELDS, _COMPRESSION: (None, _ANY)}

    def get_stats(self, timeout: float | None = 2) -> list[dict[str, Any]]:
        return super().get_stats(timeout) if self.args.enable_iter_perf_stats else []

    def _load(self, scratch: Path) -> tuple[Any, int, Path]:
        loaded = super()._load(scratch)
        self._spec_dir = scratch
        return loaded

    def _open(self) -> Any:
        sparse, compression = self.args.sparse_attention_config, getattr(self.args, _COMPRESSION, None)
        if sparse is None and compression is None:
            return super()._open()
        from fakes.trtllm_kv.serve import PagedEngine

        scheduler = self.args.scheduler_config.capacity_scheduler_policy if self.args.scheduler_config else None
        return PagedEngine(
            self._checkpoint,
            pickle.dumps(sparse or compression),
            self._limits,
            blocks=self._pool_tokens // self._limits.tokens_per_block,
            ranks=self.args.tensor_parallel_size,
            overlap=not self.args.disable_overlap_scheduler,
            chunked=self.args.enable_chunked_prefill,
            capacity=getattr(scheduler, "value", "GUARANTEED_NO_EVICT"),
        )
