"""Which types and tensors a checkpoint for a target holds.

What lies beside the weights is read off TensorRT-LLM's own loaders (releases 0.20 to 1.2): `per_channel_scale` of FP8 rows,
`weights_scaling_factor` and `zero` of grouped GPTQ, `kv_cache_scaling_factor` of an 8-bit cache (its reciprocal is added by
`trtllm-build`). `docs/tensorrt-llm.md` says where.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from trtkit.spec.checkpoint import CheckpointTensor, checkpoint_tensors, kv_heads_per_rank, layer_prefix
from trtkit.spec.dtype import DType
from trtkit.spec.errors import UnsupportedError, UsageError
from trtkit.spec.model import ModelSpec
from trtkit.spec.plan import Parallelism
from trtkit.spec.quant import FP8_ROWWISE, GPTQ_INT8, INT4_GROUPS, INT8_ROWS, QuantSpec

TARGETS = ("embedded", "tensorrt")
STREAMED = (None, INT8_ROWS, FP8_ROWWISE, GPTQ_INT8, INT4_GROUPS)
"""Schemes that need no calibration, so that the converter writes them piece by piece."""

SCALING_FACTOR = "weights_scaling_factor"
ZERO = "zero"
GPTQ_GROUPS = (64, 128)
"""Inputs that share a scale in an engine: what TensorRT-LLM's kernel takes."""

GPTQ_GROUP = 128
"""The one chosen where every row has a single scale."""

_LINEARS = ("attention.qkv.weight", "attention.dense.weight", "mlp.fc.weight", "mlp.gate.weight", "mlp.proj.weight")


def stored_quant(quant: QuantSpec, target: str) -> QuantSpec:
    """The types a checkpoint for `target` holds; its config still names the scheme.

    TensorRT-LLM quantises INT8 weight-only itself while it builds, into a layout of its own, so its checkpoint keeps
    the compute type; the embedded engine reads INT8 rows and scales. GPTQ's groups go into an engine as they are, and
    into the embedded engine in its own form, which alone has INT4 in groups.

    Raises:
        UnsupportedError: the scheme needs calibration, or the target loads another format.
    """
    if target == "pytorch":
        raise UnsupportedError(
            "target 'pytorch' loads Hugging Face directories itself and needs no TensorRT-LLM checkpoint; "
            f"convert writes for {' and '.join(TARGETS)}"
        )
    if target not in TARGETS:
        raise UsageError(f"unknown target {target!r}: allowed are {', '.join(TARGETS)}")
    if quant.algo not in STREAMED:
        raise UnsupportedError(
            f"precision {quant.precision!r} needs calibration data, which convert does not use; "
            "convert writes fp32, fp16, bf16, int8 (weight-only), int8-gptq, int4 and fp8-rowwise"
        )
    if target == "embedded" and quant.kv is DType.INT8:
        raise UnsupportedError("the embedded engine has no int8 KV cache; use a 16-bit one or fp8")
    if target == "embedded":
        return quant.embedded
    if quant.algo == INT4_GROUPS:
        raise UnsupportedError(
            f"precision {quant.precision!r} is the embedded engine's; for TensorRT-LLM use --precision int4-awq"
        )
    if quant.algo == GPTQ_INT8:
        return replace(quant, group_size=quant.group_size or GPTQ_GROUP)
    return replace(quant, weights=quant.compute) if quant.algo == INT8_ROWS else quant


def stored_tensors(
    model: ModelSpec, stored: QuantSpec, parallel: Parallelism, *, pp_rank: int = 0
) -> Iterator[CheckpointTensor]:
    """Every tensor of one rank, as `stored_quant` types it.

    Grouped GPTQ: `weight` int8 [in, out], `weights_scaling_factor` and `zero` [in / group, out] in the compute type; the
    weight is still plain and is packed into the kernel's layout before the build (`trtkit.trtllm.pack`).
    What ModelOpt writes is counted by its weights alone.
    """
    for tensor in checkpoint_tensors(model, stored, parallel, pp_rank=pp_rank):
        if stored.algo != GPTQ_INT8:
            yield tensor
        elif tensor.name.endswith(_LINEARS):
            yield from _grouped(tensor, stored)
        elif not tensor.name.endswith("per_channel_scale"):
            yield tensor
    if stored.kv.bits < 16:
        for layer in range(model.num_layers // parallel.pp):
            yield CheckpointTensor(name=kv_scale_name(layer), shape=(1,), dtype=DType.FP32, group="attention")


def _grouped(tensor: CheckpointTensor, stored: QuantSpec) -> Iterator[CheckpointTensor]:
    rows, cols = tensor.shape
    prefix = tensor.name.removesuffix("weight")
    groups = (cols // stored.group_size, rows)
    yield replace(tensor, shape=(cols, rows))
    for name in (SCALING_FACTOR, ZERO):
        yield CheckpointTensor(name=f"{prefix}{name}", shape=groups, dtype=stored.compute, group=tensor.group)


def kv_scale_name(layer: int) -> str:
    """The cache's scale of a layer, counted within its pipeline stage: what a stored number is multiplied with."""
    return f"{layer_prefix(layer)}attention.kv_cache_scaling_factor"


def kv_scales(stored: QuantSpec, num_layers: int, given: Sequence[float] | None) -> tuple[float, ...]:
    """One scale a layer: those given, else 1.0 for FP8 (TensorRT-LLM's own choice where nothing was calibrated).

    Raises:
        UnsupportedError: INT8 without scales.
    """
    if stored.kv.bits >= 16:
        return ()
    if given is not None:
        assert len(given) == num_layers
        return tuple(given)
    if stored.kv is DType.INT8:
        raise UnsupportedError("an int8 KV cache needs calibrated scales: build it with --calib-text FILE")
    return (1.0,) * num_layers


def check_groups(model: ModelSpec, stored: QuantSpec, parallel: Parallelism) -> None:
    """Refuse GPTQ splits that TensorRT-LLM's grouped layer would pad: widths in and out that its groups do not divide.

    Raises:
        UnsupportedError: names the dimension.
    """
    if stored.algo != GPTQ_INT8:
        return
    step = stored.group_size * parallel.tp
    sizes = {"hidden size": model.hidden_size, "intermediate size": model.intermediate_size}
    sizes["query width"] = model.num_heads * model.head_dim
    sizes["qkv width"] = (model.num_heads + 2 * parallel.tp * kv_heads_per_rank(model, parallel.tp)) * model.head_dim
    for what, size in sizes.items():
        if size % step:
            raise UnsupportedError(
                f"{model.name}: {what} {size} is no multiple of {step} (GPTQ groups of {stored.group_size} on "
                f"{parallel.tp} rank(s)); lower --tp, or use --precision int8"
            )
