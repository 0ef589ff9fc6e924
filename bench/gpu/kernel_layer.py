"""One decoder layer as the engine runs it, kernel after kernel, so that what lies between them counts too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import kernel_products
from bench.gpu.kernel_attention import batches, dense_attention, workspace
from bench.gpu.kernel_bench import COMPUTE, Bench, Case, Pairs, Work, num_bytes
from bench.gpu.kernel_fused import turned
from trtkit.engine.device.model import Fp8Rows, product
from trtkit.engine.weights import Linear
from trtkit.kernels import fused, matmul, paged
from trtkit.spec.dtype import DType

BOUNDS = {"int4": 0.005, "int8": 0.005, "fp8": 0.02, "bf16": 0.02}
"""Nine kernels' roundings to 16 bits, one after the other."""

FP8_ACTIVATIONS_BOUND = 0.12
"""Four products whose activations are off by up to 1/16 each."""
_EPSILON = 1e-5
_POSITIONS = 8192
Pair = tuple[Tensor, Tensor | None]
Weights = dict[str, Pair]
Attention = Callable[[Tensor, paged.PagedBatch], Tensor]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Inputs of one layer for T tokens, each with its slot in one of the batch's sequences."""

    bench: Bench
    kind: str
    weights: list[Weights]
    pools: list[paged.PagedBatch]
    norms: list[Tensor]
    cos: Tensor
    sin: Tensor
    positions: Tensor
    rows: Tensor | None
    slots: Tensor
    start: Tensor
    delta: Tensor
    attend: Attention

    def run(self, index: int, residual: Tensor) -> Tensor:
        """What is to be added to `residual` after it, [T, E]; `residual` is changed as in a step."""
        matrices, batch = self.weights[index % len(self.weights)], self.pools[index % len(self.pools)]
        tokens, scale = residual.shape[0], self.bench.scale
        hidden = _normed(self.delta, residual, self.norms[0], matrices["qkv"])
        qkv = _product(hidden, matrices["qkv"]).view(tokens, -1, scale.dim)
        queries = fused.rope_write(
            qkv, self.positions, self.cos, self.sin, batch.cache, batch.blocks_BM, self.rows, self.slots,
            num_heads=scale.heads,
        )  # fmt: skip
        attended = self.attend(queries, batch).view(tokens, -1)
        hidden = _normed(_product(attended, matrices["dense"]), residual, self.norms[1], matrices["gate_up"])
        return _product(_activated(_product(hidden, matrices["gate_up"]), matrices["down"]), matrices["down"])

    def check(self, cached: list[tuple[slice, int, int]]) -> Pairs:
        """Against float64: `cached` has each sequence's tokens, its row and how many slots lay before them."""
        residual = self.start.clone()
        result = self.run(0, residual)
        matrices, batch, scale = self.weights[0], self.pools[0], self.bench.scale
        wide = self.start.double() + self.delta.double()
        qkv = kernel_products.reference(_wide_norm(wide, self.norms[0]), *matrices["qkv"])
        at = self.positions.to(torch.int64)
        queries = qkv.view(len(at), -1, scale.dim)[:, : scale.heads]
        queries = turned(queries, self.cos[at, None].double(), self.sin[at, None].double())
        # New keys and values are read back from the cache, where they were rounded.
        found = [dense_attention(queries[tokens], batch, row, before)[0] for tokens, row, before in cached]
        wide = wide + kernel_products.reference(torch.cat(found).flatten(1), *matrices["dense"])
        gate, up = kernel_products.reference(_wide_norm(wide, self.norms[1]), *matrices["gate_up"]).chunk(2, dim=-1)
        return [(residual, wide), (result, kernel_products.reference(F.silu(gate) * up, *matrices["down"]))]


def decode_layer(bench: Bench, kind: str, rows: int, context: int) -> None:
    """One token of each of `rows` sequences; the newest lies in the last slot of `context`."""
    scratch = workspace(bench, rows)

    def attend(queries: Tensor, batch: paged.PagedBatch) -> Tensor:
        return paged.paged_decode_attention(queries, batch, workspace=scratch)[0]

    layer = _layer(bench, kind, rows, [context] * rows, attend)
    slots = torch.full((rows,), context - 1, dtype=torch.int32, device=bench.session.device)
    layer = replace(layer, slots=slots)
    cached = [(slice(row, row + 1), row, context - 1) for row in range(rows)]
    _measure(layer, f"decode layer, {kind}", {"B": rows, "N": context}, cached, pairs=rows * context)


def prefill_layer(bench: Bench, kind: str, tokens: int) -> None:
    """A prompt of so many tokens from its beginning."""
    device = bench.session.device
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    before = torch.zeros(1, dtype=torch.int32, device=device)

    def attend(queries: Tensor, batch: paged.PagedBatch) -> Tensor:
        return paged.paged_prefill_attention(queries, starts, before, batch, max_count=tokens)[0]

    layer = _layer(bench, kind, tokens, [tokens], attend)
    slots = torch.arange(tokens, dtype=torch.int32, device=device)
    layer = replace(layer, slots=slots, rows=torch.zeros_like(slots))
    pairs = tokens * (tokens + 1) // 2
    _measure(layer, f"prefill layer, {kind}", {"T": tokens}, [(slice(0, tokens), 0, 0)], pairs=pairs)


def _layer(bench: Bench, kind: str, tokens: int, lengths: list[int], attend: Attention) -> Layer:
    session, scale, compute = bench.session, bench.scale, COMPUTE[kind]
    shapes = {name: shape for name, shape in scale.matrices.items() if name != "lm_head"}
    item = kernel_products.WEIGHT_BYTES[kind]
    copies = session.copies(int(item * sum(outputs * inputs for outputs, inputs in shapes.values())))
    angles = session.randn(_POSITIONS, scale.dim // 2)
    positions = session.randint(0, _POSITIONS, (tokens,))
    return Layer(
        bench=bench,
        kind=kind,
        weights=[{n: kernel_products.weight(bench, kind, *s) for n, s in shapes.items()} for _ in range(copies)],
        pools=batches(bench, "fp16" if compute is torch.float16 else "bf16", copies, lengths),
        norms=[session.randn(scale.hidden, dtype=compute) for _ in range(2)],
        cos=angles.cos().to(compute),
        sin=angles.sin().to(compute),
        positions=positions,
        rows=None,
        slots=positions,
        start=session.randn(tokens, scale.hidden, dtype=compute),
        delta=session.randn(tokens, scale.hidden, dtype=compute, scale=0.1),
        attend=attend,
    )


def _measure(
    layer: Layer, name: str, shape: dict[str, int], cached: list[tuple[slice, int, int]], *, pairs: int
) -> None:
    bench, tokens = layer.bench, layer.start.shape[0]
    scale, kind, residual = bench.scale, layer.kind, layer.start.clone()
    quantises = kind == "fp8" and tokens > matmul.DECODE_ROWS
    matrices = layer.weights[0].values()
    shapes = [shape for matrix, shape in scale.matrices.items() if matrix != "lm_head"]
    attention = 4.0 * pairs * scale.heads * scale.dim
    held = sum(num_bytes(*(part for part in pair if part is not None)) for pair in matrices)
    slots = sum(before + tokens_of.stop - tokens_of.start for tokens_of, _, before in cached)
    bench.measure(
        Case(
            family="matmul", name=name, dtype=kind, shape=shape, copies=len(layer.weights),
            call=lambda index: layer.run(index, residual), check=lambda: layer.check(cached),
            bound=FP8_ACTIVATIONS_BOUND if quantises else BOUNDS[kind],
            work=Work(
                bytes_moved=held + slots * 2 * scale.kv_heads * scale.dim * 2,
                flops=2.0 * tokens * sum(outputs * inputs for outputs, inputs in shapes) + attention,
                wide_flops=attention,
                operands=DType.FP8 if quantises else DType.BF16,
            ),
            note=f"{10 if quantises else 9} kernels and what lies between them; intermediate results are not counted as bytes",
        )
    )  # fmt: skip


def _product(x: Tensor | Fp8Rows, pair: Pair) -> Tensor:
    return product(Linear(weight=pair[0], scale=pair[1]), x)


def _normed(delta: Tensor, residual: Tensor, norm: Tensor, into: Pair) -> Tensor | Fp8Rows:
    """The norm as the device path runs it: FP8 rows where the product takes them."""
    if not matmul.multiplies_fp8(residual.shape[0], into[0]):
        return fused.add_rms_norm(delta, residual, norm, _EPSILON)
    rows, scale = fused.add_rms_norm_fp8(delta, residual, norm, _EPSILON)
    return Fp8Rows(rows_TI=rows, scale_T1=scale, dtype=residual.dtype)


def _activated(gate_up: Tensor, into: Pair) -> Tensor | Fp8Rows:
    """The activation as the device path runs it."""
    if not matmul.multiplies_fp8(gate_up.shape[0], into[0]):
        return fused.silu_mul(gate_up)
    rows, scale = fused.silu_mul_fp8(gate_up)
    return Fp8Rows(rows_TI=rows, scale_T1=scale, dtype=gate_up.dtype)


def _wide_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + _EPSILON) * weight.double()
