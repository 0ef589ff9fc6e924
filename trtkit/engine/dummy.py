"""Random weights of a model's true shape, made where they will lie: no checkpoint, no copy, seconds instead of minutes.

Speed and memory are those of real weights; text is not. Values are normal, as trained weights nearly are, because what a
GPU draws and so its clock depend on the bits. Scales keep every matrix's output at the size of its input, so hidden
states stay finite through any number of layers and logits differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trtkit.engine.matmul import pack
from trtkit.engine.paged_cache import torch_dtype
from trtkit.engine.weights import LayerWeights, Linear, ModelWeights
from trtkit.spec.checkpoint import with_groups
from trtkit.spec.dtype import DType
from trtkit.spec.errors import UnsupportedError
from trtkit.spec.model import ModelSpec
from trtkit.spec.quant import INT4_GROUPS, QuantSpec

_CHUNK_ELEMENTS = 1 << 26
_PEAK_SIGMAS = 4.5
"""The largest of a few thousand normal numbers, in standard deviations: what a row's scale is made for."""
_INT4_SIGMA = 2.6
"""The largest of a group of 128 normal numbers is about 2.7 standard deviations, and becomes 7."""
_LARGEST = {DType.INT8: 127.0, DType.FP8: 448.0}
_PLAIN = (DType.FP32, DType.FP16, DType.BF16)


def dummy_weights(model: ModelSpec, quant: QuantSpec, *, device: str = "cpu", seed: int = 0) -> ModelWeights:
    """Weights in the engine's fused shapes; peak memory is the weights and one chunk of 256 MiB.

    Raises:
        UnsupportedError: a precision that the embedded engine does not run.
    """
    quant = quant.embedded
    runs = quant.weights in _PLAIN if quant.algo is None else quant.weights in _LARGEST or quant.algo == INT4_GROUPS
    if not runs or (quant.group_size and not quant.is_grouped):
        raise UnsupportedError(
            f"random weights in precision {quant.precision!r}: the embedded engine runs fp32, fp16, bf16, int8, int8-gptq, "
            "int4 and fp8-rowwise"
        )
    return _Maker(model, with_groups(model, quant), device, seed).model_weights()


class _Maker:
    """Draws one tensor after the other from one generator."""

    def __init__(self, model: ModelSpec, quant: QuantSpec, device: str, seed: int) -> None:
        self.model, self.quant, self.device = model, quant, device
        self.dtype = torch_dtype(quant.compute)
        self.generator = torch.Generator(device=device).manual_seed(seed)
        self._chunk: Tensor = torch.empty(0, device=device)

    def model_weights(self) -> ModelWeights:
        model = self.model
        vocabulary = (model.vocab_size, model.hidden_size)
        embedding = self.normal(vocabulary, self.dtype, lambda part: part)
        head = embedding if model.tie_embeddings else pack(self.plain_matrix(vocabulary))
        return ModelWeights(
            model=model,
            embedding=embedding,
            layers=tuple(self.layer() for _ in range(model.num_layers)),
            final_norm=self.ones(model.hidden_size),
            lm_head=head,
        )

    def layer(self) -> LayerWeights:
        model = self.model
        hidden, inter, dim = model.hidden_size, model.intermediate_size, model.head_dim
        q_rows, kv_rows = model.num_heads * dim, model.num_kv_heads * dim
        return LayerWeights(
            input_norm=self.ones(hidden),
            qkv=self.linear(q_rows + 2 * kv_rows, hidden, bias=model.attn_qkv_bias),
            q_norm=self.ones(dim) if model.qk_norm else None,
            k_norm=self.ones(dim) if model.qk_norm else None,
            dense=self.linear(hidden, q_rows, bias=model.attn_dense_bias),
            post_norm=self.ones(hidden),
            gate_up=self.linear(2 * inter, hidden, bias=model.mlp_bias),
            down=self.linear(hidden, inter, bias=model.mlp_bias),
        )

    def linear(self, rows: int, columns: int, *, bias: bool) -> Linear:
        bias_O = self.normal((rows,), self.dtype, lambda part: part * 0.02) if bias else None
        if self.quant.weights is DType.INT4:
            scale = self._scale(rows, columns, (_INT4_SIGMA**2 + 1 / 12) ** 0.5, self.dtype)
            return Linear(weight=self.packed(rows, columns), scale=scale, bias=bias_O)
        largest = _LARGEST.get(self.quant.weights)
        if largest is None:
            return Linear(weight=pack(self.plain_matrix((rows, columns))), bias=bias_O)
        sigma = largest / _PEAK_SIGMAS
        is_int8 = self.quant.weights is DType.INT8

        def stored(part: Tensor) -> Tensor:
            scaled = part.mul_(sigma).clamp_(-largest, largest)
            return scaled.round_() if is_int8 else scaled

        weight = self.normal((rows, columns), torch_dtype(self.quant.weights), stored)
        scale = self._scale(rows, columns, sigma, self.dtype if is_int8 else torch.float32)
        return Linear(weight=weight, scale=scale, bias=bias_O)

    def _scale(self, rows: int, columns: int, sigma: float, dtype: torch.dtype) -> Tensor:
        """What brings numbers with that standard deviation to where unit inputs give unit outputs."""
        group = self.quant.group_size
        shape = (rows, columns // group) if group else (rows,)
        return torch.full(shape, 1 / (sigma * columns**0.5), dtype=dtype, device=self.device)

    def packed(self, rows: int, columns: int) -> Tensor:
        """INT4, two to a byte: any two normal numbers, so the order within a group does not matter here."""
        step = max(1, min(rows, _CHUNK_ELEMENTS // columns))
        drawn = self._chunk_of(step * columns)
        result = torch.empty(rows, columns // 2, dtype=torch.uint8, device=self.device)
        for start in range(0, rows, step):
            target = result[start : start + step]
            part = drawn[: 2 * target.numel()].normal_(generator=self.generator)
            nibbles = part.mul_(_INT4_SIGMA).round_().clamp_(-8, 7).add_(8).view(2, *target.shape)
            target.copy_(nibbles[0].add_(nibbles[1], alpha=16))
        return result

    def plain_matrix(self, shape: tuple[int, int]) -> Tensor:
        return self.normal(shape, self.dtype, lambda part: part.mul_(shape[1] ** -0.5))

    def normal(self, shape: tuple[int, ...], dtype: torch.dtype, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Standard normal numbers, `change`d in fp32, as `dtype`; a chunk of rows at a time."""
        columns = math.prod(shape[1:])
        rows = max(1, min(shape[0], _CHUNK_ELEMENTS // max(1, columns)))
        drawn = self._chunk_of(rows * columns)
        result = torch.empty(shape, dtype=dtype, device=self.device)
        for start in range(0, shape[0], rows):
            target = result[start : start + rows]
            target.copy_(change(drawn[: target.numel()].normal_(generator=self.generator).view(target.shape)))
        return result

    def _chunk_of(self, count: int) -> Tensor:
        """Always the same memory for what is drawn.

        Chunks that come and go leave holes between the weights: on a GPU, by the rules of torch's allocator, 4.7 GiB of
        them in an INT8 model of 70B (modeled), half of what is left for the cache.
        """
        if self._chunk.numel() < count:
            self._chunk = torch.empty(count, device=self.device)
        return self._chunk[:count]

    def ones(self, count: int) -> Tensor:
        return torch.ones(count, dtype=self.dtype, device=self.device)
