"""How many operations and bytes a forward pass needs: exact counts, no speed in them.

Everything here follows from the model's shape. The floor (`trtkit.plan.roofline`), the forecast, the audit and the
benchmark's share of the machine's limit all divide these counts by somebody's rate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType

from trtkit.spec.checkpoint import ROW_SCALE, checkpoint_tensors
from trtkit.spec.dtype import DType
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Parallelism
from trtkit.spec.quant import FP8_ROWWISE, GPTQ_INT8, QuantSpec

_AWQ_ALGOS = ("W4A16_AWQ", "W4A8_AWQ")


def linear_flops_per_token(model: ModelSpec) -> float:
    """Operations of the block matrices for one token (a multiply-add is two)."""
    return 2.0 * model.num_layers * model.linear_params_per_layer


def head_flops(model: ModelSpec) -> float:
    """Operations of the language-model head for one position."""
    return 2.0 * model.vocab_size * model.hidden_size


def attention_flops(model: ModelSpec, prompt_tokens: int, *, cached_tokens: int = 0) -> float:
    """Causal attention operations of a prompt whose first `cached_tokens` are already in the cache.

    Scores and weighted values are 4 operations per (query, visible key, query-head element); the triangle is taken as
    s^2 / 2. A sliding window limits what a query sees.
    """
    per_pair = 4.0 * model.num_layers * model.num_heads * model.head_dim
    return per_pair * (_pairs(model, prompt_tokens) - _pairs(model, cached_tokens))


def _pairs(model: ModelSpec, tokens: int) -> float:
    window = model.sliding_window
    if window is None or tokens <= window:
        return tokens * tokens / 2
    return window * window / 2 + (tokens - window) * float(window)


def prefill_flops(model: ModelSpec, prompt_tokens: int, *, cached_tokens: int = 0) -> float:
    """Operations from prompt to first token: block matrices and attention of the new tokens, head for the last.

    `cached_tokens` of the prompt were found in a prefix cache and are not computed again.
    """
    new_tokens = max(prompt_tokens - cached_tokens, 0)
    attention = attention_flops(model, prompt_tokens, cached_tokens=min(cached_tokens, prompt_tokens))
    return linear_flops_per_token(model) * new_tokens + attention + head_flops(model)


def decode_flops(model: ModelSpec, context_tokens: float) -> float:
    """Operations of one output token that attends to `context_tokens` cached tokens."""
    attention = 4.0 * model.num_layers * model.num_heads * model.head_dim * visible_tokens(model, context_tokens)
    return linear_flops_per_token(model) + attention + head_flops(model)


def visible_tokens(model: ModelSpec, context_tokens: float) -> float:
    """Cached tokens a new query attends to: all, or the sliding window."""
    return context_tokens if model.sliding_window is None else min(context_tokens, model.sliding_window)


@lru_cache(maxsize=512)
def weight_groups(
    model: ModelSpec, quant: QuantSpec, parallel: Parallelism | None = None, *, pp_rank: int = 0
) -> Mapping[str, int]:
    """Bytes one rank holds, by tensor group: embedding, attention, mlp, norm, head (and scales of grouped schemes).

    Equal to the tensors of `rank{N}.safetensors` for every form trtkit converts itself (16/32-bit, INT8 and INT4
    weight-only); schemes that ModelOpt writes add their scales here.
    """
    groups: Counter[str] = Counter()
    in_groups = quant.algo == GPTQ_INT8 and quant.group_size > 0
    for tensor in checkpoint_tensors(model, quant, parallel, pp_rank=pp_rank):
        if in_groups and tensor.name.endswith(ROW_SCALE):
            continue
        groups[tensor.group] += tensor.num_bytes
        if tensor.name.endswith(".weight") and tensor.group in ("attention", "mlp") and len(tensor.shape) == 2:
            scales = _scale_bytes(quant, *tensor.shape)
            if scales:
                groups["scales"] += scales
    return MappingProxyType(dict(groups))


def _scale_bytes(quant: QuantSpec, out_features: int, in_features: int) -> int:
    """Bytes of the scales that `checkpoint_tensors` does not list (it lists those of INT8 rows and of the embedded engine's groups)."""
    compute_bytes = quant.compute.bits // 8
    if quant.is_grouped:
        return 0
    if quant.group_size:
        groups = out_features * -(-in_features // quant.group_size) * compute_bytes
        if quant.algo in _AWQ_ALGOS:
            return groups + in_features * compute_bytes
        # GPTQ has a zero beside every scale, which is 0 for symmetric weights and stored all the same.
        return 2 * groups if quant.algo == GPTQ_INT8 else groups
    if quant.weights is DType.INT8 and not quant.is_weight_only:
        return out_features * (DType.FP32.bits // 8)
    if quant.weights is DType.FP8 and quant.algo != FP8_ROWWISE:
        return 2 * DType.FP32.bits // 8
    return 0


def weight_bytes(model: ModelSpec, quant: QuantSpec, parallel: Parallelism | None = None, *, pp_rank: int = 0) -> int:
    """Bytes of weights on one rank (all of them where `parallel` is one device)."""
    return sum(weight_groups(model, quant, parallel, pp_rank=pp_rank).values())


def weight_read_bytes(model: ModelSpec, quant: QuantSpec) -> int:
    """Bytes of weights every decode step reads, over all ranks: everything but the input embedding table."""
    groups = weight_groups(model, quant)
    return sum(groups.values()) - groups["embedding"]


def kv_read_bytes(model: ModelSpec, quant: QuantSpec, contexts: Sequence[float]) -> float:
    """Bytes of keys and values one step reads, over all ranks, for sequences of these cached lengths."""
    return model.kv_bytes_per_token(quant.kv) * sum(visible_tokens(model, context) for context in contexts)


def decode_step_bytes(model: ModelSpec, quant: QuantSpec, contexts: Sequence[float]) -> float:
    """Bytes one decode step must read, over all ranks: weights once, each sequence's cache once."""
    return weight_read_bytes(model, quant) + kv_read_bytes(model, quant, contexts)
