"""A TensorRT-LLM checkpoint as matrices ready to multiply: ranks merged, q|k|v and gate|up fused.

Names and split are `trtkit.spec.checkpoint`'s. TensorRT-LLM's `mlp.fc` is the gated (SiLU) half and `mlp.gate` the
other. INT8 stays int8, with one scale per output channel or per group of inputs, INT4 stays packed, in groups, and FP8
float8_e4m3fn with one scale per output channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trtkit.engine.int4 import grouped_linear
from trtkit.engine.int8 import int8_linear
from trtkit.engine.matmul import linear, pack
from trtkit.engine.modelopt_awq import AwqReader
from trtkit.engine.paged_cache import torch_dtype
from trtkit.engine.ranks import RankReader
from trtkit.kernels.matmul import fp8_linear
from trtkit.spec.checkpoint import (
    FINAL_NORM,
    GROUP_SCALE,
    GROUP_ZERO,
    INPUT_ORDER,
    INPUT_SCALE,
    LM_HEAD,
    ROW_SCALE,
    VOCAB_EMBEDDING,
    layer_prefix,
)
from trtkit.spec.checkpoint_config import read_checkpoint_config
from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError, UnsupportedError
from trtkit.spec.model import ModelSpec
from trtkit.spec.quant import FP8_ROWWISE, INT4_GROUPS, INT8_ROWS, MODELOPT_AWQ, QuantSpec

TensorSource = Callable[[str], Tensor]
_RUNNABLE = (None, INT8_ROWS, FP8_ROWWISE, INT4_GROUPS, MODELOPT_AWQ)
_QUANTISED = {torch.int8: "INT8", torch.uint8: "INT4", torch.float8_e4m3fn: "FP8"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """`(x * input_scale) @ dequantised(weight).T (+ bias)`.

    `weight` [out, in] is quantised exactly when there is a `scale`: int8 with one in the compute type for each row, [out],
    or for each row and group of inputs, [out, groups]; uint8 [out, in / 2] (packed INT4, see `trtkit.kernels.int4`) with
    [out, groups]; float8_e4m3fn with [out] in fp32. Else it comes from `pack`. `zero` [out, groups] is the number that
    stands for 0, None where that is 0 itself; `input_scale` [in] is what AWQ multiplies activations with, None is 1,
    or [n, in] where n matrices lie below each other that want their own;
    `input_order` [in] names the activation for each column of the weight, None is the model's own order.
    """

    weight: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None
    zero: Tensor | None = None
    input_scale: Tensor | None = None
    input_order: Tensor | None = None

    def __call__(self, x_TI: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        if self.apart:
            return torch.cat([part(x_TI) for part in self.apart], dim=1)
        x_TI = self.scaled(x_TI)
        if self.scale is None:
            return linear(x_TI, self.weight, self.bias)
        if self.weight.dtype is torch.float8_e4m3fn:
            return fp8_linear(x_TI, self.weight, self.scale, self.bias)
        if self.scale.dim() == 2:
            y_TO = grouped_linear(x_TI, self.weight, self.scale, self.zero)
        else:
            y_TO = int8_linear(x_TI, self.weight, self.scale)
        return y_TO if self.bias is None else y_TO.add_(self.bias)

    @property
    def apart(self) -> tuple[Linear, ...]:
        """The matrices whose inputs are scaled differently, views of this one's rows; empty where all are alike."""
        if self.input_scale is None or self.input_scale.dim() == 1:
            return ()
        count = self.input_scale.shape[0]
        beside = ((None,) * count if t is None else t.chunk(count) for t in (self.scale, self.bias, self.zero))
        return tuple(
            Linear(weight=w, scale=s, bias=b, zero=z, input_scale=i, input_order=self.input_order)
            for w, s, b, z, i in zip(self.weight.chunk(count), *beside, self.input_scale, strict=True)
        )

    def scaled(self, x_TI: Tensor) -> Tensor:
        """Activations as the weight wants them."""
        if self.input_order is not None:
            x_TI = x_TI.index_select(1, self.input_order)
        return x_TI if self.input_scale is None else x_TI * self.input_scale

    def tensors(self) -> list[Tensor]:
        """What it holds in memory."""
        held = (self.weight, self.scale, self.bias, self.zero, self.input_scale, self.input_order)
        return [tensor for tensor in held if tensor is not None]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerWeights:
    """One decoder block."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    dense: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelWeights:
    """A whole model; `lm_head` is `embedding` where they are tied, else from `pack`."""

    model: ModelSpec
    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    lm_head: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """The type activations have."""
        return self.embedding.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes in memory; shared storage counts once."""
        tensors = [self.embedding, self.final_norm]
        if self.lm_head is not self.embedding:
            tensors.append(self.lm_head)
        for layer in self.layers:
            tensors += [layer.input_norm, layer.post_norm]
            tensors += [norm for norm in (layer.q_norm, layer.k_norm) if norm is not None]
            for matrix in (layer.qkv, layer.dense, layer.gate_up, layer.down):
                tensors += matrix.tensors()
        return sum(t.numel() * t.element_size() for t in tensors)


def load_weights(directory: Path, *, dtype: DType | None = None, device: str = "cpu") -> tuple[ModelWeights, QuantSpec]:
    """Read and merge a checkpoint directory; `dtype` replaces the compute type it was written in.

    Raises:
        InputError: a file or a tensor is missing, truncated, misshapen, or holds NaN or infinity.
        UnsupportedError: a quantisation the embedded engine does not run.
    """
    model, quant, parallel = read_checkpoint_config(directory)
    if quant.algo not in _RUNNABLE:
        raise UnsupportedError(
            f"{directory}: the embedded engine does not run quantisation {quant.algo}; it runs W8A16 (int8), W4A16 (int4), "
            "W4A16_AWQ (int4-awq) and FP8_PER_CHANNEL_PER_TOKEN (fp8-rowwise)"
        )
    awq = quant.algo == MODELOPT_AWQ
    opened = AwqReader(directory, model, quant, parallel) if awq else RankReader(directory, model, parallel)
    with opened as reader:
        return assemble(model, reader.tensor, reader.has, dtype=dtype or quant.compute, device=device), quant


def weights_from_tensors(
    model: ModelSpec, tensors: Mapping[str, Tensor], *, dtype: DType, device: str = "cpu"
) -> ModelWeights:
    """Weights from an unsplit checkpoint in memory."""

    def source(name: str) -> Tensor:
        if name not in tensors:
            raise InputError(f"model {model.name!r}: tensor {name} is missing")
        return tensors[name]

    return assemble(model, source, tensors.__contains__, dtype=dtype, device=device)


def assemble(
    model: ModelSpec, source: TensorSource, has: Callable[[str], bool], *, dtype: DType, device: str
) -> ModelWeights:
    """Fuse and place what `source` gives by name; `has` tells which names there are."""
    builder = _Builder(model, source, has, torch_dtype(dtype), device)
    embedding = builder.plain(VOCAB_EMBEDDING, (model.vocab_size, model.hidden_size))
    tied = model.tie_embeddings
    return ModelWeights(
        model=model,
        embedding=embedding,
        layers=tuple(builder.layer(index) for index in range(model.num_layers)),
        final_norm=builder.plain(FINAL_NORM, (model.hidden_size,)),
        lm_head=embedding if tied else pack(builder.plain(LM_HEAD, (model.vocab_size, model.hidden_size))),
    )


class _Builder:
    """Takes tensors by name, checks shape and values, converts, fuses."""

    def __init__(
        self, model: ModelSpec, source: TensorSource, has: Callable[[str], bool], dtype: torch.dtype, device: str
    ) -> None:
        self.model, self.source, self.has = model, source, has
        self.dtype, self.device = dtype, device

    def layer(self, index: int) -> LayerWeights:
        model, prefix = self.model, layer_prefix(index)
        hidden, inter, head_dim = model.hidden_size, model.intermediate_size, model.head_dim
        q_rows = model.num_heads * head_dim
        qkv_rows = q_rows + 2 * model.num_kv_heads * head_dim
        attention, mlp = f"{prefix}attention.", f"{prefix}mlp."
        return LayerWeights(
            input_norm=self.plain(f"{prefix}input_layernorm.weight", (hidden,)),
            qkv=self.linear([f"{attention}qkv"], qkv_rows, hidden, bias=model.attn_qkv_bias),
            q_norm=self.plain(f"{attention}q_layernorm.weight", (head_dim,)) if model.qk_norm else None,
            k_norm=self.plain(f"{attention}k_layernorm.weight", (head_dim,)) if model.qk_norm else None,
            dense=self.linear([f"{attention}dense"], hidden, q_rows, bias=model.attn_dense_bias),
            post_norm=self.plain(f"{prefix}post_layernorm.weight", (hidden,)),
            gate_up=self.linear([f"{mlp}fc", f"{mlp}gate"], inter, hidden, bias=model.mlp_bias),
            down=self.linear([f"{mlp}proj"], hidden, inter, bias=model.mlp_bias),
        )

    def plain(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        tensor = _checked(self.source(name), name, shape)
        if not tensor.is_floating_point():
            raise InputError(f"{name}: is {tensor.dtype}, expected a floating-point type")
        return tensor.to(device=self.device, dtype=dtype or self.dtype, copy=True).contiguous()

    def linear(self, names: list[str], rows: int, columns: int, *, bias: bool) -> Linear:
        parts = [self._matrix(f"{name}.weight", rows, columns) for name in names]
        stored = parts[0].dtype
        quantised = stored in _QUANTISED
        if any(part.dtype is not stored and (quantised or part.dtype in _QUANTISED) for part in parts):
            named = " and ".join(names)
            raise InputError(
                f"{named}: one is {_QUANTISED.get(stored) or _QUANTISED[parts[1].dtype]} and the other is not"
            )
        weight_type = stored if quantised else self.dtype
        scale, zero = self._scales(names, stored, rows, columns) if quantised else (None, None)
        return Linear(
            weight=pack(self._placed(parts, weight_type)),
            scale=scale,
            bias=self._joined(names, "bias", (rows,), self.dtype) if bias else None,
            zero=zero,
            input_scale=self._input_scale(names, columns) if quantised else None,
            input_order=self._input_order(names[0], columns) if quantised else None,
        )

    def _placed(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        """The parts below each other, copied to where they will lie: copies on the way would leave holes between weights."""
        rows = parts[0].shape[0]
        whole = torch.empty(rows * len(parts), *parts[0].shape[1:], dtype=dtype, device=self.device)
        for index, part in enumerate(parts):
            whole[index * rows : (index + 1) * rows].copy_(part)
        return whole

    def _matrix(self, name: str, rows: int, columns: int) -> Tensor:
        tensor = self.source(name)
        return _checked(tensor, name, (rows, columns // 2 if tensor.dtype is torch.uint8 else columns))

    def _scales(self, names: list[str], stored: torch.dtype, rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
        """Scales, and zero points where there are any."""
        if stored is torch.float8_e4m3fn:
            return self._joined(names, ROW_SCALE, (rows,), torch.float32), None
        if stored is torch.int8 and not self.has(f"{names[0]}.{GROUP_SCALE}"):
            return self._joined(names, ROW_SCALE, (rows,), self.dtype), None
        groups = self._num_groups(names[0], columns)
        scale = self._joined(names, GROUP_SCALE, (rows, groups), self.dtype)
        zeros = any(self.has(f"{name}.{GROUP_ZERO}") for name in names)
        return scale, self._joined(names, GROUP_ZERO, (rows, groups), self.dtype) if zeros else None

    def _num_groups(self, name: str, columns: int) -> int:
        shape = self.source(f"{name}.{GROUP_SCALE}").shape
        groups = shape[1] if len(shape) == 2 else 0
        if groups < 1 or columns % groups or columns // groups % 4:
            raise InputError(
                f"{name}.{GROUP_SCALE}: has shape {tuple(shape)}, which makes no groups of {columns} inputs"
            )
        return groups

    def _input_scale(self, names: list[str], columns: int) -> Tensor | None:
        """What the matrices' common input is multiplied with, [in], or [matrices, in] where that differs."""
        if not any(self.has(f"{name}.{INPUT_SCALE}") for name in names):
            return None
        first, *others = (self.plain(f"{name}.{INPUT_SCALE}", (columns,)) for name in names)
        return first if all(torch.equal(first, other) for other in others) else torch.stack([first, *others])

    def _input_order(self, name: str, columns: int) -> Tensor | None:
        if not self.has(f"{name}.{INPUT_ORDER}"):
            return None
        order = _checked(self.source(f"{name}.{INPUT_ORDER}"), f"{name}.{INPUT_ORDER}", (columns,))
        if order.dtype is not torch.int32 or not torch.equal(
            order.sort().values, torch.arange(columns, dtype=torch.int32)
        ):
            raise InputError(f"{name}.{INPUT_ORDER}: is no order of {columns} inputs; convert the checkpoint again")
        return order.to(device=self.device, copy=True)

    def _joined(self, names: list[str], what: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.cat([self.plain(f"{name}.{what}", shape, dtype) for name in names])


def _checked(tensor: Tensor, name: str, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise InputError(f"{name}: has shape {tuple(tensor.shape)}, the config asks for {shape}")
    if tensor.is_floating_point() and not _all_finite(tensor):
        raise InputError(f"{name}: holds NaN or infinity; the checkpoint is damaged, convert it again")
    return tensor


def _all_finite(tensor: Tensor) -> bool:
    if tensor.dtype is torch.float8_e4m3fn:  # its only NaN has all bits but the sign set, and it has no infinity
        return not bool(((tensor.view(torch.uint8) & 0x7F) == 0x7F).any())
    return bool(torch.isfinite(tensor).all())
