"""One decoder layer as decode runs it: nine kernels in one graph, so that what lies between them is in the time too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu import kernel_products
from bench.gpu.kernel_attention import batches, dense_attention, workspace
from bench.gpu.kernel_bench import COMPUTE, Bench, Case, Pairs, Work, num_bytes
from bench.gpu.kernel_fused import turned
from trtkit.kernels import fused, matmul, paged

BOUNDS = {"int8": 0.005, "fp8": 0.02, "bf16": 0.02}
"""Nine kernels' roundings to 16 bits, one after the other."""
_EPSILON = 1e-5
_POSITIONS = 8192
Weights = dict[str, tuple[Tensor, Tensor | None]]


def decode_layer(bench: Bench, kind: str, rows: int, context: int) -> None:
    """Norm, projection, rotation, attention, projection, norm, MLP for one token of `rows` sequences."""
    session, scale = bench.session, bench.scale
    shapes = {name: shape for name, shape in scale.matrices.items() if name != "lm_head"}
    compute, item = COMPUTE[kind], 1 if kind in ("int8", "fp8") else 2
    copies = session.copies(sum(outputs * inputs for outputs, inputs in shapes.values()) * item)
    weights: list[Weights] = [
        {name: kernel_products.weight(bench, kind, *shape) for name, shape in shapes.items()} for _ in range(copies)
    ]
    # Sequences end one slot before their blocks do: the new token's key and value go there.
    paged_batches = batches(bench, "bf16" if kind in ("fp8", "bf16") else "fp16", copies, [context] * rows)
    norms = [session.randn(scale.hidden, dtype=compute) for _ in range(2)]
    angles = session.randn(_POSITIONS, scale.dim // 2)
    cos, sin = angles.cos().to(compute), angles.sin().to(compute)
    positions = session.randint(0, _POSITIONS, (rows,))
    slots = torch.full((rows,), context - 1, dtype=torch.int32, device=session.device)
    scratch = workspace(bench, rows)
    start = session.randn(rows, scale.hidden, dtype=compute)
    delta = session.randn(rows, scale.hidden, dtype=compute, scale=0.1)

    def run(index: int, residual: Tensor) -> Tensor:
        matrices, batch = weights[index % copies], paged_batches[index % copies]
        hidden = fused.add_rms_norm(delta, residual, norms[0], _EPSILON)
        qkv = matmul.linear(hidden, *matrices["qkv"]).view(rows, -1, scale.dim)
        queries = fused.rope_write(
            qkv, positions, cos, sin, batch.cache, batch.blocks_BM, None, slots, num_heads=scale.heads
        )
        attended, _ = paged.paged_decode_attention(queries, batch, workspace=scratch)
        hidden = fused.add_rms_norm(
            matmul.linear(attended.view(rows, -1), *matrices["dense"]), residual, norms[1], _EPSILON
        )
        return matmul.linear(fused.silu_mul(matmul.linear(hidden, *matrices["gate_up"])), *matrices["down"])

    residual = start.clone()

    def check() -> Pairs:
        mine = start.clone()
        result = run(0, mine)
        matrices, batch = weights[0], paged_batches[0]

        def product(x: Tensor, name: str) -> Tensor:
            return kernel_products.reference(x, *matrices[name])

        wide = start.double() + delta.double()
        qkv = product(_normed(wide, norms[0]), "qkv").view(rows, -1, scale.dim)
        at = positions.to(torch.int64)
        queries = turned(qkv[:, : scale.heads], cos[at, None].double(), sin[at, None].double())
        # The new key and value are read back from the cache, where they were rounded.
        found = [dense_attention(queries[row : row + 1], batch, row, context - 1)[0] for row in range(rows)]
        wide = wide + product(torch.cat(found).view(rows, -1), "dense")
        gate, up = product(_normed(wide, norms[1]), "gate_up").chunk(2, dim=-1)
        return [(mine, wide), (result, product(F.silu(gate) * up, "down"))]

    pool = rows * context * 2 * scale.kv_heads * scale.dim * 2
    held = sum(num_bytes(*(part for part in pair if part is not None)) for pair in weights[0].values())
    multiplied = sum(outputs * inputs for outputs, inputs in shapes.values())
    bench.measure(
        Case(
            family="matmul", name=f"decode layer, {kind}", dtype=kind, shape={"B": rows, "N": context},
            call=lambda index: run(index, residual), check=check, copies=copies, bound=BOUNDS[kind],
            work=Work(
                bytes_moved=held + pool,
                flops=2.0 * rows * multiplied + 4.0 * rows * context * scale.heads * scale.dim,
            ),
            note="nine kernels and what lies between them; intermediate results are not counted as bytes",
        )
    )  # fmt: skip


def _normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + _EPSILON) * weight.double()
