"""Matrix products at the shapes of one layer: weights of 4, 8 and 16 bits, few tokens and many."""

from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.kernel_bench import COMPUTE, Bench, Case, Other, Pairs, Work, num_bytes
from trtkit.kernels import int4, matmul
from trtkit.spec.dtype import DType

BOUNDS = {"bf16": 0.005, "fp16": 0.002, "int4": 0.002, "int8": 0.002, "fp8": 0.006}
WEIGHT_BYTES = {"int4": 0.5, "int8": 1.0, "fp8": 1.0, "fp16": 2.0, "bf16": 2.0}
FP8_ACTIVATIONS_BOUND = 0.06
"""Three bits of mantissa: each activation is off by up to 1/16."""
_CHANNELS_AT_ONCE = 8192


def product(bench: Bench, kind: str, name: str, tokens: int) -> None:
    """One matrix with weights of `kind` (a name in `WEIGHT_BYTES`) for so many tokens."""
    session, (outputs, inputs) = bench.session, bench.scale.matrices[name]
    compute = COMPUTE[kind]
    copies = session.copies(int(outputs * inputs * WEIGHT_BYTES[kind]))
    weights = [weight(bench, kind, outputs, inputs) for _ in range(copies)]
    x_TI = session.randn(tokens, inputs, dtype=compute)
    quantises = kind == "fp8" and tokens > matmul.DECODE_ROWS
    run = matmul.fp8_linear if kind == "fp8" else matmul.linear
    out = torch.empty(tokens, outputs, dtype=compute, device=session.device)

    def call(index: int) -> Tensor:
        weight_OI, scale_O = weights[index % copies]
        return run(x_TI, weight_OI, scale_O, out=out)

    def check() -> Pairs:
        return [(call(0), reference(x_TI, *weights[0]))]

    weight_OI, scale_O = weights[0]
    moved = num_bytes(weight_OI, x_TI, out) + (0 if scale_O is None else num_bytes(scale_O))
    bench.measure(
        Case(
            family="matmul", name=f"{kind} {name}", shape={"T": tokens, "O": outputs, "I": inputs},
            dtype=kind, call=call, check=check, copies=copies,
            bound=FP8_ACTIVATIONS_BOUND if quantises else BOUNDS[kind],
            work=Work(
                bytes_moved=moved, flops=2.0 * tokens * outputs * inputs,
                operands=DType.FP8 if quantises else DType.BF16,
            ),
            other=_torchs_way(x_TI, weights, kind),
            note="activations quantised per token inside" if quantises else "",
        )
    )  # fmt: skip


def quantise_rows(bench: Bench, tokens: int, inputs: int) -> None:
    """Activations to FP8 with a scale a row."""
    copies = bench.session.copies(tokens * inputs * 3)
    inputs_TI = [bench.session.randn(tokens, inputs, dtype=torch.bfloat16) for _ in range(copies)]

    def check() -> Pairs:
        quantised, scale = matmul.quantise_rows_fp8(inputs_TI[0])
        wide = inputs_TI[0].double()
        return [
            (scale, wide.abs().amax(1, keepdim=True) / matmul.FP8_MAX),
            (quantised.float().double() * scale.double(), wide),
        ]

    def torchs(index: int) -> tuple[Tensor, Tensor]:
        x_TI = inputs_TI[index % copies]
        scale = x_TI.abs().amax(1, keepdim=True).float() / matmul.FP8_MAX
        return (x_TI.float() / scale).to(torch.float8_e4m3fn), scale

    bench.measure(
        Case(
            family="matmul", name="quantise rows to fp8", shape={"T": tokens, "I": inputs}, dtype="bf16",
            call=lambda index: matmul.quantise_rows_fp8(inputs_TI[index % copies]), check=check, copies=copies,
            bound=0.04, work=Work(bytes_moved=tokens * (inputs * 3 + 4)),
            other=Other(name="amax, divide, cast", call=torchs),
        )
    )  # fmt: skip


def reference(x_TI: Tensor, weight_OI: Tensor, scale: Tensor | None) -> Tensor:
    """The product in float64, some output channels at a time."""
    wide, parts = x_TI.double(), []
    for start in range(0, weight_OI.shape[0], _CHANNELS_AT_ONCE):
        rows = slice(start, start + _CHANNELS_AT_ONCE)
        parts.append(wide @ _dequantised(weight_OI[rows], None if scale is None else scale[rows]).T)
    return torch.cat(parts, dim=1)


def _dequantised(weight_OI: Tensor, scale: Tensor | None) -> Tensor:
    """A weight in float64; a scale [O, I / g] is of a group of g inputs."""
    if scale is None:
        return weight_OI.double()
    if scale.dim() == 1:
        return weight_OI.float().double() * scale.double()[:, None]
    packed = weight_OI.dtype is torch.uint8
    values = int4.unpack_int4(weight_OI, int4.group_of(weight_OI, scale)) if packed else weight_OI
    groups = values.double().view(len(values), scale.shape[1], -1) * scale.double()[:, :, None]
    return groups.view(values.shape)


def weight(bench: Bench, kind: str, outputs: int, inputs: int) -> tuple[Tensor, Tensor | None]:
    """A fresh matrix of `kind` and its scales."""
    session = bench.session
    if WEIGHT_BYTES[kind] == 2:
        return session.randn(outputs, inputs, dtype=COMPUTE[kind], scale=1 / math.sqrt(inputs)), None
    if kind == "int4":
        groups = session.randn(outputs, inputs // bench.scale.group, scale=0.1).exp_().div_(7 * math.sqrt(inputs))
        return session.randint(0, 256, (outputs, inputs // 2), torch.uint8), groups.to(COMPUTE[kind])
    scale_O = session.randn(outputs, scale=0.1).exp_().div_(127 * math.sqrt(inputs))
    if kind == "int8":
        return session.randint(-127, 128, (outputs, inputs), torch.int8), scale_O.to(COMPUTE[kind])
    weight_OI = session.randn(
        outputs, inputs, dtype=torch.float8_e4m3fn, scale=60.0
    )  # far from 448, where the cast would give NaN
    return weight_OI, scale_O


def _torchs_way(x_TI: Tensor, weights: list[tuple[Tensor, Tensor | None]], kind: str) -> Other:
    copies = len(weights)
    if kind == "int4":
        return _torchs_int4(x_TI, weights)
    if WEIGHT_BYTES[kind] == 2:
        return Other(name="F.linear", call=lambda index: F.linear(x_TI, weights[index % copies][0]))

    def widened(index: int) -> Tensor:
        weight_OI, scale_O = weights[index % copies]
        assert scale_O is not None
        return F.linear(x_TI, weight_OI.to(x_TI.dtype)) * scale_O.to(x_TI.dtype)

    if kind == "int8":
        return Other(name="widen, F.linear, scale", call=widened)
    quantised, row_scale = matmul.quantise_rows_twin(x_TI)

    def scaled(index: int) -> Tensor:
        weight_OI, scale_O = weights[index % copies]
        assert scale_O is not None
        return torch._scaled_mm(
            quantised, weight_OI.t(), scale_a=row_scale, scale_b=scale_O.float()[None], out_dtype=x_TI.dtype
        )

    return Other(name="torch._scaled_mm, activations in FP8 already", call=scaled)


def _torchs_int4(x_TI: Tensor, weights: list[tuple[Tensor, Tensor | None]]) -> Other:
    """For few tokens on a GPU torch's own INT4 product (bfloat16, scale and zero for each group), else widening first.

    torch packs in an order of its own; for timing, any bytes will do.
    """
    if x_TI.is_cuda and x_TI.shape[0] <= matmul.DECODE_ROWS:
        with contextlib.suppress(RuntimeError, AttributeError):
            return _tinygemm(x_TI, weights)
    copies = len(weights)

    def widened(index: int) -> Tensor:
        weight, scale = weights[index % copies]
        assert scale is not None
        wide = torch.stack((weight & 0xF, weight >> 4), dim=2).view(len(weight), scale.shape[1], -1).to(x_TI.dtype)
        return F.linear(x_TI, (wide.sub_(8) * scale[:, :, None]).view(len(weight), -1))

    return Other(name="unpack, scale, F.linear", call=widened)


def _tinygemm(x_TI: Tensor, weights: list[tuple[Tensor, Tensor | None]]) -> Other:
    _, scale = weights[0]
    assert scale is not None
    copies, tokens, (outputs, groups) = len(weights), x_TI.bfloat16(), scale.shape
    packed = [torch._convert_weight_to_int4pack(weight, 8) for weight, _ in weights]
    scales = torch.ones(groups, outputs, 2, dtype=torch.bfloat16, device=x_TI.device)
    size = x_TI.shape[1] // groups
    return Other(
        name="torch._weight_int4pack_mm, bf16",
        call=lambda index: torch._weight_int4pack_mm(tokens, packed[index % copies], size, scales),
    )
