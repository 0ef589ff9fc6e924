"""Which rows and columns of which Hugging Face tensor go where in a TensorRT-LLM checkpoint. Pure arithmetic.

Names and split are those that `modelopt.torch.export.export_tensorrt_llm_checkpoint` writes (a golden test holds them
equal): `attention.qkv` is q, k and v stacked per rank, `mlp.fc` is `gate_proj`, `mlp.gate` is `up_proj`; query, key,
value, fc, gate and both vocabulary matrices are split by rows, `dense` and `proj` by columns, norms are replicated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from trtkit.spec.checkpoint import (
    FINAL_NORM,
    LM_HEAD,
    VOCAB_EMBEDDING,
    kv_heads_per_rank,
    layer_prefix,
    padded_vocab_size,
)
from trtkit.spec.errors import UsageError
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Parallelism

EMBED = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
_LINEAR = re.compile(r"\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Columns [col, col + cols) of a slab become rows from `row` on of tensor `name` in `rank`'s file."""

    rank: int
    name: str
    row: int = 0
    col: int = 0
    cols: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Slab:
    """Rows [row, row + rows) of a source tensor and every place they go. A vector is a matrix of one column."""

    source: str
    row: int
    rows: int
    cols: int
    targets: tuple[Target, ...]


def check_parallelism(model: ModelSpec, parallel: Parallelism) -> None:
    """Refuse a split that does not come out even.

    Raises:
        UsageError: names the dimension and the values that work.
    """
    tp, pp = parallel.tp, parallel.pp
    even = [n for n in range(1, model.num_heads + 1) if _splits(model, n)]
    if not _splits(model, tp):
        raise UsageError(
            f"tp={tp} does not divide {model.name}: {model.num_heads} query heads, {model.num_kv_heads} KV heads, "
            f"intermediate size {model.intermediate_size}; allowed are {', '.join(map(str, even))}"
        )
    if model.num_layers % pp:
        raise UsageError(f"pp={pp} does not divide {model.name}'s {model.num_layers} layers")


def _splits(model: ModelSpec, tp: int) -> bool:
    kv = model.num_kv_heads
    return not (model.num_heads % tp or model.intermediate_size % tp or (kv % tp and tp % kv))


def is_linear(name: str) -> bool:
    """Whether a source tensor is one of the seven matrices of a block, the ones that are quantised."""
    return _LINEAR.search(name) is not None


def source_shapes(model: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a Hugging Face checkpoint of this model must have, in file order."""
    hidden, inter, head_dim = model.hidden_size, model.intermediate_size, model.head_dim
    q_rows, kv_rows = model.num_heads * head_dim, model.num_kv_heads * head_dim
    linears = {
        "self_attn.q_proj": (q_rows, hidden, model.attn_qkv_bias),
        "self_attn.k_proj": (kv_rows, hidden, model.attn_qkv_bias),
        "self_attn.v_proj": (kv_rows, hidden, model.attn_qkv_bias),
        "self_attn.o_proj": (hidden, q_rows, model.attn_dense_bias),
        "mlp.gate_proj": (inter, hidden, model.mlp_bias),
        "mlp.up_proj": (inter, hidden, model.mlp_bias),
        "mlp.down_proj": (hidden, inter, model.mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBED: (model.vocab_size, hidden)}
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        for name, (rows, cols, bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (rows, cols)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        if model.qk_norm:
            shapes[f"{prefix}self_attn.q_norm.weight"] = (head_dim,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (head_dim,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    shapes[NORM] = (hidden,)
    if not model.tie_embeddings:
        shapes[HEAD] = (model.vocab_size, hidden)
    return shapes


def slabs(model: ModelSpec, parallel: Parallelism) -> Iterator[Slab]:
    """Everything a conversion moves, in the order of the source."""
    check_parallelism(model, parallel)
    tp, hidden = parallel.tp, model.hidden_size
    first, last = list(range(tp)), list(range(parallel.world_size - tp, parallel.world_size))
    yield from _vocabulary(model, first, EMBED, VOCAB_EMBEDDING)
    per_stage = model.num_layers // parallel.pp
    for layer in range(model.num_layers):
        stage, local = divmod(layer, per_stage)
        ranks = list(range(stage * tp, stage * tp + tp))
        yield from _layer(model, ranks, f"model.layers.{layer}.", layer_prefix(local))
    yield _replicated(NORM, FINAL_NORM, hidden, last)
    yield from _vocabulary(model, last, EMBED if model.tie_embeddings else HEAD, LM_HEAD)


def _vocabulary(model: ModelSpec, ranks: list[int], source: str, name: str) -> Iterator[Slab]:
    share = padded_vocab_size(model, len(ranks)) // len(ranks)
    for index, rank in enumerate(ranks):
        rows = min(share, model.vocab_size - index * share)
        if rows > 0:
            target = Target(rank=rank, name=name, cols=model.hidden_size)
            yield Slab(source=source, row=index * share, rows=rows, cols=model.hidden_size, targets=(target,))


def _layer(model: ModelSpec, ranks: list[int], source: str, target: str) -> Iterator[Slab]:
    hidden, inter, q_rows = model.hidden_size, model.intermediate_size, model.num_heads * model.head_dim
    yield _replicated(f"{source}input_layernorm.weight", f"{target}input_layernorm.weight", hidden, ranks)
    yield from _qkv(model, ranks, source, f"{target}attention.qkv.weight", cols=hidden, suffix=".weight")
    if model.attn_qkv_bias:
        yield from _qkv(model, ranks, source, f"{target}attention.qkv.bias", cols=1, suffix=".bias")
    if model.qk_norm:
        for ours, theirs in (("q_layernorm", "q_norm"), ("k_layernorm", "k_norm")):
            norm = f"{target}attention.{ours}.weight"
            yield _replicated(f"{source}self_attn.{theirs}.weight", norm, model.head_dim, ranks)
    yield from _by_columns(
        f"{source}self_attn.o_proj", f"{target}attention.dense", (hidden, q_rows), ranks, bias=model.attn_dense_bias
    )
    yield _replicated(f"{source}post_attention_layernorm.weight", f"{target}post_layernorm.weight", hidden, ranks)
    for ours, theirs in (("mlp.fc", "mlp.gate_proj"), ("mlp.gate", "mlp.up_proj")):
        yield from _by_rows(f"{source}{theirs}.weight", f"{target}{ours}.weight", (inter, hidden), ranks)
        if model.mlp_bias:
            yield from _by_rows(f"{source}{theirs}.bias", f"{target}{ours}.bias", (inter, 1), ranks)
    yield from _by_columns(f"{source}mlp.down_proj", f"{target}mlp.proj", (hidden, inter), ranks, bias=model.mlp_bias)


def _qkv(model: ModelSpec, ranks: list[int], source: str, name: str, *, cols: int, suffix: str) -> Iterator[Slab]:
    tp, head_dim = len(ranks), model.head_dim
    q_rows, kv_rows = model.num_heads // tp * head_dim, kv_heads_per_rank(model, tp) * head_dim
    queries = f"{source}self_attn.q_proj{suffix}"
    yield from _by_rows(queries, name, (q_rows * tp, cols), ranks)
    for part, projection in enumerate(("k_proj", "v_proj")):
        places: dict[int, list[Target]] = {}
        for index, rank in enumerate(ranks):
            row = index * model.num_kv_heads // tp * head_dim
            places.setdefault(row, []).append(Target(rank=rank, name=name, row=q_rows + part * kv_rows, cols=cols))
        for row, targets in places.items():
            tensor = f"{source}self_attn.{projection}{suffix}"
            yield Slab(source=tensor, row=row, rows=kv_rows, cols=cols, targets=tuple(targets))


def _by_rows(source: str, name: str, shape: tuple[int, int], ranks: list[int]) -> Iterator[Slab]:
    rows, cols = shape[0] // len(ranks), shape[1]
    for index, rank in enumerate(ranks):
        target = Target(rank=rank, name=name, cols=cols)
        yield Slab(source=source, row=index * rows, rows=rows, cols=cols, targets=(target,))


def _by_columns(source: str, name: str, shape: tuple[int, int], ranks: list[int], *, bias: bool) -> Iterator[Slab]:
    rows, cols = shape[0], shape[1] // len(ranks)
    targets = (
        Target(rank=rank, name=f"{name}.weight", col=index * cols, cols=cols) for index, rank in enumerate(ranks)
    )
    yield Slab(source=f"{source}.weight", row=0, rows=rows, cols=shape[1], targets=tuple(targets))
    if bias:
        yield _replicated(f"{source}.bias", f"{name}.bias", rows, ranks)


def _replicated(source: str, name: str, rows: int, ranks: list[int]) -> Slab:
    targets = tuple(Target(rank=rank, name=name, cols=1) for rank in ranks)
    return Slab(source=source, row=0, rows=rows, cols=1, targets=targets)
