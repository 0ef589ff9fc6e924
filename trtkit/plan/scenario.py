"""`Scenario`: one configuration under one load, and the arrays that the formulas want from many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trtkit.plan import work
from trtkit.plan.names import Precision
from trtkit.plan.perfmodel import Load
from trtkit.spec.errors import UsageError
from trtkit.spec.gpu import GpuSpec
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Parallelism

TENSORRT_LLM = "tensorrt-llm"
MAX_RANKS = 1024
PCIE_LINK_BYTES_S = 32e9
"""Between devices without NVLink: PCIe 4 x16, one direction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scenario:
    """A model on devices, with lengths in tokens.

    `concurrency` None is maximum load. `kept_tokens` bounds the cache of one sequence (KV eviction), which is scored
    and compacted every `evict_interval` steps. `cached_tokens`
    of each prompt are found in a prefix cache. `stack` and `version` name whose software; `static` is one fixed batch
    without in-flight batching; `stream_steps` delays the first token by that many decode steps (streaming interval).
    """

    model: ModelSpec
    gpu: GpuSpec
    precision: Precision
    isl: int
    osl: int
    concurrency: int | None = None
    tp: int = 1
    pp: int = 1
    kept_tokens: int | None = None
    evict_interval: int = 32
    cached_tokens: int = 0
    stack: str = TENSORRT_LLM
    version: str | None = None
    static: bool = False
    stream_steps: int = 0

    def __post_init__(self) -> None:
        if self.isl < 1 or self.osl < 1 or (self.concurrency is not None and self.concurrency < 1):
            raise UsageError(
                f"isl={self.isl}, osl={self.osl}, concurrency={self.concurrency}: lengths and load must be at least 1"
            )
        if not 0 <= self.cached_tokens <= self.isl:
            raise UsageError(f"{self.cached_tokens} of {self.isl} prompt tokens cannot come from a prefix cache")
        if (self.kept_tokens is not None and self.kept_tokens < 1) or self.evict_interval < 1:
            raise UsageError(
                f"KV budget {self.kept_tokens} tokens every {self.evict_interval} steps: both must be at least 1"
            )
        if self.parallel.world_size > MAX_RANKS:
            raise UsageError(f"tp={self.tp}, pp={self.pp}: more than {MAX_RANKS} ranks")

    @property
    def parallel(self) -> Parallelism:
        """Ranks of one replica."""
        return Parallelism(tp=self.tp, pp=self.pp)

    @property
    def num_gpus(self) -> int:
        """Devices of one replica."""
        return self.tp * self.pp

    @property
    def link_bytes_s(self) -> float:
        """One direction between two devices; PCIe where there is no NVLink fabric."""
        no_fabric = "pcie" in self.gpu.name or self.gpu.link_bytes_s is None
        return PCIE_LINK_BYTES_S if no_fabric else float(self.gpu.link_bytes_s or 0)

    @property
    def cached_context(self) -> float:
        """Mean cached tokens of a sequence while it decodes."""
        whole = self.isl + self.osl / 2
        return min(whole, self.kept_tokens) if self.kept_tokens is not None else whole


def load_of(scenarios: Sequence[Scenario]) -> Load:
    """Arrays of shape [len(scenarios)].

    Raises:
        UnsupportedError: a device has no unit for a scenario's operands.
    """

    def column(values: Sequence[float]) -> np.ndarray:
        return np.array(values, dtype=float)

    every = list(scenarios)
    return Load(
        isl=column([s.isl for s in every]),
        osl=column([s.osl for s in every]),
        concurrency=column([float("nan") if s.concurrency is None else s.concurrency for s in every]),
        tp=column([s.tp for s in every]),
        pp=column([s.pp for s in every]),
        weight_read_bytes=column([work.weight_read_bytes(s.model, s.precision.quant) for s in every]),
        weight_bytes=column([work.weight_bytes(s.model, s.precision.quant) for s in every]),
        linear_flops=column([work.linear_flops_per_token(s.model) for s in every]),
        head_flops=column([work.head_flops(s.model) for s in every]),
        attention_flops=column([work.attention_flops(s.model, s.isl, cached_tokens=s.cached_tokens) for s in every]),
        new_tokens=column([max(s.isl - s.cached_tokens, 1) for s in every]),
        comm_bytes=column([s.model.hidden_size * s.precision.quant.compute.bits / 8 for s in every]),
        all_reduces=column([2 * s.model.num_layers for s in every]),
        kv_token_bytes=column([s.model.kv_bytes_per_token(s.precision.quant.kv) for s in every]),
        kv_ranks=column([min(s.tp, s.model.num_kv_heads) for s in every]),
        bandwidth_bytes_s=column([s.gpu.memory_bandwidth_bytes_s for s in every]),
        gemm_flops_s=column([s.precision.gemm_flops_s(s.gpu) for s in every]),
        attention_flops_s=column([s.precision.attention_flops_s(s.gpu) for s in every]),
        link_bytes_s=column([s.link_bytes_s for s in every]),
        memory_bytes=column([s.gpu.memory_bytes for s in every]),
        kept_tokens=column([float("inf") if s.kept_tokens is None else s.kept_tokens for s in every]),
        evict_interval=column([float("inf") if s.kept_tokens is None else s.evict_interval for s in every]),
        static=np.array([s.static for s in every], dtype=bool),
        stream_steps=column([s.stream_steps for s in every]),
    )
