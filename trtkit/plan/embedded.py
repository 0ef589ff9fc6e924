"""What the embedded engine holds on a CUDA device besides its weights and its KV pool (modeled; counts are its own).

Weights and blocks are the same for every target; activations, runtime and eviction are an engine's own.
"""

from __future__ import annotations

from trtkit.spec.kv import KVPolicySpec
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Limits
from trtkit.spec.quant import QuantSpec
from trtkit.spec.units import GIB, MIB

WORKSPACE_BYTES = 256 * MIB
"""Tiles of 8-bit weights widened to 16 bits for a prompt's products, at most."""
CONTEXT_BYTES = int(0.75 * GIB)
"""CUDA context, library handles and their workspaces, captured graphs (assumed until measured)."""
_LOGIT_BYTES = 4
_SAMPLING_BYTES = 48
"""Per logit while a token is drawn: sorted values and ids, probabilities and their sums."""
_RING_QUERIES = 16
_RING_LSE_BYTES = 4
_LEDGER_SLOT_BYTES = 8
_PIECE_ON_GPU, _PIECE_ON_CPU = (256, 8), (32, 32)
"""Tokens of a prompt between two evictions: at least so many, or that share of a larger budget."""


def activation_bytes(model: ModelSpec, quant: QuantSpec, limits: Limits, drawn_rows: int) -> int:
    """Live tensors of the widest moment of one step of `max_num_tokens` tokens, and the logits of `drawn_rows` positions.

    In a block's MLP: residual, normed input, gate and up, and their product; in its attention: residual, normed input,
    q/k/v, rotated queries and their output. The larger counts, or drawing a token at each of these.
    """
    hidden, heads = model.hidden_size, model.num_heads * model.head_dim
    mlp = 2 * hidden + 3 * model.intermediate_size
    attention = 2 * hidden + heads + 2 * model.num_kv_heads * model.head_dim + 2 * heads
    step = limits.max_num_tokens * max(mlp, attention) * quant.compute.bits // 8
    logits = drawn_rows * model.vocab_size
    return max(step + logits * _LOGIT_BYTES, logits * _SAMPLING_BYTES)


def runtime_bytes(quant: QuantSpec) -> int:
    """Context and graphs, and room for widened weights where they are narrower than what they multiply."""
    return CONTEXT_BYTES + (WORKSPACE_BYTES if quant.is_weight_only else 0)


def piece_tokens(budget: int, *, on_gpu: bool) -> int:
    """Tokens of a prompt between two evictions, beyond the budget (see docs/h2o.md)."""
    least, parts = _PIECE_ON_GPU if on_gpu else _PIECE_ON_CPU
    return max(least, budget // parts)


def eviction_bytes(model: ModelSpec, quant: QuantSpec, limits: Limits, policy: KVPolicySpec) -> int:
    """Rings of queries and ledgers of a full batch of the longest requests, held whether or not they run.

    Counted for a policy that watches every query, such as H2O; one that watches none holds less.
    """
    if policy.is_full:
        return 0
    budget = policy.resolved(limits.max_seq_len).budget or limits.max_seq_len
    most = max(piece_tokens(budget, on_gpu=True), policy.interval or limits.tokens_per_block)
    slots = min(budget + most, limits.max_seq_len)
    ledger = model.num_layers * model.num_kv_heads * slots * _LEDGER_SLOT_BYTES
    place = model.num_layers * model.num_heads * (model.head_dim * quant.compute.bits // 8 + _RING_LSE_BYTES)
    return limits.max_batch_size * (_RING_QUERIES * place + ledger)
