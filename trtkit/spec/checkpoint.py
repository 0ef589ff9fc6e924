"""The TensorRT-LLM checkpoint layout of a Llama-family decoder: tensor names, shapes, types and split.

Pure arithmetic, shared by the converter (writes it), the embedded engine (reads it) and the planner (counts it), so
the three agree to the byte. Layout as `modelopt.torch.export.export_tensorrt_llm_checkpoint` writes it: `qkv` is
q, k, v stacked by rank; `mlp.fc` is Hugging Face's gate_proj and `mlp.gate` its up_proj; embedding and head are
split along the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from trtkit.spec.dtype import DType
from trtkit.spec.errors import UnsupportedError
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Parallelism
from trtkit.spec.quant import FP8_ROWWISE, GROUPS, QuantSpec

CONFIG_NAME = "config.json"
VOCAB_EMBEDDING = "transformer.vocab_embedding.weight"
FINAL_NORM = "transformer.ln_f.weight"
LM_HEAD = "lm_head.weight"
ROW_SCALE = "per_channel_scale"
GROUP_SCALE = "per_group_scale"
GROUP_ZERO = "per_group_zero"
INPUT_SCALE = "input_scale"
INPUT_ORDER = "input_order"
"""What may lie beside a quantised weight in the embedded engine's form. Zero points count from the middle of the range."""


def rank_file(rank: int) -> str:
    """Name of one rank's weights."""
    return f"rank{rank}.safetensors"


def layer_prefix(layer: int) -> str:
    """Prefix of one block's tensors; layers count from 0 within a pipeline rank."""
    return f"transformer.layers.{layer}."


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointTensor:
    """One tensor of one rank. `group` is what a memory table adds it to: embedding, attention, mlp, norm, head."""

    name: str
    shape: tuple[int, ...]
    dtype: DType
    group: str

    @property
    def num_bytes(self) -> int:
        """Bytes in the file and in memory."""
        return prod(self.shape) * self.dtype.bits // 8

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in the file: INT4 lies two to a byte along the inputs."""
        return self.shape if self.dtype is not DType.INT4 else (*self.shape[:-1], self.shape[-1] // 2)


def padded_vocab_size(model: ModelSpec, tp: int) -> int:
    """Vocabulary rows of all ranks together: the next multiple of `tp`."""
    return -(-model.vocab_size // tp) * tp


def kv_heads_per_rank(model: ModelSpec, tp: int) -> int:
    """KV heads a rank holds; with more ranks than KV heads each head is replicated."""
    return max(1, model.num_kv_heads // tp)


def with_groups(
    model: ModelSpec, quant: QuantSpec, parallel: Parallelism | None = None, *, within: int = 0
) -> QuantSpec:
    """`quant` with the largest of `GROUPS`, at most its own size, that divides every matrix's inputs on every rank.

    `within` is a size that the groups must divide, too: that of groups which exist already. A scheme without groups in
    the embedded engine's form is returned as it is.

    Raises:
        UnsupportedError: none of them does; names the width.
    """
    if not quant.is_grouped:
        return quant
    tp = (parallel or Parallelism()).tp
    heads = model.num_heads * model.head_dim
    widths = {"hidden size": model.hidden_size, "query width": heads // tp, "MLP width": model.intermediate_size // tp}
    if within:
        widths["group size"] = within
    allowed = [size for size in GROUPS if size <= quant.group_size]
    for size in allowed:
        if not any(width % size for width in widths.values()):
            return replace(quant, group_size=size)
    what, width = next((item for item in widths.items() if item[1] % GROUPS[-1]), ("widths", ""))
    raise UnsupportedError(
        f"{model.name}: {what} {width} on each of {tp} rank(s) has no groups of {' or '.join(map(str, allowed))} inputs, "
        f"which precision {quant.precision} wants; lower --tp, or use --precision int8"
    )


def checkpoint_tensors(
    model: ModelSpec, quant: QuantSpec, parallel: Parallelism | None = None, *, pp_rank: int = 0
) -> Iterator[CheckpointTensor]:
    """Every tensor of one rank of a checkpoint, in file order (all tensor-parallel ranks are alike in shape).

    INT8 weight-only in the embedded engine's form stores `weight` as int8 [out, in] and `per_channel_scale` [out] in
    the compute type. With `quant.weights` 16 bits wide and `algo` W8A16 there is no scale: `trtllm-build` quantises.
    In groups (`QuantSpec.is_grouped`) it is `per_group_scale` [out, in / group] in the compute type and, where there are
    zero points, `per_group_zero` of the same shape and type: weight = (number - zero) * scale; `input_order` int32 [in], if
    there is one, names the model's input behind each stored one, `mlp.gate`'s being that of `mlp.fc`. INT4 is packed as uint8
    [out, in / 2]: bytes 2 i and 2 i + 1 of a group of g inputs hold its inputs i, i + g / 4, i + g / 2 and i + 3 g / 4, the
    first in the lowest bits, each plus 8 (the order in which `trtkit.kernels` multiplies).
    FP8 by rows stores `weight` as float8_e4m3fn [out, in] and `per_channel_scale` [out] in float32.
    With fewer KV heads than ranks, rank r holds KV head r * num_kv_heads // tp.
    """
    parallel = parallel or Parallelism()
    quant = with_groups(model, quant, parallel)
    tp, pp = parallel.tp, parallel.pp
    compute = quant.compute
    vocab = padded_vocab_size(model, tp) // tp
    if pp_rank == 0:
        yield CheckpointTensor(name=VOCAB_EMBEDDING, shape=(vocab, model.hidden_size), dtype=compute, group="embedding")
    for layer in range(model.num_layers // pp):
        yield from _layer_tensors(model, quant, tp, layer_prefix(layer))
    if pp_rank == pp - 1:
        yield CheckpointTensor(name=FINAL_NORM, shape=(model.hidden_size,), dtype=compute, group="norm")
        yield CheckpointTensor(name=LM_HEAD, shape=(vocab, model.hidden_size), dtype=compute, group="head")


def _layer_tensors(model: ModelSpec, quant: QuantSpec, tp: int, prefix: str) -> Iterator[CheckpointTensor]:
    hidden, head_dim = model.hidden_size, model.head_dim
    q_rows = model.num_heads // tp * head_dim
    qkv_rows = q_rows + 2 * kv_heads_per_rank(model, tp) * head_dim
    inter = model.intermediate_size // tp
    yield _norm(model, quant, f"{prefix}input_layernorm.weight")
    yield from _linear(quant, f"{prefix}attention.qkv", (qkv_rows, hidden), "attention", bias=model.attn_qkv_bias)
    if model.qk_norm:
        for name in ("q_layernorm", "k_layernorm"):
            yield CheckpointTensor(
                name=f"{prefix}attention.{name}.weight", shape=(head_dim,), dtype=quant.compute, group="norm"
            )
    yield from _linear(quant, f"{prefix}attention.dense", (hidden, q_rows), "attention", bias=model.attn_dense_bias)
    yield _norm(model, quant, f"{prefix}post_layernorm.weight")
    yield from _linear(quant, f"{prefix}mlp.fc", (inter, hidden), "mlp", bias=model.mlp_bias)
    yield from _linear(quant, f"{prefix}mlp.gate", (inter, hidden), "mlp", bias=model.mlp_bias)
    yield from _linear(quant, f"{prefix}mlp.proj", (hidden, inter), "mlp", bias=model.mlp_bias)


def _norm(model: ModelSpec, quant: QuantSpec, name: str) -> CheckpointTensor:
    return CheckpointTensor(name=name, shape=(model.hidden_size,), dtype=quant.compute, group="norm")


def _linear(
    quant: QuantSpec, prefix: str, shape: tuple[int, int], group: str, *, bias: bool
) -> Iterator[CheckpointTensor]:
    yield CheckpointTensor(name=f"{prefix}.weight", shape=shape, dtype=quant.weights, group=group)
    if quant.is_grouped and quant.is_weight_only:
        groups = (shape[0], shape[1] // quant.group_size)
        for name in (GROUP_SCALE, GROUP_ZERO) if quant.zero_points else (GROUP_SCALE,):
            yield CheckpointTensor(name=f"{prefix}.{name}", shape=groups, dtype=quant.compute, group=group)
        if quant.input_order and not prefix.endswith("mlp.gate"):
            yield CheckpointTensor(name=f"{prefix}.{INPUT_ORDER}", shape=shape[1:], dtype=DType.INT32, group=group)
    elif quant.weights is DType.INT8 and quant.is_weight_only:
        yield CheckpointTensor(name=f"{prefix}.{ROW_SCALE}", shape=shape[:1], dtype=quant.compute, group=group)
    if quant.algo == FP8_ROWWISE and quant.weights is DType.FP8:
        yield CheckpointTensor(name=f"{prefix}.{ROW_SCALE}", shape=shape[:1], dtype=DType.FP32, group=group)
    if bias:
        yield CheckpointTensor(name=f"{prefix}.bias", shape=shape[:1], dtype=quant.compute, group=group)
