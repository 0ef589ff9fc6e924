"""A TensorRT-LLM checkpoint as matrices ready to multiply: ranks merged, q|k|v and gate|up fused.

Names and split are `trtkit.spec.checkpoint`'s. TensorRT-LLM's `mlp.fc` is the gated (SiLU) half and `mlp.gate` the
other. INT8 stays int8 and FP8 float8_e4m3fn, each with one scale per output channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trtkit.engine.int8 import int8_linear
from trtkit.engine.matmul import linear, pack
from trtkit.engine.paged_cache import torch_dtype
from trtkit.engine.ranks import RankReader
from trtkit.kernels.matmul import fp8_linear
from trtkit.spec.checkpoint import FINAL_NORM, LM_HEAD, VOCAB_EMBEDDING, layer_prefix
from trtkit.spec.checkpoint_config import read_checkpoint_config
from trtkit.spec.dtype import DType
from trtkit.spec.errors import InputError, UnsupportedError
from trtkit.spec.model import ModelSpec
from trtkit.spec.quant import QuantSpec

TensorSource = Callable[[str], Tensor]
_RUNNABLE = (None, "W8A16", "FP8_PER_CHANNEL_PER_TOKEN")
_QUANTISED = {torch.int8: "INT8", torch.float8_e4m3fn: "FP8"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """`x @ weight.T (* scale) (+ bias)`.

    `weight` [out, in] is int8 or float8_e4m3fn exactly when there is a `scale` [out], in the compute type for int8 and
    fp32 for FP8; else it comes from `pack`.
    """

    weight: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None

    def __call__(self, x_TI: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        if self.scale is None:
            return linear(x_TI, self.weight, self.bias)
        if self.weight.dtype is torch.float8_e4m3fn:
            return fp8_linear(x_TI, self.weight, self.scale, self.bias)
        y_TO = int8_linear(x_TI, self.weight, self.scale)
        return y_TO if self.bias is None else y_TO.add_(self.bias)

    def tensors(self) -> list[Tensor]:
        """What it holds in memory."""
        return [t for t in (self.weight, self.scale, self.bias) if t is not None]


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
            f"{directory}: the embedded engine does not run quantisation {quant.algo}; it runs W8A16 (int8) and "
            "FP8_PER_CHANNEL_PER_TOKEN (fp8-rowwise)"
        )
    with RankReader(directory, model, parallel) as reader:
        return assemble(model, reader.tensor, dtype=dtype or quant.compute, device=device), quant


def weights_from_tensors(
    model: ModelSpec, tensors: Mapping[str, Tensor], *, dtype: DType, device: str = "cpu"
) -> ModelWeights:
    """Weights from an unsplit checkpoint in memory."""

    def source(name: str) -> Tensor:
        if name not in tensors:
            raise InputError(f"model {model.name!r}: tensor {name} is missing")
        return tensors[name]

    return assemble(model, source, dtype=dtype, device=device)


def assemble(model: ModelSpec, source: TensorSource, *, dtype: DType, device: str) -> ModelWeights:
    """Fuse and place what `source` gives by name."""
    builder = _Builder(model, source, torch_dtype(dtype), device)
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

    def __init__(self, model: ModelSpec, source: TensorSource, dtype: torch.dtype, device: str) -> None:
        self.model, self.source, self.dtype, self.device = model, source, dtype, device

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
        tensor = self._checked(name, shape)
        if not tensor.is_floating_point():
            raise InputError(f"{name}: is {tensor.dtype}, expected a floating-point type")
        return tensor.to(device=self.device, dtype=dtype or self.dtype, copy=True).contiguous()

    def linear(self, names: list[str], rows: int, columns: int, *, bias: bool) -> Linear:
        parts = [self._checked(f"{name}.weight", (rows, columns)) for name in names]
        stored = parts[0].dtype
        quantised = stored in _QUANTISED
        if any(part.dtype is not stored and (quantised or part.dtype in _QUANTISED) for part in parts):
            named = " and ".join(names)
            raise InputError(
                f"{named}: one is {_QUANTISED.get(stored) or _QUANTISED[parts[1].dtype]} and the other is not"
            )
        weight_type = stored if quantised else self.dtype
        scale_type = torch.float32 if stored is torch.float8_e4m3fn else self.dtype
        scale_names = [f"{name}.per_channel_scale" for name in names]
        return Linear(
            weight=pack(torch.cat([part.to(device=self.device, dtype=weight_type) for part in parts])),
            scale=self._rows(scale_names, rows, scale_type) if quantised else None,
            bias=self._rows([f"{name}.bias" for name in names], rows, self.dtype) if bias else None,
        )

    def _rows(self, names: list[str], rows: int, dtype: torch.dtype) -> Tensor:
        return torch.cat([self.plain(name, (rows,), dtype) for name in names])

    def _checked(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.source(name)
        if tuple(tensor.shape) != shape:
            raise InputError(f"{name}: has shape {tuple(tensor.shape)}, the config asks for {shape}")
        if tensor.is_floating_point() and not _all_finite(tensor):
            raise InputError(f"{name}: holds NaN or infinity; the checkpoint is damaged, convert it again")
        return tensor


def _all_finite(tensor: Tensor) -> bool:
    if tensor.dtype is torch.float8_e4m3fn:  # its only NaN has all bits but the sign set, and it has no infinity
        return not bool(((tensor.view(torch.uint8) & 0x7F) == 0x7F).any())
    return bool(torch.isfinite(tensor).all())
