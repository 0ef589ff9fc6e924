"""A Llama with explicit keep masks in float64 numpy: nothing is paged, batched, compacted or forgotten.

Shares no code with the engine. Each layer keeps all keys and values it ever saw; eviction only clears mask bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from trtkit.engine.loop import EmbeddedEngine
from trtkit.engine.open import open_tensors
from trtkit.kv.policy import Budget
from trtkit.spec.checkpoint import checkpoint_tensors
from trtkit.spec.dtype import DType
from trtkit.spec.kv import KVPolicySpec, parse_kv_policy
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Limits
from trtkit.spec.quant import quant_for
from trtkit_h2o.oracle import LayerOracle
from trtkit_h2o.policy import H2O


def small_model(**overrides) -> ModelSpec:
    values = {
        "name": "small",
        "architecture": "LlamaForCausalLM",
        "num_layers": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "vocab_size": 96,
        "max_position_embeddings": 512,
    }
    return ModelSpec(**{**values, **overrides})


def random_tensors(model: ModelSpec, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights whose attention is peaked enough that eviction matters."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for entry in checkpoint_tensors(model, quant_for("fp32")):
        noise = torch.randn(entry.shape, generator=generator)
        if entry.group == "norm":
            tensors[entry.name] = 1 + 0.1 * noise
        else:
            gain = 2.0 if entry.name.endswith("qkv.weight") else 1.0
            tensors[entry.name] = noise * gain / math.sqrt(entry.shape[-1])
    return tensors


def open_small(
    model: ModelSpec, tensors: dict[str, torch.Tensor], kv: str = "full", *, blocks: int = 256, **limits
) -> EmbeddedEngine:
    values = {"max_batch_size": 8, "max_num_tokens": 128, "max_seq_len": 256, "tokens_per_block": 4, **limits}
    size = model.kv_bytes_per_token(DType.FP32) * values["tokens_per_block"] * blocks
    return open_tensors(model, tensors, limits=Limits(kv_memory_bytes=size, **values), kv_policy=parse_kv_policy(kv))


Select = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""(scores of one head [P], live mask [P], tokens so far) -> mask of what stays."""


class _Layer(LayerOracle):
    """The plugin's oracle, with any rule of selection."""

    def __init__(self, policy: H2O, model: ModelSpec, select: Select | None) -> None:
        super().__init__(policy, model.num_kv_heads, model.head_dim)
        self._select = select

    def evict(self) -> None:
        if self._select is None:
            super().evict()
            return
        for head in range(self.live.shape[0]):
            if int(self.live[head].sum()) > self.policy.budget.tokens:
                self.live[head] = self._select(self.mass[head], self.live[head], self.num_tokens)


class DenseOracle:
    """One sequence through the whole model; `step` feeds tokens and returns their logits."""

    def __init__(
        self, model: ModelSpec, tensors: dict[str, torch.Tensor], policy: H2O, select: Select | None = None
    ) -> None:
        self.model = model
        self.weights = {name: tensor.double().numpy() for name, tensor in tensors.items()}
        self.layers = [_Layer(policy, model, select) for _ in range(model.num_layers)]
        self.num_tokens = 0

    @property
    def live_tokens(self) -> int:
        counts = {int(n) for layer in self.layers for n in layer.live.sum(1)}
        assert len(counts) == 1, f"layers and heads keep different counts: {counts}"
        return counts.pop()

    def kept(self) -> list[list[list[int]]]:
        """Live positions per layer and KV head."""
        return [[np.flatnonzero(row).tolist() for row in layer.live] for layer in self.layers]

    def evict(self) -> None:
        for layer in self.layers:
            layer.evict()

    def step(self, token_ids: list[int]) -> np.ndarray:
        """Logits after each of `token_ids`, [T, V]."""
        x = self.weights["transformer.vocab_embedding.weight"][token_ids]
        positions = np.arange(self.num_tokens, self.num_tokens + len(token_ids))
        for index in range(self.model.num_layers):
            x = self._block(x, positions, index)
        self.num_tokens += len(token_ids)
        return self._norm(x, "transformer.ln_f.weight") @ self.weights["lm_head.weight"].T

    def _block(self, x, positions, index):
        model, prefix = self.model, f"transformer.layers.{index}."
        h = self._norm(x, f"{prefix}input_layernorm.weight")
        qkv = h @ self.weights[f"{prefix}attention.qkv.weight"].T
        q_size, kv_size = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        q, k, v = np.split(qkv, [q_size, q_size + kv_size], axis=1)
        q = self._rotate(q.reshape(len(x), model.num_heads, -1), positions)
        k = self._rotate(k.reshape(len(x), model.num_kv_heads, -1), positions)
        grouped = q.reshape(len(x), model.num_kv_heads, model.group_size, -1)
        out = self.layers[index].feed(grouped, k, v.reshape(len(x), model.num_kv_heads, -1))
        x = x + out.reshape(len(x), -1) @ self.weights[f"{prefix}attention.dense.weight"].T
        h = self._norm(x, f"{prefix}post_layernorm.weight")
        gate = h @ self.weights[f"{prefix}mlp.fc.weight"].T
        up = h @ self.weights[f"{prefix}mlp.gate.weight"].T
        return x + (gate / (1 + np.exp(-gate)) * up) @ self.weights[f"{prefix}mlp.proj.weight"].T

    def _norm(self, x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.model.norm_epsilon) * self.weights[name]

    def _rotate(self, heads_THD, positions):
        half = self.model.head_dim // 2
        angle = positions[:, None] / self.model.rope.theta ** (np.arange(half) / half)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        first, second = heads_THD[..., :half], heads_THD[..., half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def greedy_with_eviction(oracle: DenseOracle, prompt: list[int], count: int, piece: int) -> tuple[list[int], list]:
    """Generate as the engine's schedule says: evict after each prompt piece over budget, then at budget + interval.

    Returns:
        The tokens and the logits each was chosen from.
    """
    budget = oracle.layers[0].policy.budget
    logits = None
    while oracle.num_tokens < len(prompt):
        end = min(len(prompt), (oracle.num_tokens // piece + 1) * piece)
        logits = oracle.step(prompt[oracle.num_tokens : end])[-1]
        oracle.evict()
    tokens, seen = [], []
    for _ in range(count):
        tokens.append(int(logits.argmax()))
        seen.append(logits)
        if len(tokens) < count:
            logits = oracle.step([tokens[-1]])[-1]
            if oracle.live_tokens >= budget.tokens + budget.interval:
                oracle.evict()
    return tokens, seen


def h2o_policy(spec: KVPolicySpec, interval: int) -> H2O:
    """The H2O a spec means, built without the engine's loader."""
    assert spec.budget is not None
    assert spec.sinks is not None
    assert spec.recent is not None
    budget = Budget(tokens=spec.budget, sinks=spec.sinks, recent=spec.recent, interval=spec.interval or interval)
    return H2O(budget=budget, scorer=spec.scorer or "mean")
