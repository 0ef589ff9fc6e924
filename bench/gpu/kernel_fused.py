"""The element-wise kernels between products, and the choice of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.kernel_bench import MAIN, Bench, Case, Other, Pairs, Work, num_bytes
from trtkit.kernels import fused, matmul, sampling

BOUND = 0.001
"""Two or three roundings to 16 bits."""
_FP8_BOUND = 0.04
_EPSILON = 1e-5
_POSITIONS = 8192


def norm(bench: Bench, tokens: int) -> None:
    """Residual addition and root-mean-square norm."""
    session, width = bench.session, bench.scale.hidden
    copies = _copies(bench, tokens * width * 2 * 3)
    deltas = [session.randn(tokens, width, dtype=MAIN, scale=0.01) for _ in range(copies)]
    residuals = [session.randn(tokens, width, dtype=MAIN) for _ in range(copies)]
    weight = session.randn(width, dtype=MAIN)
    out = torch.empty_like(deltas[0])

    def call(index: int) -> Tensor:
        return fused.add_rms_norm(deltas[index % copies], residuals[index % copies], weight, _EPSILON, out=out)

    def check() -> Pairs:
        residual = residuals[0].clone()
        expected = (residual + deltas[0]).double()
        normed = fused.add_rms_norm(deltas[0], residual, weight, _EPSILON)
        scale = torch.rsqrt(expected.square().mean(1, keepdim=True) + _EPSILON)
        return [(residual, expected), (normed, expected * scale * weight.double())]

    def torchs(index: int) -> Tensor:
        residual = residuals[index % copies].add_(deltas[index % copies])
        return F.rms_norm(residual, weight.shape, weight, _EPSILON)

    bench.measure(
        Case(
            family="fused", name="add and norm", shape={"T": tokens, "E": width}, dtype="fp16", call=call,
            check=check, bound=BOUND, copies=copies, work=Work(bytes_moved=4 * num_bytes(out) + num_bytes(weight)),
            other=Other(name="add_, F.rms_norm", call=torchs),
        )
    )  # fmt: skip


def activation(bench: Bench, tokens: int) -> None:
    """SiLU of the gate times up."""
    session, width = bench.session, bench.scale.intermediate
    copies = _copies(bench, tokens * width * 2 * 3)
    both = [session.randn(tokens, 2 * width, dtype=MAIN) for _ in range(copies)]
    out = torch.empty(tokens, width, dtype=MAIN, device=session.device)

    def check() -> Pairs:
        gate, up = both[0].double().chunk(2, dim=-1)
        return [(fused.silu_mul(both[0]), F.silu(gate) * up)]

    def torchs(index: int) -> Tensor:
        gate, up = both[index % copies].chunk(2, dim=-1)
        return F.silu(gate) * up

    bench.measure(
        Case(
            family="fused", name="SiLU times up", shape={"T": tokens, "I": width}, dtype="fp16",
            call=lambda index: fused.silu_mul(both[index % copies], out=out), check=check, bound=BOUND,
            copies=copies, work=Work(bytes_moved=3 * num_bytes(out)), other=Other(name="F.silu, mul", call=torchs),
        )
    )  # fmt: skip


def norm_fp8(bench: Bench, tokens: int) -> None:
    """Residual addition and norm, written as FP8 rows."""
    session, width = bench.session, bench.scale.hidden
    copies = _copies(bench, tokens * width * 5)
    deltas = [session.randn(tokens, width, dtype=torch.bfloat16, scale=0.01) for _ in range(copies)]
    residuals = [session.randn(tokens, width, dtype=torch.bfloat16) for _ in range(copies)]
    weight = session.randn(width, dtype=torch.bfloat16)

    def check() -> Pairs:
        residual = residuals[0].clone()
        wide = (residual + deltas[0]).double()
        quantised, scale = fused.add_rms_norm_fp8(deltas[0], residual, weight, _EPSILON)
        root = torch.rsqrt(wide.square().mean(1, keepdim=True) + _EPSILON)
        return [(quantised.float() * scale, wide * root * weight.double())]

    def apart(index: int) -> tuple[Tensor, Tensor]:
        at = index % copies
        return matmul.quantise_rows_fp8(fused.add_rms_norm(deltas[at], residuals[at], weight, _EPSILON))

    bench.measure(
        Case(
            family="fused", name="add and norm to fp8", shape={"T": tokens, "E": width}, dtype="bf16", check=check,
            call=lambda index: fused.add_rms_norm_fp8(
                deltas[index % copies], residuals[index % copies], weight, _EPSILON
            ),
            bound=_FP8_BOUND, copies=copies, work=Work(bytes_moved=tokens * (7 * width + 4) + num_bytes(weight)),
            other=Other(name="our norm, our quantising", call=apart),
        )
    )  # fmt: skip


def activation_fp8(bench: Bench, tokens: int) -> None:
    """SiLU of the gate times up, written as FP8 rows."""
    session, width = bench.session, bench.scale.intermediate
    copies = _copies(bench, tokens * width * 5)
    both = [session.randn(tokens, 2 * width, dtype=torch.bfloat16) for _ in range(copies)]

    def check() -> Pairs:
        gate, up = both[0].double().chunk(2, dim=-1)
        quantised, scale = fused.silu_mul_fp8(both[0])
        return [(quantised.float() * scale, F.silu(gate) * up)]

    bench.measure(
        Case(
            family="fused", name="SiLU times up to fp8", shape={"T": tokens, "I": width}, dtype="bf16", check=check,
            call=lambda index: fused.silu_mul_fp8(both[index % copies]), bound=_FP8_BOUND, copies=copies,
            work=Work(bytes_moved=tokens * (5 * width + 4)),
            other=Other(
                name="our SiLU, our quantising",
                call=lambda index: matmul.quantise_rows_fp8(fused.silu_mul(both[index % copies])),
            ),
        )
    )  # fmt: skip


def rotation(bench: Bench, tokens: int, *, fp8: bool = False) -> None:
    """Rotation, cache write and ring write of one layer; each token at its own place."""
    session, scale = bench.session, bench.scale
    heads, kv_heads, dim, size = scale.heads, scale.kv_heads, scale.dim, scale.block
    copies = _copies(bench, tokens * (2 * heads + 4 * kv_heads) * dim * 2)
    projections = [session.randn(tokens, heads + 2 * kv_heads, dim, dtype=MAIN) for _ in range(copies)]
    angles = session.randn(_POSITIONS, dim // 2)
    cos, sin = angles.cos().to(MAIN), angles.sin().to(MAIN)
    positions = session.randint(0, _POSITIONS, (tokens,))
    blocks = -(-tokens // size)
    kind = torch.float8_e4m3fn if fp8 else MAIN
    cache = torch.zeros(blocks, 2, kv_heads, size, dim, dtype=kind, device=session.device)
    order = torch.randperm(blocks, device=session.device, generator=session.generator)
    tables, rows = order.to(torch.int32)[None].contiguous(), torch.zeros_like(positions)
    slots = torch.arange(tokens, dtype=torch.int32, device=session.device)
    out = torch.empty(tokens, heads, dim, dtype=MAIN, device=session.device)

    def call(index: int) -> Tensor:
        return fused.rope_write(
            projections[index % copies], positions, cos, sin, cache, tables, rows, slots, num_heads=heads, q_out=out
        )

    def check() -> Pairs:
        call(0)
        wide, at = projections[0].double(), positions.to(torch.int64)
        rotated = turned(wide[:, :-kv_heads], cos[at, None].double(), sin[at, None].double())
        where = (order[slots.to(torch.int64) // size], slots.to(torch.int64) % size)
        stored = cache.float().transpose(1, 3)[where]  # [T, H, 2, D]
        expected = torch.stack((rotated[:, heads:], wide[:, -kv_heads:]), dim=2)
        return [(out, rotated[:, :heads]), (stored, expected)]

    def torchs(index: int) -> Tensor:
        qkv, at = projections[index % copies], positions.to(torch.int64)
        rotated = turned(qkv[:, :-kv_heads], cos[at, None], sin[at, None])
        block, slot = tables[0, slots // size].to(torch.int64), (slots % size).to(torch.int64)
        both = torch.stack((rotated[:, heads:], qkv[:, -kv_heads:]), dim=1)
        cache.view(both.dtype)[block, :, :, slot] = both
        return rotated[:, :heads]

    moved = num_bytes(projections[0], out) + tokens * (2 * kv_heads * dim * cache.element_size() + 2 * dim + 12)
    bench.measure(
        Case(
            family="fused", name="rotate and write cache", dtype="fp8" if fp8 else "fp16",
            shape={"T": tokens, "Hq": heads, "H": kv_heads, "D": dim}, call=call, check=check,
            bound=_FP8_BOUND if fp8 else BOUND, copies=copies, work=Work(bytes_moved=moved),
            other=None if fp8 else Other(name="index, mul, cat, index_put", call=torchs),
        )
    )  # fmt: skip


def embedding(bench: Bench, tokens: int) -> None:
    """Rows of the embedding table."""
    session, scale = bench.session, bench.scale
    table = session.randn(scale.vocab, scale.hidden, dtype=MAIN)
    ids = session.randint(0, scale.vocab, (tokens,))
    out = torch.empty(tokens, scale.hidden, dtype=MAIN, device=session.device)
    bench.measure(
        Case(
            family="fused", name="embedding", shape={"T": tokens, "E": scale.hidden}, dtype="fp16",
            call=lambda _: fused.embed(ids, table, out=out),
            check=lambda: [(fused.embed(ids, table), table[ids.to(torch.int64)])], bound=0.0,
            reference="indexing, exact", work=Work(bytes_moved=2 * num_bytes(out) + num_bytes(ids)),
            other=Other(name="F.embedding", call=lambda _: F.embedding(ids, table)),
        )
    )  # fmt: skip


def greedy(bench: Bench, rows: int) -> None:
    """The largest logit of each row."""
    session, vocab = bench.session, bench.scale.vocab
    copies = _copies(bench, rows * vocab * 2)
    logits = [session.randn(rows, vocab, dtype=MAIN) for _ in range(copies)]
    out = torch.empty(rows, dtype=torch.int32, device=session.device)
    workspace = torch.empty(sampling.workspace_size(rows, vocab), dtype=torch.int64, device=session.device)

    def check() -> Pairs:
        chosen = sampling.greedy(logits[0]).to(torch.int64)
        highest = logits[0].max(1).values
        first = (logits[0] == highest[:, None]).to(torch.int8).argmax(1)
        return [(chosen, first)]

    bench.measure(
        Case(
            family="sampling", name="greedy", shape={"R": rows, "V": vocab}, dtype="fp16",
            call=lambda index: sampling.greedy(logits[index % copies], out=out, workspace=workspace), check=check,
            bound=0.0, copies=copies, reference="first of the largest, exact", work=Work(bytes_moved=rows * vocab * 2),
            other=Other(name="torch.argmax", call=lambda index: torch.argmax(logits[index % copies], dim=-1)),
            note="torch's tells no NaN from a number",
        )
    )  # fmt: skip


def drawing(bench: Bench, rows: int) -> None:
    """A token drawn for each row among its 50 likeliest; the check draws row by row in float64."""
    session, vocab = bench.session, bench.scale.vocab
    logits = session.randn(rows, vocab, dtype=MAIN, scale=3.0)
    temperature = torch.full((rows,), 0.8, dtype=torch.float64, device=session.device)
    top_k = torch.full((rows,), 50, dtype=torch.int32, device=session.device)
    top_p = torch.full((rows,), 0.9, dtype=torch.float64, device=session.device)
    uniform = torch.rand(rows, dtype=torch.float64, device=session.device, generator=session.generator)

    def call(_: int) -> Tensor:
        return sampling.sample_rows(logits, temperature, top_k, top_p, uniform)

    def check() -> Pairs:
        expected = [_drawn(row, float(u)) for row, u in zip(logits, uniform, strict=True)]
        return [(call(0), torch.tensor(expected, device=session.device))]

    bench.measure(
        Case(
            family="sampling", name="sampling, top-k and top-p", shape={"R": rows, "V": vocab}, dtype="fp16",
            call=call, check=check, bound=0.0, reference="row by row, exact",
            work=Work(bytes_moved=num_bytes(logits)), other=Other(
                name="sort, softmax, cumsum in float64",
                call=lambda _: sampling.sample_twin(logits, temperature, top_k, top_p, uniform),
            ),
        )
    )  # fmt: skip


def _drawn(logits_V: Tensor, u: float) -> int:
    ranked = logits_V.double().sort(descending=True, stable=True)
    cumulative = (ranked.values[:50] / 0.8).softmax(0).cumsum(0)
    kept = cumulative[: int((cumulative < 0.9).sum()) + 1]
    return int(ranked.indices[min(int((kept <= u * kept[-1]).sum()), len(kept) - 1)])


def turned(x_THD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation, written plainly."""
    first, second = x_THD.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _copies(bench: Bench, bytes_each: int) -> int:
    """Few tokens find their inputs in the L2 cache in a real step too, so only large inputs rotate."""
    return bench.session.copies(bytes_each) if bytes_each > bench.session.l2_bytes // 4 else 1
