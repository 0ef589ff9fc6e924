# ruff: noqa: ANN001, ANN201, ANN202, SIM300
# mypy: disable-error-code="no-untyped-def"
"""Weights of 4 and 8 bits as 16-bit numbers inside a Triton kernel, exactly, four at a time by integer instructions.

A cast from int8 to fp16 compiles to two instructions per weight, one of them a conversion, for which a GPU has a much
narrower unit than for arithmetic; an H100 that reads 3 TB/s brings 13 weights a clock to every SM. The instructions
below use the wide units: per four weights 5 (int8 to fp16), 8 (int8 to bf16) or 10 (fp8 to either), and per eight of
INT4 9 (to fp16) or 11 (to bf16).

- int8 to fp16: the byte with its sign flipped, under the exponent of 1024, minus 1152.
- int8 to bf16: bf16 has 7 bits of mantissa, so 128 + the low 7 bits, minus 128 or 256 by the sign bit.
- fp8 (e4m3) to either: sign and the other bits at their places in the wider type, times the difference of the
  exponents' biases (2^8, 2^120), which is right for subnormal numbers too. NaN is not kept; weights have none.
- INT4 to fp16: the nibble under the exponent of 1024, minus 1032; where it lies four bits higher it counts 16 times, so
  a sixteenth of that, minus 72. A zero point is subtracted with them.
- INT4 to bf16: the nibble under the exponent of 128, minus 136.
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


@triton.jit
def widen_int4(words, zero, HAS_ZERO: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Four tiles of `DTYPE` (fp16 or bf16) from one of int16: the nibbles from the lowest up, less 8 and `zero`.

    `zero`, whole numbers from -16 to 16 in any float type, broadcasts against `words`; the sums stay exact. Without
    `ASM` as `widen`.
    """
    if not ASM:
        numbers = words.to(tl.int32) & 0xFFFF
        less = zero.to(tl.float32) + 8 if HAS_ZERO else 8.0
        return (
            ((numbers & 0xF).to(tl.float32) - less).to(DTYPE), ((numbers >> 4 & 0xF).to(tl.float32) - less).to(DTYPE),
            ((numbers >> 8 & 0xF).to(tl.float32) - less).to(DTYPE), ((numbers >> 12).to(tl.float32) - less).to(DTYPE),
        )  # fmt: skip
    elif DTYPE == tl.float16:  # noqa: RET505
        return _int4_to_fp16(words, _less(1032, words, zero, HAS_ZERO, DTYPE), _less(72, words, zero, HAS_ZERO, DTYPE))
    else:
        return _int4_to_bf16(words, _less(136, words, zero, HAS_ZERO, DTYPE))


@triton.jit
def _less(OFFSET: tl.constexpr, words, zero, HAS_ZERO: tl.constexpr, DTYPE: tl.constexpr):
    if HAS_ZERO:
        return (-OFFSET - zero.to(tl.float32)).to(DTYPE).broadcast_to(words.shape)
    return tl.full(words.shape, -OFFSET, DTYPE)


@triton.jit
def _int4_to_fp16(words, near, far):
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 half, back, sixteenth;
        mov.b32 sixteenth, 0x2c002c00;
        shr.b32 back, $4, 8;
        lop3.b32 half, $4, 0x000f000f, 0x64006400, 0xea;
        add.f16x2 $0, half, $5;
        lop3.b32 half, $4, 0x00f000f0, 0x64006400, 0xea;
        fma.rn.f16x2 $1, half, sixteenth, $6;
        lop3.b32 half, back, 0x000f000f, 0x64006400, 0xea;
        add.f16x2 $2, half, $5;
        lop3.b32 half, back, 0x00f000f0, 0x64006400, 0xea;
        fma.rn.f16x2 $3, half, sixteenth, $6;
        }""",
        "=&r,=&r,=&r,=r,r,r,r", [words, near, far],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _int4_to_bf16(words, minus):
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 half, high, one;
        mov.b32 one, 0x3f803f80;
        lop3.b32 half, $4, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 $0, half, one, $5;
        shr.b32 high, $4, 4;
        lop3.b32 half, high, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 $1, half, one, $5;
        shr.b32 high, $4, 8;
        lop3.b32 half, high, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 $2, half, one, $5;
        shr.b32 high, $4, 12;
        lop3.b32 half, high, 0x000f000f, 0x43004300, 0xea;
        fma.rn.bf16x2 $3, half, one, $5;
        }""",
        "=&r,=&r,=&r,=r,r,r", [words, minus],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
    )  # fmt: skip
