"""`BuildPlan`: everything that decides what engine comes out. Complete: no "auto" is left in it."""

from __future__ import annotations

from dataclasses import dataclass, field

from trtkit.spec.codec import LATER
from trtkit.spec.errors import UsageError
from trtkit.spec.kv import KVPolicySpec
from trtkit.spec.model import ModelSpec
from trtkit.spec.quant import QuantSpec
from trtkit.spec.speculation import SpeculationSpec

TARGETS = ("embedded", "tensorrt", "pytorch")
LOAD_FORMATS = ("auto", "dummy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Parallelism:
    """Ranks: `tp` shards every layer, `pp` splits the layers."""

    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        if self.tp < 1 or self.pp < 1:
            raise UsageError(f"tp={self.tp}, pp={self.pp}: both must be at least 1")

    @property
    def world_size(self) -> int:
        """Devices in all."""
        return self.tp * self.pp


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What an engine admits.

    `max_num_tokens` bounds the tokens of one step (all requests), `max_seq_len` prompt plus output of one
    request. The KV pool is `kv_memory_bytes` per rank if given, else `kv_fraction` of what is free after loading.
    With `enable_block_reuse` full blocks of earlier requests stay findable, and a prompt that begins with the same
    tokens does not compute them again.
    """

    max_batch_size: int = 32
    max_num_tokens: int = 8192
    max_seq_len: int = 8192
    tokens_per_block: int = 32
    kv_memory_bytes: int | None = None
    kv_fraction: float = 0.9
    enable_chunked_prefill: bool = True
    enable_block_reuse: bool = field(default=False, metadata=LATER)

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_num_tokens", "max_seq_len", "tokens_per_block"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.kv_memory_bytes is not None and self.kv_memory_bytes < 1:
            raise UsageError(f"kv_memory_bytes is {self.kv_memory_bytes}, must be positive")
        if not 0 < self.kv_fraction <= 1:
            raise UsageError(f"kv_fraction is {self.kv_fraction}, must be above 0 and at most 1")

    @property
    def most_blocks(self) -> int:
        """Blocks a pool that sizes itself has at most: the most a full batch can use, as many again for reuse."""
        batch = self.max_batch_size * -(-self.max_seq_len // self.tokens_per_block)
        return 2 * batch if self.enable_block_reuse else batch


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildPlan:
    """One engine to build. `model_source` is a directory or a hub id; `gpu` names a catalog entry.

    `load_format` "dummy" means random weights of the true shape, made on the device when the engine opens: speed and
    memory are real, text is not. Only the embedded target takes it. `speculation` None guesses no tokens.
    """

    name: str
    model: ModelSpec
    model_source: str
    gpu: str
    quant: QuantSpec
    kv: KVPolicySpec = field(default_factory=KVPolicySpec)
    parallel: Parallelism = field(default_factory=Parallelism)
    limits: Limits = field(default_factory=Limits)
    target: str = "embedded"
    target_version: str | None = None
    load_format: str = "auto"
    speculation: SpeculationSpec | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UsageError(f"unknown target {self.target!r}: allowed are {', '.join(TARGETS)}")
        if self.load_format not in LOAD_FORMATS:
            raise UsageError(f"unknown load format {self.load_format!r}: allowed are {', '.join(LOAD_FORMATS)}")
        if self.load_format == "dummy" and self.target != "embedded":
            raise UsageError(f"load format 'dummy': only the embedded target takes it, not {self.target!r}")
        if self.speculation is not None:
            self._check_speculation(self.speculation)
        check_block_reuse(self.limits, self.kv)
        kv_heads, tp = self.model.num_kv_heads, self.parallel.tp
        if self.model.num_heads % tp or (kv_heads % tp and tp % kv_heads):
            raise UsageError(
                f"tp={tp} does not divide {self.model.name}'s heads ({self.model.num_heads} query, {kv_heads} KV)"
            )
        if self.model.intermediate_size % tp:
            raise UsageError(f"tp={tp} does not divide {self.model.name}'s MLP width {self.model.intermediate_size}")
        if self.model.num_layers % self.parallel.pp:
            raise UsageError(
                f"pp={self.parallel.pp} does not divide {self.model.name}'s {self.model.num_layers} layers"
            )

    def _check_speculation(self, speculation: SpeculationSpec) -> None:
        if self.target == "tensorrt":
            raise UsageError(
                f"speculation {speculation.label!r}: target 'tensorrt' has none; use --target embedded or pytorch"
            )
        check_speculation(speculation, self.kv)


def check_speculation(speculation: SpeculationSpec | None, kv: KVPolicySpec) -> None:
    """Refuse guesses together with eviction: what a wrong guess has evicted cannot be brought back.

    Raises:
        UsageError: both were asked for.
    """
    if speculation is not None and not kv.is_full:
        raise UsageError(
            f"speculation {speculation.label!r} with KV policy {kv.label!r}: an eviction cannot be taken back when a "
            "guess was wrong; use --kv full or --speculate off"
        )


def check_block_reuse(limits: Limits, kv: KVPolicySpec) -> None:
    """Refuse block reuse together with eviction: a block that other requests read cannot be compacted.

    Raises:
        UsageError: both were asked for.
    """
    if limits.enable_block_reuse and not kv.is_full:
        raise UsageError(
            f"block reuse with KV policy {kv.label!r}: a block that requests share cannot be compacted; "
            "use --kv full or --no-reuse-prefix"
        )
