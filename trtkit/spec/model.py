"""`ModelSpec`: the dimensions of a Llama-family decoder, and the counts that follow from them.

Knows nothing of files: `trtkit.spec.hf` reads Hugging Face configs, `trtkit.spec.catalog` the presets.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError

ROPE_SCALINGS = ("none", "linear", "llama3")


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """Rotary position embedding.

    `scaling` is one of `ROPE_SCALINGS`; `factor` applies to "linear" and "llama3", the other three fields
    to "llama3" only (Llama 3.1's frequency-dependent interpolation).
    """

    theta: float = 10_000.0
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """Shape of one dense decoder: RMSNorm, rotary GQA attention, SiLU-gated MLP.

    `attn_qkv_bias` is Qwen2's (and Llama's `attention_bias`), `attn_dense_bias` Llama's `attention_bias` alone;
    `qk_norm` is Qwen3's per-head RMSNorm on queries and keys.
    """

    name: str
    architecture: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float = 1e-5
    tie_embeddings: bool = False
    attn_qkv_bias: bool = False
    attn_dense_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    rope: RopeSpec = field(default_factory=RopeSpec)
    dtype: DType = DType.BF16
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "hidden_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "intermediate_size",
            "vocab_size",
            "max_position_embeddings",
        ):
            if getattr(self, name) <= 0:
                raise InputError(f"model {self.name!r}: {name} is {getattr(self, name)}, must be positive")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"model {self.name!r}: {self.num_heads} query heads cannot share "
                f"{self.num_kv_heads} KV heads evenly; num_kv_heads must divide num_heads"
            )

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def linear_params_per_layer(self) -> int:
        """Weights of the seven matrices of one block, biases and norms left out."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def num_params(self) -> int:
        """Every stored parameter; tied embeddings count once."""
        per_layer = self.linear_params_per_layer + 2 * self.hidden_size
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        if self.attn_qkv_bias:
            per_layer += q_size + 2 * kv_size
        if self.attn_dense_bias:
            per_layer += self.hidden_size
        if self.mlp_bias:
            per_layer += 2 * self.intermediate_size + self.hidden_size
        if self.qk_norm:
            per_layer += 2 * self.head_dim
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return self.num_layers * per_layer + embeddings + self.hidden_size

    def kv_bytes_per_token(self, dtype: DType) -> int:
        """Bytes of keys and values one token adds over all layers and KV heads."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.bits // 8
