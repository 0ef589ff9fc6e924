# ruff: noqa: ANN001, ANN201, ANN202, SIM300
# mypy: disable-error-code="no-untyped-def"
"""8-bit weights as 16-bit numbers inside a Triton kernel, exactly, four at a time through integer instructions.

A cast from int8 to fp16 compiles to two instructions per weight, one of them a conversion, for which a GPU has a much
narrower unit than for arithmetic; an H100 that reads 3 TB/s brings 13 weights a clock to every SM. The instructions
below use the wide units: per four weights 5 (int8 to fp16), 8 (int8 to bf16) or 10 (fp8 to either).

- int8 to fp16: the byte with its sign flipped, under the exponent of 1024, minus 1152.
- int8 to bf16: bf16 has 7 bits of mantissa, so 128 + the low 7 bits, minus 128 or 256 by the sign bit.
- fp8 (e4m3) to either: sign and the other bits at their places in the wider type, times the difference of the
  exponents' biases (2^8, 2^120), which is right for subnormal numbers too. NaN is not kept; weights have none.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen(bits, KIND: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """A tile as `DTYPE` (fp16 or bf16): int8, fp8 as uint8, or "plain" numbers of that type already.

    Without `ASM` (in Triton's interpreter, which runs no assembly) the same numbers come from plain operations, as
    any type.
    """
    if KIND == "plain":
        return bits.to(DTYPE)
    elif KIND == "int8":  # noqa: RET505 - Triton compiles the branch that is taken, and only in this form
        return _from_int8(bits, DTYPE, ASM)
    else:
        return _from_fp8(bits, DTYPE, ASM)


@triton.jit
def _from_int8(bits, DTYPE: tl.constexpr, ASM: tl.constexpr):
    if not ASM:
        return bits.to(DTYPE)
    elif DTYPE == tl.float16:  # noqa: RET505
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 flipped, low, high, bias;
            xor.b32 flipped, $2, 0x80808080;
            prmt.b32 low, flipped, 0x64646464, 0x4140;
            prmt.b32 high, flipped, 0x64646464, 0x4342;
            mov.b32 bias, 0x64806480;
            sub.f16x2 $0, low, bias;
            sub.f16x2 $1, high, bias;
            }""",
            "=r,=r,r", [bits], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, number, sign, minus;
            mov.b32 minus, 0xbf80bf80;
            prmt.b32 low, $2, 0, 0x4140;
            prmt.b32 high, $2, 0, 0x4342;
            lop3.b32 number, low, 0x007f007f, 0x43004300, 0xea;
            lop3.b32 sign, low, 0x00800080, 0x43004300, 0xea;
            fma.rn.bf16x2 $0, sign, minus, number;
            lop3.b32 number, high, 0x007f007f, 0x43004300, 0xea;
            lop3.b32 sign, high, 0x00800080, 0x43004300, 0xea;
            fma.rn.bf16x2 $1, sign, minus, number;
            }""",
            "=r,=r,r", [bits], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def _from_fp8(bits, DTYPE: tl.constexpr, ASM: tl.constexpr):
    if not ASM:
        wide = bits.to(tl.int16)
        half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        return (half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256).to(DTYPE)
    elif DTYPE == tl.float16:  # noqa: RET505
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, sign, rest, scale;
            mov.b32 scale, 0x5c005c00;
            prmt.b32 low, $2, 0, 0x1404;
            prmt.b32 high, $2, 0, 0x3424;
            and.b32 sign, low, 0x80008000;
            shr.b32 rest, low, 1;
            lop3.b32 low, rest, 0x3f803f80, sign, 0xea;
            mul.f16x2 $0, low, scale;
            and.b32 sign, high, 0x80008000;
            shr.b32 rest, high, 1;
            lop3.b32 high, rest, 0x3f803f80, sign, 0xea;
            mul.f16x2 $1, high, scale;
            }""",
            "=r,=r,r", [bits], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high, sign, rest, scale, zero;
            mov.b32 scale, 0x7b807b80;
            mov.b32 zero, 0x80008000;
            prmt.b32 low, $2, 0, 0x1404;
            prmt.b32 high, $2, 0, 0x3424;
            and.b32 sign, low, 0x80008000;
            shr.b32 rest, low, 4;
            lop3.b32 low, rest, 0x07f007f0, sign, 0xea;
            fma.rn.bf16x2 $0, low, scale, zero;
            and.b32 sign, high, 0x80008000;
            shr.b32 rest, high, 4;
            lop3.b32 high, rest, 0x07f007f0, sign, 0xea;
            fma.rn.bf16x2 $1, high, scale, zero;
            }""",
            "=r,=r,r", [bits], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
